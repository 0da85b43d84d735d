"""DCP's index of a checkpoint, unpickled from a closed list of classes: nothing is executed."""

import pickle
from enum import Enum
from typing import Any

import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata

from torchrec_hilomoe.training.checkpoint.storage import Store

__all__ = ["IndexUnpickler", "Reader"]

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


class Reader(dcp.FileSystemReader):
    """DCP's reader on the package's ``PathManager``, with a safe index.

    Args:
        path: The checkpoint.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fs = Store()
        self.path = self.fs.init_path(path)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index.

        Raises:
            pickle.UnpicklingError: If it is garbled, or names what it may not.
        """
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as source:
            try:
                metadata = IndexUnpickler(source).load()
            except (ValueError, LookupError, TypeError, AttributeError, EOFError) as error:
                raise pickle.UnpicklingError(f"the index is garbled: {error!r}") from error
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"the index is a {type(metadata).__name__}")
        if metadata.storage_meta is None:
            metadata.storage_meta = dcp.metadata.StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _enum_member(kind: Any, name: str) -> Enum:
    """Stand in for ``getattr`` in an index, where it may do nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"the index asks for {name!r} of {kind!r}")
    return kind[name]


class IndexUnpickler(pickle.Unpickler):
    """Makes data only: exact names, because a dotted one could reach any function through them."""

    ALLOWED = frozenset(
        {("torch.distributed.checkpoint.metadata", name) for name in dcp.metadata.__all__}
        | {
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
        }
        | {("torch", str(dtype).rpartition(".")[2]) for dtype in DTYPES}
    )

    def find_class(self, module: str, name: str) -> Any:
        """Return a class of the list."""
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _enum_member  # how Python before 3.11.4 pickles one
        raise pickle.UnpicklingError(f"the index names {module}.{name}, which is not allowed")
