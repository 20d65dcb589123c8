"""Catalogs that map the name of a dataset to the function that loads it and to its metadata."""

import types
from collections import UserDict
from collections.abc import Callable
from typing import Any

__all__ = ["DatasetCatalog", "MetadataCatalog", "Metadata"]


class _DatasetCatalog(UserDict):
    """Maps dataset names to functions that return the dataset, usually as a list of dicts."""

    def register(self, name: str, func: Callable[[], list[dict[str, Any]]]) -> None:
        """Adds a dataset.

        Args:
            name: a name that is not taken.
            func: called without arguments each time the dataset is loaded; must return the same data each time.
        """
        assert callable(func), f"dataset {name!r} must come with a function, got {type(func).__name__}"
        assert name not in self, f"dataset {name!r} is already registered"
        self[name] = func

    def get(self, name: str) -> list[dict[str, Any]]:
        """Loads a dataset.

        Raises:
            KeyError: if there is no dataset of that name.
        """
        try:
            load = self[name]
        except KeyError as e:
            names = ", ".join(self)
            raise KeyError(f"Dataset {name!r} is not registered. Registered datasets: {names}") from e
        return load()

    def list(self) -> list[str]:
        """Names of all datasets."""
        return [*self]

    def remove(self, name: str) -> None:
        """Removes a dataset."""
        self.pop(name)

    def __str__(self) -> str:
        return f"DatasetCatalog(registered datasets: {', '.join(self)})"

    __repr__ = __str__


class Metadata(types.SimpleNamespace):
    """Properties of a dataset that are shared by all its images, such as the names of its classes.

    A value can be set once; setting it again to something else is an error, so that nothing depends on the order
    of import.
    """

    # The name is set even where nothing else is.
    name: str = "N/A"

    def __getattr__(self, key: str) -> Any:
        known = ", ".join(k for k in self.__dict__ if k != "name") or "nothing"
        raise AttributeError(f"Metadata of dataset {self.name!r} has no {key!r}; it has: {known}")

    def __setattr__(self, key: str, value: Any) -> None:
        if key in self.__dict__ and self.__dict__[key] != value:
            raise AssertionError(
                f"Metadata {key!r} of dataset {self.name!r} is set already and cannot change: "
                f"{self.__dict__[key]!r} != {value!r}"
            )
        super().__setattr__(key, value)

    def as_dict(self) -> dict[str, Any]:
        """All values, as a new dict."""
        return dict(self.__dict__)

    def set(self, **kwargs: Any) -> "Metadata":
        """Sets several values and returns self."""
        for key, value in kwargs.items():
            setattr(self, key, value)
        return self

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or `default` where it is not set."""
        return self.__dict__.get(key, default)


class _MetadataCatalog(UserDict):
    """Maps dataset names to their `Metadata`, which is created on first use."""

    def get(self, name: str) -> Metadata:
        """The metadata of a dataset; the same object for the same name."""
        assert name, "metadata belongs to a dataset name, got an empty one"
        if name not in self:
            self[name] = Metadata(name=name)
        return self[name]

    def list(self) -> list[str]:
        """Names that have metadata."""
        return [*self]

    def remove(self, name: str) -> None:
        """Removes the metadata of a dataset."""
        self.pop(name)

    def __str__(self) -> str:
        return f"MetadataCatalog(registered metadata: {', '.join(self)})"

    __repr__ = __str__


DatasetCatalog = _DatasetCatalog()
MetadataCatalog = _MetadataCatalog()
