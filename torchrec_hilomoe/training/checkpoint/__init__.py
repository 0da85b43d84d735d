"""Checkpoints: whole or absent, summed, audited when loaded, never executed.

A checkpoint is a folder ``step_N`` with TorchRec's sharded state in DCP's format, the texts that
say what it is of, and ``progress.json``, which is written last and makes it whole.

    manifest.py  where a run stood, the files' checksums    storage.py  folders and files
    saver.py     writing, in the background                 state.py    the tensors, copied
    loading.py   reading: does it fit?                      reshard.py  tables in other columns
"""

from torchrec_hilomoe.training.checkpoint.loading import Checkpoint, Loaded, newest_sound, open
from torchrec_hilomoe.training.checkpoint.manifest import (
    Best,
    Brought,
    CheckpointError,
    Progress,
    RoutingDecision,
)
from torchrec_hilomoe.training.checkpoint.saver import Saved, Saver
from torchrec_hilomoe.training.checkpoint.storage import find, latest

__all__ = [
    "Best",
    "Brought",
    "Checkpoint",
    "CheckpointError",
    "Loaded",
    "Progress",
    "RoutingDecision",
    "Saved",
    "Saver",
    "find",
    "latest",
    "newest_sound",
    "open",
]
