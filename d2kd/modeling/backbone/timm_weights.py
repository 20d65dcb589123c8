"""Pretrained weights of timm: read without running code in a file, and fitted to a network as timm does."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from d2kd.errors import ConfigError

from ..checkpoint_files import read_checkpoint
from ..pretrained_names import unpacked
from .timm_networks import DOWNLOAD, download_url, first_line, pretrained_config


class Pretrained(NamedTuple):
    """What `MODEL.TIMM.WEIGHTS` gives: a network like ours with these weights, and what of it they do not fill."""

    state: Mapping[str, torch.Tensor]
    #: Names of parameters that keep their initialization, such as those of a classifier for other classes.
    left: list[str]


def read_pretrained(
    build: Callable[..., nn.Module], name: str, weights: str | Mapping[str, torch.Tensor], arguments: Mapping[str, Any]
) -> Pretrained:
    """Returns the weights that a configuration names, fitted to a network as timm does when it builds one.

    Args:
        build: `create` or `create_features`.
        name: of the network.
        weights: a file, `DOWNLOAD`, or weights that were read already.
        arguments: of `build`.

    Raises:
        ConfigError: the file cannot be read, does not fit, or cannot be downloaded.
    """
    overlay: dict[str, Any] = {}
    known = pretrained_config(name)
    classifier, classes = known.get("classifier"), known.get("num_classes")
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    if weights != DOWNLOAD:
        state = _read_file(weights) if isinstance(weights, str) else weights  # here, where no code in a file is run
        found = [state[f"{head}.weight"].shape[0] for head in heads if f"{head}.weight" in state]
        classes = found[0] if found else classes
        overlay = {"state_dict": state, "custom_load": False, "num_classes": classes}
    try:
        with torch.random.fork_rng(devices=[]), _noting_missing() as missing:
            source = build(
                name, pretrained=True, **arguments, **({"pretrained_cfg_overlay": overlay} if overlay else {})
            )
    except ConfigError as error:
        cause = error.__cause__
        reason = first_line(cause if isinstance(cause, Exception) else error)
        if not isinstance(weights, str):
            raise ConfigError(f"it does not fit {name} of timm: {reason}") from error
        what = f"{weights!r}, which does not fit" if overlay else "download, which fails for"
        url = "" if overlay else download_url(known)
        where = f", such as curl -LO {url} fetches it where there is a network" if url else ""
        raise ConfigError(
            f"MODEL.TIMM.WEIGHTS is {what} {name}: {reason}. Give the path of a file with its weights{where}; or ''."
        ) from error
    missing = [name for name in missing if not name.startswith(tuple(f"{head}." for head in heads))]
    if missing:
        what = f"MODEL.TIMM.WEIGHTS is {weights!r}, which" if isinstance(weights, str) else "it"
        raise ConfigError(
            f"{what} does not fit {name} of timm: {missing[0]} and {len(missing) - 1} more are not there, or of "
            "another shape."
        )
    state = source.state_dict()
    other = arguments.get("num_classes") not in (None, classes)
    return Pretrained(state, [key for key in state if other and key.startswith(tuple(f"{head}." for head in heads))])


@contextlib.contextmanager
def _noting_missing() -> Iterator[list[str]]:
    """Yields a list that gets the parameters which loading leaves without values; timm is content with that in
    backbones.
    """
    missing: list[str] = []
    load = nn.Module.load_state_dict

    def noting(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = load(module, *args, **kwargs)
        missing.extend(name for name, _ in module.named_parameters() if name in result.missing_keys)
        return result

    nn.Module.load_state_dict = noting  # type: ignore[assignment, method-assign]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = load  # type: ignore[method-assign]


def _read_file(path: str) -> Mapping[str, torch.Tensor]:
    if not os.path.isfile(path):
        raise ConfigError(
            f"MODEL.TIMM.WEIGHTS is {path!r}: there is no such file. Give a file of timm's, {DOWNLOAD!r}, or "
            "'' for none."
        )
    try:
        state = unpacked(read_checkpoint(path))
    except Exception as error:
        raise ConfigError(f"MODEL.TIMM.WEIGHTS is {path!r}, which cannot be read: {first_line(error)}.") from error
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConfigError(f"MODEL.TIMM.WEIGHTS is {path!r}, which holds no dictionary of weights.")
    return state
