"""Datasets of another format, under the name of a COCO file: whatever opens it gets the same data as one."""

import json
import os
import tempfile
from typing import IO, Any

from iopath.common.file_io import PathHandler

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..coco import DatasetError, load_coco

#: What pip installs the readers by.
EXTRA = "d2kd[formats]"


class ConvertedSource:
    """A dataset that is converted when it is first read; a function without arguments, as the catalog wants it.

    The checks of COCO files, records and evaluators read `json_file`, a name that the path manager knows by
    `register`, so that there is one reading of boxes for all formats.
    """

    #: Of `DATASETS.REGISTER`.
    FORMAT = ""

    def __init__(self, name: str, images: str) -> None:
        """
        Args:
            name: of the dataset.
            images: the folder of its images.
        """
        self.name = name
        self.images = images

    @property
    def json_file(self) -> str:
        """The name under which the dataset is read as a COCO file."""
        return f"{self.FORMAT}://{self.name}"

    def __call__(self) -> list[dict[str, Any]]:
        """Returns records in Detectron2's format."""
        return load_coco(self.json_file, self.images, self.name)

    def content(self) -> dict[str, Any]:
        """Reads the dataset and returns the content of its COCO file; images, and so their ids, are in the order of
        their names, annotations in that of their files.

        Raises:
            DatasetError: something in it cannot be read, or does not fit together.
        """
        raise NotImplementedError

    def register(self) -> None:
        """Registers the dataset in Detectron2's catalogs."""
        _sources[self.json_file] = self
        self.forget()
        DatasetCatalog.register(self.name, self)
        MetadataCatalog.get(self.name).set(json_file=self.json_file, image_root=self.images, evaluator_type="coco")

    def forget(self) -> None:
        """Lets the next reader convert the dataset anew."""
        _written.pop(self.json_file, None)

    def not_installed(self, reader: str) -> DatasetError:
        """Returns the error that what reads the format is not installed."""
        return self.error(f"FORMAT {self.FORMAT} is read by {reader}, which is not installed: pip install '{EXTRA}'")

    def error(self, message: str) -> DatasetError:
        """Returns an error that names the dataset."""
        return DatasetError(f"Dataset {self.name!r}: {message}")


class _ConvertedFiles(PathHandler):
    """Opens the COCO files of converted datasets, which are written when they are first asked for."""

    def _get_supported_prefixes(self) -> list[str]:
        return ["yolo://", "voc://"]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        if path not in _sources:
            raise FileNotFoundError(f"No dataset is registered as {path}.")
        if path not in _written:
            content = json.dumps(_sources[path].content())
            with tempfile.NamedTemporaryFile(
                "w", dir=_folder().name, suffix=".json", delete=False, encoding="utf-8"
            ) as file:
                file.write(content)
            _written[path] = file.name
        return _written[path]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        return open(self._get_local_path(path), mode, buffering)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return path in _sources

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path in _sources

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        return False


#: Registered datasets, and the files that this process has written for them, by their `json_file`.
_sources: dict[str, ConvertedSource] = {}
_written: dict[str, str] = {}
_folders: dict[int, "tempfile.TemporaryDirectory[str]"] = {}


def _folder() -> "tempfile.TemporaryDirectory[str]":
    """The folder of this process, which it removes when it ends."""
    process = os.getpid()
    if process not in _folders:
        _folders[process] = tempfile.TemporaryDirectory(prefix="d2kd-")
    return _folders[process]


PathManager.register_handler(_ConvertedFiles())


def plain_number(value: float, tolerance: float) -> float:
    """Returns the number with the fewest decimals that a file may have meant by a rounded one.

    Shares of an image with six decimals do not tell 12 pixels from 11.9998; that a box was drawn on whole pixels, or
    on the hundredths of COCO's own files, is then certain enough, and the difference is below what was written.

    Args:
        value: in pixels.
        tolerance: how far rounding may have moved it.

    Returns:
        `value` itself where a decimal place says nothing, as it is not larger than two tolerances.
    """
    for decimals in range(9):
        if 10.0**-decimals <= 2 * tolerance:
            break
        rounded = round(value, decimals)
        if abs(rounded - value) <= tolerance:
            return rounded
    return value
