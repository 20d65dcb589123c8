"""What an entry belongs to: the teacher with its weights and arithmetic, the taps, and the pixels that it saw."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2kd.config import leaves
from d2kd.distillers.checksum import weights_checksum
from d2kd.runtime import RUNTIME
from detectron2.config import CfgNode

from ..architectures import architecture_class
from ..teacher import Teacher, read_teacher_config

#: Of how entries are made: another number makes those of earlier versions unknown.
VERSION = 1
#: Keys of DISTILL.TEACHER that say where the teacher lies, or when it runs, and change none of its numbers. All others
#: count, those that are not thought of yet included.
_WITHOUT_EFFECT = ("CONFIG_FILE", "WEIGHTS", "OPTS", "EVAL_FIRST", "EVERY", "STREAM")


def describe_collection(cfg: CfgNode, teacher: Teacher, taps: Sequence[str]) -> dict[str, Any]:
    """Returns all that the features of a teacher depend on beside the pixels, to be shown and to be compared.

    Args:
        cfg: of the student.
        teacher: with its weights.
        taps: that are kept together.
    """
    network = read_teacher_config(cfg, [])
    limit = architecture_class(network).SCORE_THRESHOLD
    ignored = {"MODEL.DEVICE", "MODEL.WEIGHTS", limit}
    keys = {key: value for key, value in leaves(network.MODEL, "MODEL.") if key not in ignored}
    return {
        "version": VERSION,
        "runtime": RUNTIME.name,
        "weights": weights_checksum(teacher.model.state_dict()),
        "architecture": network.MODEL.META_ARCHITECTURE,
        "network": _digest(json.dumps(keys, sort_keys=True, default=str).encode()),
        "arithmetic": describe_arithmetic(cfg, teacher),
        "taps": sorted(taps),
        "dtype": cfg.DISTILL.CACHE.DTYPE,
        "run": cfg.DISTILL.CACHE.RUN,
    }


def describe_arithmetic(cfg: CfgNode, teacher: Teacher) -> dict[str, Any]:
    """Returns what changes the numbers of a teacher whose weights stay: keys of DISTILL.TEACHER, channels, device."""
    node = {key: value for key, value in leaves(cfg.DISTILL.TEACHER) if key.partition(".")[0] not in _WITHOUT_EFFECT}
    device = next(teacher.model.parameters()).device.type
    tf32: dict[str, bool] = {}
    if device == "cuda":
        tf32 = {
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        }
    return {**node, "swap_channels": teacher.swap_channels, "device": device, **tf32}


def collection_name(described: dict[str, Any]) -> str:
    """Returns the name of what `describe_collection` has described, 16 hexadecimal digits."""
    return _digest(json.dumps(described, sort_keys=True, default=str).encode())[:16]


def image_key(image: Tensor, canvas: tuple[int, int], images: int, collection: str) -> str:
    """Returns the key of an image: of its pixels as the teacher gets them, so that an altered file, or another draw of
    the augmentation, is another image.

    Args:
        image: (C, H, W), on the CPU.
        canvas: height and width that it is padded to, in pixels.
        images: that the teacher gets together with it: the same sums are added up in another order among more.
        collection: that the entry belongs to; a file in the folder of another one is so found out.
    """
    shape = f"{collection} {image.dtype} {tuple(image.shape)} {canvas} {images} "
    digest = hashlib.blake2b(shape.encode(), digest_size=16)
    digest.update(image.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def blank_key(canvas: tuple[int, int], collection: str) -> str:
    """Returns the key of a canvas without an image."""
    return _digest(f"{collection} blank {canvas}".encode())


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
