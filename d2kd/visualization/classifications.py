"""What several classifiers say about the same images: a sheet of images, each with the words beside it."""

import math
import unicodedata
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from d2kd.visualization.prediction_files import is_id, is_list_of, is_number, is_whole, read_entries
from detectron2.data import detection_utils

TILE = 168  # largest side of an image in pixels
TEXT = 340  # largest width of the text beside it
SHEET = 1100  # width that columns are made to fill
GAP = 12
LINE = 22  # height of a line
TITLE = 40  # height of a heading
MARK = 16  # width of the sign before a line
FONT, SIZE = cv2.FONT_HERSHEY_SIMPLEX, 0.5
BLACK, GREY, RIGHT, WRONG = (0, 0, 0), (120, 120, 120), (40, 130, 20), (40, 40, 205)  # BGR, to be read on white


class Classified(NamedTuple):
    """The true class of an image, and what a model takes for the best ones, best first, with their scores."""

    label: int
    classes: Sequence[int]
    scores: Sequence[float]

    @property
    def is_right(self) -> bool:
        """Whether the best class is the true one."""
        return bool(self.classes) and self.classes[0] == self.label

    @property
    def true_score(self) -> float | None:
        """The score of the true class; None where it is not among the best."""
        return self.scores[self.classes.index(self.label)] if self.label in self.classes else None


#: What a model says, by image id.
Answers = Mapping[Hashable, Classified]


class Line(NamedTuple):
    """A line of text, and whether a sign of right (True) or wrong (False) stands before it."""

    text: str
    color: tuple[int, int, int] = BLACK
    right: bool | None = None


def read_classifications(path: str) -> dict[Hashable, Classified]:
    """Reads classification_predictions.json: the best classes of every image, by its id.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged; the message says where.
    """
    numbers = is_list_of(is_number)
    required = {"image_id": is_id, "label": is_whole, "classes": is_list_of(is_whole), "scores": numbers}
    return {e["image_id"]: Classified(e["label"], e["classes"], e["scores"]) for e in read_entries(path, required)}


def differing(
    records: Iterable[dict[str, Any]], answers: Sequence[Answers], pair: tuple[Answers, Answers] | None = None
) -> list[dict[str, Any]]:
    """The images about which models say different classes, those first whose true class has the most different scores.

    Args:
        records: images with "image_id" and "label".
        answers: of every model; images that one of them lacks are left out.
        pair: the two whose scores are compared; by default the largest and the smallest of all. A true class that is
            not among a model's best counts as 0.
    """
    found = []
    for record in records:
        said = [model[record["image_id"]] for model in answers if record["image_id"] in model]
        if len(said) == len(answers) and len({s.classes[0] for s in said if s.classes}) > 1:
            compared = said if pair is None else [model[record["image_id"]] for model in pair]
            scores = [s.true_score or 0.0 for s in compared]
            found.append((max(scores) - min(scores), record))
    return [record for _, record in sorted(found, key=lambda entry: -entry[0])]


def classification_sheet(
    sections: Mapping[str, Sequence[dict[str, Any]]],
    class_names: Sequence[str],
    models: Mapping[str, Answers],
    heading: str = "",
) -> np.ndarray:
    """Draws images with their true class, and what each model says: its best class with its score.

    Right ones are green after a disc, wrong ones red after a cross and followed by the true class with its score, or
    what that is at most. Images are enlarged by whole factors; lines that are too long are broken, none is cut.

    Args:
        sections: images with "file_name", "image_id" and "label", below the heading of their section.
        class_names: by contiguous class id.
        models: what each says, by its name.
        heading: text above all.

    Returns:
        uint8 (H, W, 3) BGR.
    """
    names = [printable(name, f"class {number}") for number, name in enumerate(class_names)]
    cells = {
        title: [(_tile(record["file_name"]), _lines(record, names, models)) for record in records]
        for title, records in sections.items()
    }
    lengths = [_width(line) for section in cells.values() for _, lines in section for line in lines]
    text = min(TEXT, max(lengths, default=0))
    cell = TILE + text + 3 * GAP
    columns = max(1, min(SHEET // cell, max(map(len, cells.values()), default=1)))
    width = columns * cell
    rows = [_heading(heading, width)] if heading else []
    for title, section in cells.items():
        rows.append(_heading(title, width))
        for start in range(0, len(section), columns):
            rows.append(_row(section[start : start + columns], text, width))
    return np.vstack(rows)


def printable(text: str, otherwise: str = "?") -> str:
    """A name in the letters that OpenCV can draw: accents are left out, and a name in other letters is `otherwise`."""
    plain = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return plain if plain.isascii() and plain.isprintable() else otherwise


def _lines(record: Mapping[str, Any], names: Sequence[str], models: Mapping[str, Answers]) -> list[Line]:
    label = record["label"]
    lines = [Line(f"true: {names[label]}")]
    for title, answers in models.items():
        said = answers.get(record["image_id"])
        title = printable(title, "model")
        if said is None or not said.classes:
            lines.append(Line(f"{title}: no prediction", GREY))
            continue
        text = f"{title}: {names[said.classes[0]]} ({said.scores[0]:.2f})"
        if not said.is_right:
            score = said.true_score
            # what is not among the best has at most the score of the last of them
            known = f"{score:.2f}" if score is not None else f"at most {math.ceil(100 * said.scores[-1]) / 100:.2f}"
            text += f", not {names[label]} ({known})"
        lines.append(Line(text, RIGHT if said.is_right else WRONG, said.is_right))
    return lines


def _tile(file_name: str) -> np.ndarray:
    image = detection_utils.read_image(file_name, format="BGR")
    scale = TILE / max(image.shape[:2])
    if scale >= 1:  # pixels of one size
        size = tuple(side * int(scale) for side in image.shape[1::-1])
        return cv2.resize(image, size, interpolation=cv2.INTER_NEAREST)
    size = tuple(max(1, round(side * scale)) for side in image.shape[1::-1])
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _row(cells: Sequence[tuple[np.ndarray, Sequence[Line]]], text: int, width: int) -> np.ndarray:
    broken = [[part for line in lines for part in break_line(line, text)] for _, lines in cells]
    height = max([*(len(image) for image, _ in cells), *(len(lines) * LINE for lines in broken)]) + GAP
    row = np.full((height, width, 3), 255, np.uint8)
    for number, ((image, _), lines) in enumerate(zip(cells, broken)):
        left = number * (TILE + text + 3 * GAP) + GAP
        shift = (TILE - image.shape[1]) // 2
        row[: image.shape[0], left + shift : left + shift + image.shape[1]] = image
        for place, line in enumerate(lines):
            _write(row, line, left + TILE + GAP, place * LINE + 16)
    return row


def _write(image: np.ndarray, line: Line, left: int, base: int) -> None:
    x, y = left + 5, base - 5
    if line.right:
        cv2.circle(image, (x, y), 5, line.color, -1, cv2.LINE_AA)
    elif line.right is False:
        cv2.line(image, (x - 4, y - 4), (x + 4, y + 4), line.color, 2, cv2.LINE_AA)
        cv2.line(image, (x - 4, y + 4), (x + 4, y - 4), line.color, 2, cv2.LINE_AA)
    cv2.putText(image, line.text, (left + MARK, base), FONT, SIZE, line.color, 1, cv2.LINE_AA)


def break_line(line: Line, width: int) -> list[Line]:
    """Breaks a line at spaces, and where a word is too long within it, so that no part is wider than `width`."""
    parts: list[Line] = []
    rest = line.text
    while rest:
        fitting = len(rest)
        while fitting > 1 and _width(Line(rest[:fitting])) > width:
            fitting -= 1
        if fitting < len(rest):
            fitting = rest.rfind(" ", 1, fitting + 1) if " " in rest[1 : fitting + 1] else fitting
        parts.append(line._replace(text=rest[:fitting].rstrip(), right=None if parts else line.right))
        rest = rest[fitting:].lstrip()
    return parts


def _width(line: Line) -> int:
    return cv2.getTextSize(line.text, FONT, SIZE, 1)[0][0] + MARK + 2


def _heading(title: str, width: int) -> np.ndarray:
    parts = break_line(Line(printable(title)), width - GAP)
    image = np.full((TITLE + (len(parts) - 1) * LINE, width, 3), 255, np.uint8)
    for place, part in enumerate(parts):
        cv2.putText(image, part.text, (GAP, 25 + place * LINE), FONT, 0.52, BLACK, 1, cv2.LINE_AA)
    return image
