"""Weights by name, `torchvision://resnet18` and `timm://resnet18.a1_in1k`, through these libraries' own loaders."""

import logging
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import getproxies

import torch

from d2kd.config import config_check, get_key
from d2kd.errors import ConfigError, did_you_mean
from d2kd.files import replacing
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathHandler, PathManager

from .backbone.pixels import pixels_of
from .backbone.timm_networks import check_name, download_url, first_line, pretrained_config
from .pretrained_names import describe_changes

logger = logging.getLogger(__name__)

_KEYS = ("MODEL.WEIGHTS", "DISTILL.TEACHER.WEIGHTS")
TORCHVISION, TIMM = "torchvision://", "timm://"


class LibraryWeights(NamedTuple):
    """Pretrained weights of a library."""

    #: As a configuration names them.
    address: str
    #: Where the library downloads them from.
    url: str
    #: Where they are kept on this machine, once there.
    cached: Path
    #: Mean and deviation, 0 to 1 in RGB order, of the images that they were trained with.
    mean: tuple[float, ...]
    std: tuple[float, ...]


def is_library_address(path: str) -> bool:
    """Returns whether weights are named as `torchvision://NAME`, `torchvision://NAME/VERSION` or `timm://NAME`."""
    return path.startswith((TORCHVISION, TIMM))


def find_weights(address: str) -> LibraryWeights:
    """Returns what an address names; nothing is downloaded.

    Args:
        address: `torchvision://resnet50` for torchvision's default weights of a classifier,
            `torchvision://resnet50/IMAGENET1K_V1` for others of its; `timm://resnet50` or, with a tag,
            `timm://resnet50.a1_in1k`.

    Raises:
        ConfigError: the library has no such network, or no such weights of it.
    """
    if address.startswith(TIMM):
        return _find_timm(address)
    return _find_torchvision(address)


def fetch(address: str) -> str:
    """Returns the file of the weights that an address names, downloaded by its library where it is not there yet.

    Raises:
        ConfigError: see `find_weights`; or they cannot be downloaded. The message says from where they are, and by what
            command they can be had; it goes on from "MODEL.WEIGHTS ... cannot be loaded: ".
    """
    found = find_weights(address)
    if found.cached.is_file():
        return str(found.cached)
    logger.info("Fetching %s from %s", address, found.url)
    try:
        _download_timm(found) if address.startswith(TIMM) else _download_torchvision(found)
    except Exception as error:
        file = found.url.rpartition("/")[2]
        # of timm, what is kept was converted, so that its own file cannot take that place
        keep = "" if address.startswith(TIMM) else f", or keep it as {found.cached}"
        raise ConfigError(
            f"it is not on this machine, and its download failed ({first_line(error)}). Where there is a network: "
            f"curl -LO {found.url}; then give the path of {file} instead of {address}{keep}; or '' for no weights"
        ) from error
    return str(found.cached)


def fetch_start(cfg: CfgNode) -> None:
    """Fetches what `MODEL.WEIGHTS` and `DISTILL.TEACHER.WEIGHTS` name, before a run begins.

    Raises:
        ConfigError: see `fetch`.
    """
    for key in _KEYS:
        address = str(get_key(cfg, key, ""))
        if is_library_address(address):
            try:
                fetch(address)
            except ConfigError as error:
                raise ConfigError(f"{key} {address} cannot be loaded: {error}") from error


def _find_torchvision(address: str) -> LibraryWeights:
    from torchvision import models

    name, _, version = address.removeprefix(TORCHVISION).partition("/")
    names = models.list_models(module=models)
    if name not in names:
        others = models.list_models()
        what = "no classifier, as weights of a backbone are" if name in others else "no network of torchvision's"
        raise ConfigError(f"{address}: {name!r} is {what}.{did_you_mean(name, names)}")
    versions: Any = models.get_model_weights(name)
    if version and version not in versions.__members__:
        raise ConfigError(
            f"{address}: torchvision has no weights {version!r} of {name}, but {', '.join(versions.__members__)}."
        )
    weights = versions[version] if version else versions.DEFAULT
    pixels = weights.transforms()
    file = os.path.basename(urlparse(weights.url).path)
    return LibraryWeights(address, weights.url, _cache(file), tuple(pixels.mean), tuple(pixels.std))


def _download_torchvision(found: LibraryWeights) -> None:
    from torchvision import models

    name, _, version = found.address.removeprefix(TORCHVISION).partition("/")
    versions: Any = models.get_model_weights(name)
    # which keeps the file in the cache, from where it is read as any other
    (versions[version] if version else versions.DEFAULT).get_state_dict(
        progress=True, check_hash=True, weights_only=True
    )


def _find_timm(address: str) -> LibraryWeights:
    import timm

    name = address.removeprefix(TIMM)
    try:
        check_name(name)
    except ConfigError as error:
        raise ConfigError(f"{address}: {str(error).removeprefix(f'MODEL.TIMM.NAME is {name!r}')[2:]}") from error
    known = pretrained_config(name)
    url = download_url(known)
    if not url:
        versions = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ConfigError(f"{address}: timm {timm.__version__} has no weights of it.{did_you_mean(name, versions)}")
    full = ".".join(part for part in (known.get("architecture") or name, known.get("tag")) if part)
    return LibraryWeights(
        address, url, _cache(f"timm-{full.replace('/', '-')}.pth"), tuple(known["mean"]), tuple(known["std"])
    )


def _download_timm(found: LibraryWeights) -> None:
    import timm
    from huggingface_hub import try_to_load_from_cache

    host, (*_, repository) = urlparse(found.url).hostname, found.url.partition("huggingface.co/")
    hub, _, file = repository.partition("/resolve/main/")
    if file and not _is_reachable(host) and not isinstance(try_to_load_from_cache(hub, file), str):
        raise OSError(f"no network: {host} is not found")  # which the hub's client tries for most of a minute
    with torch.random.fork_rng(devices=[]):  # what is initialized here must not change what a run draws
        network = timm.create_model(found.address.removeprefix(TIMM), pretrained=True)
    with replacing(found.cached) as temporary:
        torch.save(network.state_dict(), temporary)


def _is_reachable(host: str | None) -> bool:
    """Whether there may be a way to a host: its address is known, or others are asked for it."""
    try:
        return bool(getproxies() or socket.getaddrinfo(host, 443))
    except OSError:
        return False


def _cache(file: str) -> Path:
    """Where torch.hub, and torchvision with it, keeps what it downloads."""
    return Path(torch.hub.get_dir(), "checkpoints", file)


class _LibraryHandler(PathHandler):
    """Lets everything that reads checkpoints take the addresses."""

    def _get_supported_prefixes(self) -> list[str]:
        return [TORCHVISION, TIMM]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return fetch(path)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return os.path.isfile(fetch(path))

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> Any:
        return open(fetch(path), mode, buffering)


PathManager.register_handler(_LibraryHandler(), allow_override=True)


@config_check
def check_library_weights(cfg: CfgNode) -> None:
    """
    Raises:
        ConfigError: `MODEL.WEIGHTS` names weights that a library does not have, or the images that the configuration
            gives to the network are not those that they were trained with; or `DISTILL.TEACHER.WEIGHTS` names such.
    """
    for key in _KEYS:
        address = str(get_key(cfg, key, ""))
        if not is_library_address(address):
            continue
        try:
            found = find_weights(address)
        except ConfigError as error:
            raise ConfigError(f"{key} is {error}") from error
        if key == "MODEL.WEIGHTS":
            _check_input(cfg, found)


def _check_input(cfg: CfgNode, found: LibraryWeights) -> None:
    """What the weights were trained with is known here, so that another input is an error and not a warning."""
    wanted = _wanted(cfg, found)
    pixels = pixels_of(cfg) if cfg.MODEL.TIMM.DATA_CONFIG else None
    if pixels is not None:  # set by the library's own of the network's name, see `with_data_config`
        if (pixels.mean, pixels.std) != (wanted["MODEL.PIXEL_MEAN"], wanted["MODEL.PIXEL_STD"]):
            raise ConfigError(
                f"MODEL.WEIGHTS {found.address} was trained with the mean {wanted['MODEL.PIXEL_MEAN']} and deviation "
                f"{wanted['MODEL.PIXEL_STD']} of pixels, and MODEL.TIMM.NAME {cfg.MODEL.TIMM.NAME} stands for "
                f"{pixels.mean} and {pixels.std}: give both the same name."
            )
        return
    changes = describe_changes(cfg, wanted)
    if changes:
        raise ConfigError(
            f"MODEL.WEIGHTS {found.address} needs what it was trained with: set {changes}. (Of a file of the same "
            "weights this is a warning only.)"
        )


def _wanted(cfg: CfgNode, found: LibraryWeights) -> Mapping[str, Any]:
    strides = "resnet" in cfg.MODEL.BACKBONE.NAME and cfg.MODEL.RESNETS.DEPTH >= 50
    return {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": [round(255 * x, 3) for x in found.mean],
        "MODEL.PIXEL_STD": [round(255 * x, 3) for x in found.std],
        **({"MODEL.RESNETS.STRIDE_IN_1X1": False} if strides else {}),
    }
