"""Pickling of functions that the standard library cannot pickle."""

from typing import Any

import cloudpickle

__all__ = ["PicklableWrapper"]


class PicklableWrapper:
    """A callable, such as a lambda, that can be sent to other processes."""

    def __init__(self, obj: Any) -> None:
        """
        Args:
            obj: the callable; another wrapper is unwrapped.
        """
        self._obj = obj._obj if isinstance(obj, PicklableWrapper) else obj

    def __reduce__(self) -> tuple:
        return _unpickle, (cloudpickle.dumps(self._obj),)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._obj(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_obj":
            raise AttributeError(name)
        return getattr(self._obj, name)


def _unpickle(pickled: bytes) -> PicklableWrapper:
    return PicklableWrapper(cloudpickle.loads(pickled))
