"""Third-party plugins: files and modules named by `--import` or DISTILL.IMPORTS, and installed packages.

Importing such a file registers what it defines: methods, architectures, teacher passes, backbones, datasets.
"""

import hashlib
import importlib
import importlib.util
import logging
import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType

from d2kd.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

#: Entry points of installed packages that are imported with d2kd's configuration.
ENTRY_POINT_GROUP = "d2kd.methods"


def import_plugins(names: Iterable[str], directories: Iterable[str] = ("",)) -> list[str]:
    """Imports files and modules, each once in a process.

    Args:
        names: paths of Python files ("my_method.py"), or modules ("my_package.methods").
        directories: where relative paths are looked for, in this order; "" is the working directory.

    Returns:
        The names, with the paths of files made absolute.

    Raises:
        ConfigError: there is no such file or module, or importing it failed.
    """
    directories = list(directories)
    return [_import(name, directories) for name in names]


@cache
def import_installed() -> None:
    """Imports the entry points `d2kd.methods` of installed packages; one that fails is left out with a warning."""
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        try:
            _import_module(entry.module)
        except (Exception, SystemExit) as error:  # somebody else's package must not stop a run that does not use it
            logger.warning("Left out entry point %s = %s (%s): %s", entry.name, entry.value, ENTRY_POINT_GROUP, error)


def _import(name: str, directories: Iterable[str]) -> str:
    if not isinstance(name, str):
        raise ConfigError(f"DISTILL.IMPORTS (--import) has {name!r}; each item is a Python file or a module's name.")
    path = _find(name, directories) if name.endswith(".py") else name
    try:
        if name.endswith(".py"):
            _import_file(path)
        else:
            _import_module(name)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"DISTILL.IMPORTS (--import) {name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    return path


def _find(name: str, directories: Iterable[str]) -> str:
    tried = [os.path.join(directory, os.path.expanduser(name)) for directory in directories]
    for path in tried:
        if os.path.isfile(path):
            return os.path.realpath(path)
    tried = list(dict.fromkeys(map(os.path.abspath, tried)))
    raise ConfigError(f"DISTILL.IMPORTS (--import) {name}: there is no such file; tried {', '.join(tried)}.")


def _import_module(name: str) -> None:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or _imported(os.path.realpath(spec.origin)) is None:
        importlib.import_module(name)


def _import_file(path: str) -> None:
    if _imported(path) is not None:
        return
    name = re.sub(r"\W", "_", os.path.splitext(os.path.basename(path))[0])
    if name in sys.modules or importlib.util.find_spec(name) is not None:  # it must not take another module's place
        name = f"{name}_{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it is a file that ends in .py
    if os.path.dirname(path) not in sys.path:
        sys.path.append(os.path.dirname(path))  # it may import its neighbors
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pickling and `@dataclass` look a class up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    logger.info("Imported %s", path)


def _imported(path: str) -> ModuleType | None:
    """The module that is a file already."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and os.path.realpath(file) == path:
            return module
    return None
