"""Typing errors of a command line, told before anything is imported that takes time.

What is found here would be found later as well, in the same words; so nothing here needs to find everything, and
where in doubt it stays silent.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from d2kd.arguments import check_no_flags, command_line_options
from d2kd.errors import ConfigError, UserError, did_you_mean, require_choice
from d2kd.files import find_config, near_configs

from .names import kept_table, source


def stop_at_mistakes(args: argparse.Namespace, check: Callable[[argparse.Namespace], None] | None = None) -> None:
    """Ends the program with one line and status 2 where the command line cannot be meant so.

    Args:
        args: of a command with `--config-file`, `--import` and changes to the configuration; the flags for the teacher
            may be missing.
        check: what the command itself demands of them; raises UserError.
    """
    try:
        if check is not None:
            check(args)
        check_command_line(args)
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr)
        sys.exit(2)


def check_command_line(args: argparse.Namespace) -> None:
    """
    Raises:
        ConfigError: a configuration file is not there; flags stand among the changes, or these are no pairs; or a key
            or a method is known nowhere.
    """
    flags: dict[str, Any] = {"teacher_config": None, "teacher_weights": None, "method": None, **vars(args)}
    options = command_line_options(argparse.Namespace(**flags))
    check_no_flags(options)
    files = {"--config-file": args.config_file, "DISTILL.TEACHER.CONFIG_FILE (--teacher-config)": ""}
    keys, values = options[::2], options[1::2]
    if len(keys) == len(values):
        chosen = dict(zip(keys, values))
        files["DISTILL.TEACHER.CONFIG_FILE (--teacher-config)"] = chosen.get("DISTILL.TEACHER.CONFIG_FILE", "")
    for flag, path in files.items():
        if path and "://" not in path and not os.path.isfile(find_config(path)):
            raise ConfigError(f"{flag} is {path!r}: there is no such file.{near_configs(path)}")
    if len(keys) != len(values) or args.imports or any("IMPORTS" in key for key in keys):
        return
    if not any(map(_imports_something, files.values())):
        _check_names(keys, (flags["method"] or "").split(",") if flags["method"] else [])


def _imports_something(config_file: str) -> bool:
    """Whether a YAML or one that it is based on has imports, which may register any key; or cannot be read."""
    path, seen = find_config(config_file), set[str]()
    while path:
        seen.add(path)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
            base = (yaml.safe_load(text) or {}).get("_BASE_", "") if "_BASE_" in text else ""
            if "IMPORTS" in text or not isinstance(base, str):
                return True
            base = os.path.expanduser(base)
            path = os.path.join(os.path.dirname(path), base) if base else ""
            if path in seen:
                return True
        except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
            return True
    return False


def _check_names(keys: Sequence[str], methods: Sequence[str]) -> None:
    table = kept_table()
    if table is None:
        return
    # keys that have been added to the source since the table was made are not unknown
    known, letters = {part for key in table["keys"] for part in key.split(".")}, source().replace("_", "").lower()

    def occurs(name: str) -> bool:
        return name in known or name.replace("_", "").lower() in letters

    for key in keys:
        if key not in table["keys"] and not all(map(occurs, key.split("."))):
            hint = did_you_mean(key, table["keys"], cutoff=0.6)
            raise ConfigError(f"In the command line: Non-existent key: {key}.{hint}")
    for number, method in enumerate(methods):
        if method not in table["names"]["methods"] and not occurs(method):
            hint = " A method of your own: name its file with --import."
            require_choice(f"DISTILL.METHODS[{number}]", method, ["auto", *sorted(table["names"]["methods"])], hint)
