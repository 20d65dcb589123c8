"""Pascal VOC: an XML file for each image, and lists of the images of a split; read by torchvision and defusedxml."""

import os
from collections.abc import Sequence
from typing import Any
from xml.etree.ElementTree import ParseError

from d2kd.errors import did_you_mean, require_choice

from ..coco import DatasetError, short
from ..folders import IMAGE_SUFFIXES
from ..images import image_problem, image_size
from ..text_files import read_text
from .source import ConvertedSource, plain_number

_IMAGES, _ANNOTATIONS, _SPLITS = "JPEGImages", "Annotations", os.path.join("ImageSets", "Main")
#: What is done with objects that are marked as difficult.
_DIFFICULT = ("ignore", "use")
_SIDES = ("xmin", "ymin", "xmax", "ymax")


class VocAnnotations(ConvertedSource):
    """The folders Annotations, JPEGImages and ImageSets/Main of Pascal VOC."""

    FORMAT = "voc"

    def __init__(
        self,
        name: str,
        root: str,
        split: str,
        classes: Sequence[str] | None = None,
        first_pixel: int = 1,
        difficult: str = "ignore",
    ) -> None:
        """
        Args:
            name: of the dataset.
            root: the folder.
            split: name of the list of images in ImageSets/Main.
            classes: names in the order of the model's classes; None takes those of all annotations, sorted.
            first_pixel: number of the first pixel: 1 as in Pascal VOC, whose boxes hold all their pixels from xmin to
                xmax, or 0 for tools that write the edges of boxes from 0 on.
            difficult: "ignore" takes objects that are marked so for crowds: neither learned nor scored; "use" takes
                them as all others.
        """
        super().__init__(name, os.path.join(root, _IMAGES))
        self.root = root
        self.split = split
        self.classes = None if classes is None else list(classes)
        self.first_pixel = first_pixel
        self.difficult = difficult

    def content(self) -> dict[str, Any]:
        """As in the base class."""
        for folder in (_ANNOTATIONS, _IMAGES, _SPLITS):
            if not os.path.isdir(os.path.join(self.root, folder)):
                raise self.error(f"{self.root} has no folder {folder}, as Pascal VOC has.")
        files = {name: self._read(name) for name in self._names()}
        classes = self.classes if self.classes is not None else self._all_classes(files)
        number_of = {name: number for number, name in enumerate(classes)}
        listed = set(os.listdir(self.images))
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, (name, file) in enumerate(files.items(), 1):
            image = self._image_of(name, file, listed)
            images.append({"id": number, "file_name": image, **self._size(name, file, image)})
            for item in self._objects(name, file):
                if item["name"] not in number_of:
                    raise self.error(
                        f"{self._path(name)} has an object of class {short(repr(item['name']))}, and CLASSES lists "
                        f"{short(', '.join(classes))}.{did_you_mean(item['name'], classes)}"
                    )
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": number_of[item["name"]],
                        "bbox": self._box(name, item),
                        "iscrowd": self._crowd(name, item),
                    }
                )
        categories = [{"id": number, "name": name} for name, number in number_of.items()]
        return {"images": images, "annotations": annotations, "categories": categories}

    def _path(self, name: str) -> str:
        return os.path.join(self.root, _ANNOTATIONS, f"{name}.xml")

    def _names(self) -> list[str]:
        """The images of the split, sorted."""
        folder = os.path.join(self.root, _SPLITS)
        path = os.path.join(folder, f"{self.split}.txt")
        if not os.path.isfile(path):
            there = sorted(name.removesuffix(".txt") for name in os.listdir(folder) if name.endswith(".txt"))
            raise self.error(
                f"there is no list {path} for SPLIT {self.split!r}.{did_you_mean(self.split, there)} "
                f"There are {short(', '.join(there)) or 'none'}."
            )
        names = [line.strip() for line in read_text(path, self.error).split("\n") if line.strip()]
        if not names:
            raise self.error(f"{path} lists no images.")
        for name in names:
            if not os.path.isfile(self._path(name)):
                one_class = name.split()[-1] in ("-1", "0", "1") and len(name.split()) > 1
                hint = " It is the list of one class: use that of all images, e.g. train." if one_class else ""
                raise self.error(f"{path} lists {short(name)}, and there is no {self._path(name)}.{hint}")
        twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
        if twice is not None:
            raise self.error(f"{path} lists {short(twice)} more than once: remove it.")
        return sorted(names)

    def _read(self, name: str) -> dict[str, Any]:
        """The annotation of an image as nested dictionaries."""
        from torchvision.datasets import VOCDetection

        try:
            from defusedxml import ElementTree
        except ImportError as error:
            raise self.not_installed("defusedxml") from error

        path = self._path(name)
        try:
            root = ElementTree.parse(path).getroot()
        except (
            ParseError,
            OSError,
            LookupError,
            ValueError,
        ) as error:  # of encodings, and of what only attacks contain
            raise self.error(f"{path} cannot be read as XML ({error}).") from error
        content = VOCDetection.parse_voc_xml(root).get("annotation")
        if not isinstance(content, dict):
            raise self.error(f"{path} holds no <annotation> of Pascal VOC, but a <{root.tag}>.")
        return content

    def _objects(self, name: str, file: dict[str, Any]) -> list[dict[str, Any]]:
        items = file.get("object", [])
        for item in items:
            if not isinstance(item, dict) or not isinstance(item.get("name"), str) or not item["name"]:
                raise self.error(f"{self._path(name)} has an object without one <name>.")
        return list(items)

    def _all_classes(self, files: dict[str, dict[str, Any]]) -> list[str]:
        """Names of all annotations, so that every split has the same classes."""
        folder = os.path.join(self.root, _ANNOTATIONS)
        names = sorted(name.removesuffix(".xml") for name in os.listdir(folder) if name.endswith(".xml"))
        contents = ((name, files[name] if name in files else self._read(name)) for name in names)
        found = sorted({item["name"] for name, content in contents for item in self._objects(name, content)})
        if not found:
            raise self.error(f"no file of {folder} has an object: give CLASSES, or annotate the images.")
        return found

    def _image_of(self, name: str, file: dict[str, Any], listed: set[str]) -> str:
        """The file of an image, which must be the one that the annotation names; its ending may differ."""
        given = file.get("filename") or name
        base = os.path.basename(str(given).replace("\\", "/"))
        if name not in (base, os.path.splitext(base)[0]):
            raise self.error(
                f"{self._path(name)} names the image {short(base)}, and annotations have the names of their images: "
                "rename one of them, or correct <filename>."
            )
        return next((n for n in (base, *(name + ending for ending in _endings())) if n in listed), base)

    def _size(self, name: str, file: dict[str, Any], image: str) -> dict[str, int]:
        """Width and height: those of the annotation, or where it has none those of the image."""
        size = file.get("size")
        given = [str(size.get(key, "")) if isinstance(size, dict) else "" for key in ("width", "height")]
        if all(value.isdecimal() and int(value) > 0 for value in given):
            return {"width": int(given[0]), "height": int(given[1])}
        path = os.path.join(self.images, image)
        problem = image_problem(path)
        if problem is not None:
            raise self.error(f"{self._path(name)} has no <size>. {problem}")
        width, height = image_size(path)
        return {"width": width, "height": height}

    def _box(self, name: str, item: dict[str, Any]) -> list[float]:
        """COCO's box: from the first edge of the first pixel to the last edge of the last."""
        box = item.get("bndbox")
        try:
            x0, y0, x1, y1 = (float(box[side]) for side in _SIDES)  # type: ignore[index]
        except (KeyError, TypeError, ValueError):
            raise self.error(
                f"{self._path(name)} has an object {short(item['name'])} whose <bndbox> is {short(repr(box))}; it must "
                f"have the numbers {', '.join(_SIDES)}."
            ) from None
        if x1 < x0 or y1 < y0:
            raise self.error(
                f"{self._path(name)} has an object {short(item['name'])} that ends before it begins: "
                f"{short(repr(box))}."
            )
        if self.first_pixel and min(x0, y0) < self.first_pixel:
            raise self.error(
                f"{self._path(name)} has an object {short(item['name'])} with the corner ({x0:g}, {y0:g}), and Pascal "
                "VOC counts pixels from 1. Correct it, or, if the tool that wrote the files counts from 0, set "
                "FIRST_PIXEL to 0."
            )
        first = self.first_pixel
        return [plain_number(value, 1e-9) for value in (x0 - first, y0 - first, x1 - x0 + first, y1 - y0 + first)]

    def _crowd(self, name: str, item: dict[str, Any]) -> int:
        value = item.get("difficult") or "0"
        if value not in ("0", "1"):
            raise self.error(
                f"{self._path(name)} has an object {short(item['name'])} with difficult = {short(repr(value))}; it "
                "must be 0 or 1."
            )
        return int(value) if self.difficult == "ignore" else 0


def _endings() -> list[str]:
    return [spelling for ending in IMAGE_SUFFIXES for spelling in (ending, ending.upper())]


def voc_split(where: str, value: Any) -> str:
    """Returns the SPLIT of an entry.

    Raises:
        DatasetError: it is no text.
    """
    if not isinstance(value, str) or not value:
        raise DatasetError(f"{where} is {value!r}; it must name a list in ImageSets/Main, e.g. train.")
    return value


def voc_first_pixel(where: str, value: Any) -> int:
    """Returns the FIRST_PIXEL of an entry, by default 1.

    Raises:
        ConfigError: it is neither 0 nor 1.
    """
    value = 1 if value is None else value
    require_choice(where, value, (0, 1))
    return int(value)


def use_of_difficult(where: str, value: Any) -> str:
    """Returns the DIFFICULT of an entry, by default "ignore".

    Raises:
        ConfigError: it is no such word.
    """
    value = "ignore" if value is None else value
    require_choice(where, value, _DIFFICULT)
    return str(value)
