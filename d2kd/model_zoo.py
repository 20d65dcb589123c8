"""Configurations of Detectron2's model zoo by name, where Detectron2 is installed: its files lie in that package."""

import os
from pathlib import Path
from typing import Any

from d2kd.errors import ConfigError
from d2kd.files import find_config
from d2kd.runtime import RUNTIME

#: Folders of the zoo's configurations.
_FOLDERS = (
    "COCO-Detection",
    "COCO-InstanceSegmentation",
    "COCO-Keypoints",
    "COCO-PanopticSegmentation",
    "Cityscapes",
    "Detectron1-Comparisons",
    "LVISv0.5-InstanceSegmentation",
    "LVISv1-InstanceSegmentation",
    "Misc",
    "PascalVOC-Detection",
)


def find_config_or_zoo(path: str, key: str) -> tuple[str, str]:
    """Returns the path of a configuration file, and the address of its weights where it is of Detectron2's model zoo.

    Args:
        path: of a file; or the name of a recipe of d2kd (see `find_config`), or of the zoo, such as
            "COCO-Detection/retinanet_R_101_FPN_3x.yaml".
        key: the key or flag that has it, for the message.

    Returns:
        The path, unchanged where there is no such file; and "", but for a configuration of the zoo with weights.

    Raises:
        ConfigError: it names a configuration of the zoo, and Detectron2 is not installed.
    """
    found = find_config(path)
    folder = Path(path).parts[0] if path else ""
    if os.path.exists(found) or folder not in _FOLDERS:
        return found, ""
    if RUNTIME.name != "detectron2":
        if folder == "Cityscapes":  # d2kd has recipes of its own there
            return found, ""
        raise ConfigError(
            f"{key} is {path!r}, a name of Detectron2's model zoo, which comes with Detectron2, and that is not "
            "installed. Give the path of the file, or a recipe that is here (d2kd list recipes); its weights have "
            "names (detectron2://...) that work without."
        )
    zoo = _zoo()
    try:
        file = str(zoo.get_config_file(path))
    except RuntimeError:  # which is told as that of any other file
        return found, ""
    try:
        return file, str(zoo.get_checkpoint_url(path))
    except RuntimeError:  # there is a configuration, and no published checkpoint
        return file, ""


def is_of_zoo(file: str) -> bool:
    """Returns whether a file lies in Detectron2's own package, which is trusted as its code is."""
    if RUNTIME.name != "detectron2":
        return False
    import detectron2

    zoo = Path(detectron2.__file__ or "").parent / "model_zoo"
    # in an installation that can be edited the folder of configurations is a link to another place
    folders = {Path(os.path.realpath(folder)) for folder in (zoo, zoo / "configs")}
    return not folders.isdisjoint(Path(os.path.realpath(file)).parents)


def _zoo() -> Any:
    try:
        from detectron2 import model_zoo
    except ImportError as error:  # it asks for pkg_resources, which the setuptools of today do not have
        raise ConfigError(
            f"Detectron2's model zoo cannot be used: {error}. Run pip install 'setuptools<81', or give the file's path."
        ) from error
    return model_zoo
