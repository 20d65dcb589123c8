"""The path manager through which all files are opened, and `detectron2://` paths of published weights."""

import os
from typing import IO, Any
from urllib.parse import urlparse

from iopath.common import file_io
from iopath.common.file_io import PathHandler, get_cache_dir

__all__ = ["PathHandler", "PathManager"]

PathManager = file_io.PathManager()
"""Opens local paths, http(s):// and detectron2:// ones."""


class Detectron2Handler(PathHandler):
    """Resolves `detectron2://...`, the published Detectron2 weights.

    A file is looked up in the local cache (`$FVCORE_CACHE`, default `~/.torch/iopath_cache`), under the same
    path as on the server, and downloaded where it is missing.
    """

    PREFIX = "detectron2://"
    URL = "https://dl.fbaipublicfiles.com/detectron2/"

    def _get_supported_prefixes(self) -> list[str]:
        return [self.PREFIX]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        url = self.URL + path[len(self.PREFIX) :]
        cached = os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))
        if os.path.isfile(cached) and not force:
            return cached
        try:
            return PathManager.get_local_path(url, force=force, **kwargs)
        except (OSError, RuntimeError) as e:
            raise FileNotFoundError(
                f"{path} is not in the local cache and could not be downloaded ({type(e).__name__}: {e}). "
                f"Where the network is not reachable, fetch {url} elsewhere and store it as {cached}, "
                "or name a local file instead."
            ) from None

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> IO[Any]:
        local = self._get_local_path(path)
        return PathManager.open(local, mode, **kwargs)


for _handler in (file_io.HTTPURLHandler, file_io.OneDrivePathHandler, Detectron2Handler):
    PathManager.register_handler(_handler())
