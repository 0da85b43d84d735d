"""A store of objects in memory: what a site would register for its own, in a few lines."""

import io
import tempfile
from pathlib import Path
from typing import Any, IO

from iopath.common.file_io import PathHandler

__all__ = ["MemoryStore"]


class MemoryStore(PathHandler):
    """Objects by their path; folders are only what paths have in common.

    Attributes:
        objects: Path to content.
    """

    def __init__(self) -> None:
        super().__init__()
        self.objects: dict[str, bytes] = {}
        self._folders: set[str] = set()

    def _get_supported_prefixes(self) -> list[str]:
        return ["memory://"]

    def _open(self, path: str, mode: str = "r", buffering: int = -1, **kwargs: Any) -> IO[Any]:
        if "r" in mode:
            if path not in self.objects:
                raise FileNotFoundError(path)
            raw: IO[bytes] = io.BytesIO(self.objects[path])
        else:
            raw = _Upload(self.objects, path)
        encoding = kwargs.get("encoding")
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding=encoding)

    def _exists(self, path: str, **kwargs: Any) -> bool:
        return self._isfile(path) or self._isdir(path)

    def _isfile(self, path: str, **kwargs: Any) -> bool:
        return path in self.objects

    def _isdir(self, path: str, **kwargs: Any) -> bool:
        folder = path.rstrip("/")
        return folder in self._folders or any(key.startswith(f"{folder}/") for key in self.objects)

    def _ls(self, path: str, **kwargs: Any) -> list[str]:
        start = f"{path.rstrip('/')}/"
        names = {*self.objects, *self._folders}
        return sorted({n.removeprefix(start).split("/")[0] for n in names if n.startswith(start)})

    def _mkdirs(self, path: str, **kwargs: Any) -> None:
        self._folders.add(path.rstrip("/"))

    def _rm(self, path: str, **kwargs: Any) -> None:
        del self.objects[path]

    def _mv(self, src_path: str, dst_path: str, **kwargs: Any) -> bool:
        moved = [key for key in self.objects if key == src_path or key.startswith(f"{src_path}/")]
        for key in moved:
            self.objects[dst_path + key.removeprefix(src_path)] = self.objects.pop(key)
        gone = {key for key in self._folders if key == src_path or key.startswith(f"{src_path}/")}
        self._folders -= gone
        return bool(moved)

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        local = Path(tempfile.mkdtemp()) / Path(path).name
        local.write_bytes(self.objects[path])
        return str(local)


class _Upload(io.BytesIO):
    """Becomes an object once it is closed."""

    def __init__(self, objects: dict[str, bytes], path: str) -> None:
        super().__init__()
        self._objects = objects
        self._path = path

    def close(self) -> None:
        if not self.closed:
            self._objects[self._path] = self.getvalue()
        super().close()
