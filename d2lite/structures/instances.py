"""The instances of one image: several fields of equal length."""

import itertools
from typing import Any, NoReturn

import torch


class Instances:
    """Labels or predictions of the instances in one image.

    Fields are set and read as attributes. All have the same length N; indexing selects from all of them.

    Example::

        instances = Instances((480, 640))
        instances.gt_boxes = Boxes(...)
        instances.gt_classes = torch.tensor(...)
        large = instances[instances.gt_boxes.area() > 1024]
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any) -> None:
        """
        Args:
            image_size: (height, width) of the image, in pixels.
            kwargs: fields.
        """
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the image, in pixels."""
        return self._image_size

    def __setattr__(self, name: str, val: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, val)
        else:
            self.set(name, val)

    def __getattr__(self, name: str) -> Any:
        if name == "_fields" or name not in self._fields:
            raise AttributeError(f"Cannot find field '{name}' in the given Instances!")
        return self._fields[name]

    def set(self, name: str, value: Any) -> None:
        """Sets a field. Raises AssertionError if its length is not that of the fields there are."""
        if self._fields:
            assert len(self) == len(value), (
                f"Cannot add field '{name}' of length {len(value)} to Instances of length {len(self)}"
            )
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Returns whether there is such a field."""
        return name in self._fields

    def remove(self, name: str) -> None:
        """Deletes a field. Raises KeyError if there is none."""
        del self._fields[name]

    def get(self, name: str) -> Any:
        """Returns a field. Raises KeyError if there is none."""
        return self._fields[name]

    def get_fields(self) -> dict[str, Any]:
        """Returns all fields by name; changing the dict changes the instances."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> "Instances":
        """Returns these instances with every field that has a `to` method moved by it."""
        return self._map(lambda value: value.to(*args, **kwargs) if hasattr(value, "to") else value)

    def __getitem__(self, item: int | slice | torch.BoolTensor) -> "Instances":
        """
        Args:
            item: an integer (one instance is left), or whatever all fields can be indexed with.

        Raises:
            IndexError: if an integer is out of range.
        """
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"Index {item} is out of range for Instances of length {len(self)}")
            item = slice(item, None, len(self))
        return self._map(lambda value: value[item])

    def _map(self, function: Any) -> "Instances":
        result = Instances(self._image_size)
        for name, value in self._fields.items():
            result.set(name, function(value))
        return result

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("Instances without fields have no length.")

    def __iter__(self) -> NoReturn:
        # Without this, Python would iterate by __getitem__, which is slow and rarely intended.
        raise NotImplementedError("Instances are not iterable: index them, or iterate over a field.")

    @staticmethod
    def cat(instance_lists: list["Instances"]) -> "Instances":
        """Concatenates instances of one image, field by field: tensors, lists, and types with a `cat` method.

        Raises:
            ValueError: if a field has another type.
            KeyError: if a field of the first is missing in another.
        """
        assert len(instance_lists) > 0, "Instances.cat needs at least one Instances"
        assert all(isinstance(i, Instances) for i in instance_lists), "Instances.cat needs Instances only"
        first = instance_lists[0]
        for other in instance_lists[1:]:
            assert tuple(other.image_size) == tuple(first.image_size), (
                f"Cannot concatenate Instances of image sizes {first.image_size} and {other.image_size}"
            )
        if len(instance_lists) == 1:
            return first
        result = Instances(first.image_size)
        for name in first.get_fields():
            result.set(name, _concatenate(name, [i.get(name) for i in instance_lists]))
        return result

    def __str__(self) -> str:
        size = f"num_instances={len(self) if self._fields else 0}, "
        size += f"image_height={self._image_size[0]}, image_width={self._image_size[1]}"
        fields = ", ".join(f"{name}: {value}" for name, value in self._fields.items())
        return f"{type(self).__name__}({size}, fields=[{fields}])"

    __repr__ = __str__


def _concatenate(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(values, dim=0)
    if isinstance(first, list):
        return list(itertools.chain(*values))
    if hasattr(type(first), "cat"):
        return type(first).cat(values)
    raise ValueError(f"Cannot concatenate field '{name}' of type {type(first)}: it has no method `cat`.")
