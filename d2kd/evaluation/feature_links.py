"""Feature pictures that `d2kd features` has drawn: where they are, and what a report says of them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from d2kd.evaluation.results import ModelResult

#: The folder in that of a run, and in it the file that names the pictures.
FOLDER, NUMBERS = "features", "features.json"
#: So many are shown in a report.
SHOWN = 3


def pictures_in(folder: Path) -> list[Path]:
    """Returns the pictures that a folder's `features.json` names, those that are there; [] without such a file."""
    try:
        content = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))
        names = [os.path.basename(entry["picture"]) for entry in content["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [folder / name for name in names if (folder / name).is_file()]


def feature_links(models: Mapping[str, ModelResult], directory: Path) -> list[str]:
    """Returns the feature pictures in the folder of the distilled run, as paths relative to that of a report.

    Args:
        models: of the report, by name.
        directory: of the report.
    """
    distilled = models.get("distilled")
    known = next((f for f in (distilled.checkpoint, distilled.config_file) if f), None) if distilled else None
    if known is None:
        return []
    pictures = pictures_in(Path(known).parent / FOLDER)
    return [Path(os.path.relpath(path, directory)).as_posix() for path in pictures[:SHOWN]]


def features_text(report: Mapping[str, Any]) -> list[str]:
    """The paragraphs of a report on its feature pictures; [] where it has none."""
    links: Sequence[str] = report.get("features") or []
    if not links:
        return []
    intro = (
        "Maps of the teacher, and of the distilled student before and after its training, over the same images: their "
        "mean, their principal components in common colors, and how far the student is from the teacher. Made by "
        f"`d2kd features`; numbers are in `{NUMBERS}` beside the pictures."
    )
    return ["## Features", intro, *(f"![Features of teacher and student](<{link}>)" for link in links)]
