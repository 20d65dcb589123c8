"""Features of a teacher on the disk: what they belong to, how they are kept, and where."""

from . import keys  # noqa: F401  (declares DISTILL.CACHE)
from .cache import FOUND, GB, FeatureCache, FeatureReader, Found, Prefetch, read_about, require_folder
from .canvas import PaddingError, paste, without_images
from .encoding import DTYPES, DamagedEntryError, Entry, decode, encode, read_entry, size_of
from .identity import collection_name, describe_arithmetic, describe_collection, image_key
from .store import ABOUT, FRESH, FeatureStore, StoredFile

__all__ = [
    "ABOUT",
    "DTYPES",
    "FOUND",
    "FRESH",
    "GB",
    "DamagedEntryError",
    "Entry",
    "FeatureCache",
    "FeatureReader",
    "FeatureStore",
    "Found",
    "PaddingError",
    "Prefetch",
    "StoredFile",
    "collection_name",
    "decode",
    "describe_arithmetic",
    "describe_collection",
    "encode",
    "image_key",
    "paste",
    "read_about",
    "read_entry",
    "require_folder",
    "size_of",
    "without_images",
]
