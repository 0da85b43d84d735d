"""Checkpoints: whole or absent, summed, audited when loaded, never executed.

A checkpoint is a folder ``step_N`` with TorchRec's sharded state in DCP's format, the texts that
say what it is of, and ``progress.json``, which is written last and makes it whole.

    marker.py   where a run stood, and the sums of the files      storage.py  folders and files
    saver.py    writing, in the background                        state.py    the tensors, copied
    loading.py  reading    audit.py  does it fit?                 index.py    DCP's index, safely
    recut.py    tables cut into other columns
"""

from torchrec_hilomoe.training.checkpoint.audit import audit
from torchrec_hilomoe.training.checkpoint.errors import CheckpointError
from torchrec_hilomoe.training.checkpoint.index import Reader
from torchrec_hilomoe.training.checkpoint.loading import check_schema, load, read_document
from torchrec_hilomoe.training.checkpoint.marker import Best, Progress, read_progress
from torchrec_hilomoe.training.checkpoint.saver import Saved, Saver
from torchrec_hilomoe.training.checkpoint.state import OpenWindow
from torchrec_hilomoe.training.checkpoint.storage import latest

__all__ = [
    "Best",
    "CheckpointError",
    "OpenWindow",
    "Progress",
    "Reader",
    "Saved",
    "Saver",
    "audit",
    "check_schema",
    "latest",
    "load",
    "read_document",
    "read_progress",
]
