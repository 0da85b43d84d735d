"""A checkpoint of an earlier version of the package, under this one's names.

    python -m torchrec_hilomoe.convert runs/old/checkpoints/step_900 runs/new/checkpoints/step_900

A router that sites share once lived in the first of them, as ``SITE.router``; it is a module of the
model now, ``hilomoe_router``. The candidate's tables once were in a collection of their own; where
data has no histories, they are among the pooled ones now. Nothing but names changes: DCP's index
is rewritten, the files that hold the tensors are copied byte for byte, and compared with their
checksums on the way.
"""

import argparse
import pickle
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from torchrec_hilomoe.runtime.paths import open_binary, path_manager
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import CheckpointError
from torchrec_hilomoe.training.checkpoint.manifest import read_manifest, rewrite_manifest
from torchrec_hilomoe.training.checkpoint.storage import CHUNK, IndexUnpickler, Store

__all__ = ["convert_checkpoint", "main"]

INDEX = ".metadata"
OLD_ROUTER = re.compile(r"\bbackbone\.(?P<site>.+?)\.router\.(?=(expert_keys|query_proj)\b)")
CHOICES = "choices.model.backbone."
APART, POOLED = ".sparse.unpooled.embeddings.", ".sparse.pooled.embedding_bags."


def convert_checkpoint(old: str, new: str) -> dict[str, str]:
    """Write the checkpoint ``old`` to the folder ``new`` under this version's names.

    Args:
        old: A folder ``step_N``; not changed.
        new: A folder that does not exist yet, or is empty.

    Returns:
        Each name that changed, and what it became.

    Raises:
        CheckpointError: If there is no checkpoint, it is damaged, it has no name that changed, two
            of its tables would have one name, or something is at ``new`` already.
    """
    files = read_manifest(old).files
    if path_manager.exists(new) and path_manager.ls(new):
        raise CheckpointError(f"{new} exists already. Give the path of a folder to be made.")
    with open_binary(f"{old}/{INDEX}") as source:
        metadata = IndexUnpickler(source).load()
    names = _new_names(metadata.state_dict_metadata)
    if not checkpoint.open(old).schema.sequences:
        names = _in_one_collection(old, names)
    if all(name == to for name, to in names.items()):
        raise CheckpointError(
            f"checkpoint {old} has no name that changed, so it can be loaded as it is."
        )
    path_manager.mkdirs(new)
    store = Store()
    for name, expected in files.items():
        with (
            open_binary(f"{old}/{name}") as source,
            store.create_stream(f"{new}/{name}", "wb") as sink,
        ):
            while chunk := source.read(CHUNK):
                sink.write(chunk)
        if store.checksums[name] != expected:
            raise CheckpointError(
                f"checkpoint {old} is damaged: {name} is not what was written. "
                "Convert an older one."
            )
    with store.create_stream(f"{new}/{INDEX}", "wb") as sink:
        sink.write(pickle.dumps(_renamed(metadata, names)))
    rewrite_manifest(old, new, {name: store.checksums[name] for name in files})
    return {name: to for name, to in names.items() if to != name}


def _new_names(names: Iterable[str]) -> dict[str, str]:
    """Every name that stays, and its new form.

    Counts of choices are kept once a router, where there was a copy for each site.
    """
    names = list(names)
    owners = {found["site"] for name in names if (found := OLD_ROUTER.search(name))}
    found = {}
    for name in names:
        if owners and name.startswith(CHOICES):
            site, _, rank = name.removeprefix(CHOICES).rpartition(".")
            if site in owners:
                found[name] = f"{CHOICES}hilomoe_router.{rank}"
        else:
            found[name] = OLD_ROUTER.sub("backbone.hilomoe_router.", name)
    return found


def _in_one_collection(old: str, names: Mapping[str, str]) -> dict[str, str]:
    """The same, with the candidate's tables among the pooled ones.

    Raises:
        CheckpointError: If a table is among them already, which both looked up.
    """
    found = {name: to.replace(APART, POOLED) for name, to in names.items()}
    twice = [name for name, to in found.items() if to != names[name] and to in names]
    if twice:
        raise CheckpointError(
            f"checkpoint {old} has tables twice, of the candidate and of pooled features, which "
            f"are one now: {', '.join(twice)}. Train anew."
        )
    return found


def _renamed(metadata: Metadata, names: Mapping[str, str]) -> Metadata:
    def of(entries: Mapping[str, Any]) -> dict[str, Any]:
        return {names[name]: entry for name, entry in entries.items() if name in names}

    return replace(
        metadata,
        state_dict_metadata=of(metadata.state_dict_metadata),
        planner_data={name: (name,) for name in of(metadata.planner_data or {})},
        storage_data={
            replace(index, fqn=names[index.fqn]): place
            for index, place in metadata.storage_data.items()
            if index.fqn in names
        },
    )


def main() -> int:
    """Convert the checkpoint of the command line, and list what was renamed."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m torchrec_hilomoe.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("old", help="folder step_N of the checkpoint; it is not changed")
    parser.add_argument("new", help="folder to write, such as checkpoints/step_N of a new run")
    given = parser.parse_args()
    try:
        renamed = convert_checkpoint(given.old.rstrip("/"), given.new.rstrip("/"))
    except (CheckpointError, OSError, pickle.UnpicklingError) as error:
        parser.error(str(error))
    for name, to in renamed.items():
        sys.stdout.write(f"{name} -> {to}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
