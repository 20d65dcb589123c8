"""Features as they are kept: whole, in float16, or in 8 bits with a range per channel; and how far they are then off.

An entry is a safetensors file: any program that reads that format can look into it. `read_entry` takes the bytes apart
without copying them, so that a loading process hands one block of shared memory over for an image, not one a tap.
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

DTYPES = ("float32", "float16", "int8")
#: Of safetensors, for what is kept here.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
#: What stands behind a tap's name for what its numbers are multiplied by, and for the least of each channel.
_SCALE, _LEAST = "//scale", "//least"
#: In 8 bits, a channel has a range of two float32 beside a byte for each position: of up to so many positions float16
#: is the smaller one.
_FEW_POSITIONS = 8
#: float16 holds 2^15 with room to spare: the largest magnitude of a tap comes below it.
_LARGEST_EXPONENT = 15
#: Of a scale, so that float32 holds it.
_LEAST_EXPONENT = -100


class DamagedEntryError(ValueError):
    """Bytes that are no entry, not all of one, or those of another."""


class Entry(NamedTuple):
    """What is kept of one image, as it lies on the disk."""

    #: The whole file, (B,) uint8.
    data: Tensor
    #: Where each part lies in it, and what it is: safetensors' header.
    header: str


def encode(features: Mapping[str, Tensor], dtype: str, key: str) -> bytes:
    """Returns the file of an image's features.

    Args:
        features: of one image, by tap.
        dtype: of `DTYPES`. A feature that takes no more room as it is (bfloat16 under float16) is kept so.
        key: of the entry; read again, the file must have it.

    Raises:
        ValueError: a feature has numbers that are not finite.
    """
    parts: dict[str, Tensor] = {}
    for tap, feature in features.items():
        x = feature.detach().cpu().contiguous()
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError(f"the teacher's feature {tap} has numbers that are not finite")
        parts |= _encode_one(tap, x, dtype)
    about = {"key": key, "taps": json.dumps({tap: str(x.dtype).removeprefix("torch.") for tap, x in features.items()})}
    return bytes(save(parts, {**about, "checksum": _checksum(parts, about)}))


def read_entry(data: Tensor, key: str) -> Entry:
    """Returns the entry that a file holds.

    Args:
        data: its bytes, (B,) uint8.
        key: that it must have.

    Raises:
        DamagedEntryError: it is no entry, is truncated or altered, or has another key.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8].numpy().tobytes())
        if length > data.numel() - 8:
            raise ValueError("truncated")
        header = data[8 : 8 + length].numpy().tobytes().decode()
        entry = Entry(data, header)
        described = json.loads(header)
        about = described.pop("__metadata__")
        if max(part["data_offsets"][1] for part in described.values()) != data.numel() - 8 - length:
            raise ValueError("truncated")
        checksum = about.pop("checksum")
        if about["key"] != key or checksum != _checksum(_parts(entry), about):
            raise ValueError("altered")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, struct.error) as error:
        raise DamagedEntryError(str(error)) from error
    return entry


def decode(entry: Entry, device: torch.device) -> dict[str, Tensor]:
    """Returns the features of an entry by tap, in the types that the teacher gave them, on a device."""
    taps = json.loads(json.loads(entry.header)["__metadata__"]["taps"])
    stored = _parts(entry._replace(data=entry.data.to(device, non_blocking=True)))  # one transfer for all
    features = {}
    for tap, name in taps.items():
        x = stored[tap]
        if tap + _SCALE in stored:
            scale = stored[tap + _SCALE]
            x = x.float() * scale if tap + _LEAST not in stored else _from_codes(x, scale, stored[tap + _LEAST])
        features[tap] = x.to(getattr(torch, name))
    return features


def size_of(shape: tuple[int, ...], dtype: str) -> int:
    """Returns the bytes of a float32 feature of one image, (1, C, H, W) or (1, C), without those of the header."""
    numbers = 1
    for side in shape:
        numbers *= side
    channels = shape[1] if len(shape) > 1 else 1
    if dtype == "float32":
        return 4 * numbers
    if dtype == "int8" and numbers // channels > _FEW_POSITIONS:
        return numbers + 8 * channels
    return 2 * numbers + 4


def _encode_one(tap: str, x: Tensor, dtype: str) -> dict[str, Tensor]:
    if dtype == "float32" or not x.is_floating_point():
        return {tap: x}
    positions = x[0, 0].numel() if x.dim() > 1 and x.numel() else 1
    if dtype == "int8" and positions > _FEW_POSITIONS:
        codes, step, least = _to_codes(x.float())
        return {tap: codes, tap + _SCALE: step, tap + _LEAST: least}
    if x.dtype in (torch.float16, torch.bfloat16):
        return {tap: x}
    largest = x.abs().max().item() if x.numel() else 0.0
    # a power of two: dividing by it and multiplying again changes no number
    exponent = math.frexp(largest)[1] - _LARGEST_EXPONENT if largest > 0 else 0
    scale = 2.0 ** max(exponent, _LEAST_EXPONENT)
    return {tap: (x / scale).half(), tap + _SCALE: torch.tensor([scale], dtype=torch.float32)}


def _to_codes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """256 levels from the least to the largest number of each channel; codes int8, step and least (N, C, 1, ...)."""
    flat = x.flatten(2)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    least, largest = (value.reshape(shape) for value in (flat.amin(2), flat.amax(2)))
    step = (largest / 255 - least / 255).clamp(min=0)
    codes = ((x - least) / step.where(step > 0, 1.0)).round().clamp(0, 255)
    return (codes - 128).to(torch.int8), step, least


def _from_codes(codes: Tensor, step: Tensor, least: Tensor) -> Tensor:
    return (codes.float() + 128) * step + least


def _parts(entry: Entry) -> dict[str, Tensor]:
    """The stored tensors, as views into the file.

    Raises:
        ValueError: sizes do not go together.
    """
    described: dict[str, Any] = json.loads(entry.header)
    described.pop("__metadata__")
    start = entry.data.numel() - max(part["data_offsets"][1] for part in described.values())
    parts = {}
    for name, part in described.items():
        begin, end = part["data_offsets"]
        parts[name] = entry.data[start + begin : start + end].view(_TYPES[part["dtype"]]).view(part["shape"])
    return parts


def _checksum(parts: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Of names, shapes, types and bytes. It tells of damage, which is no attack: a CRC, the quickest there is."""
    value = zlib.crc32(json.dumps(dict(about), sort_keys=True).encode())
    for name in sorted(parts):
        x = parts[name]
        value = zlib.crc32(f"{name} {x.dtype} {tuple(x.shape)}".encode(), value)
        value = zlib.crc32(x.contiguous().flatten().view(torch.uint8).numpy().data, value)
    return f"{value:08x}"
