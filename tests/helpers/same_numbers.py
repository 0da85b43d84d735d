"""Does a tree train to the same numbers as another?  For moves and renames, which change none.

    python tests/helpers/same_numbers.py record TREE numbers.json
    python tests/helpers/same_numbers.py compare TREE numbers.json

Every backbone, plain, with experts by row and with a shared router, on one rank and on two, is
trained for 30 steps by ``TREE/apps/train.py``; kept are the logged losses and a checksum of each
tensor of the checkpoint. Comparing wants the same losses to the last digit and the same tensors;
names may have changed, and are listed. Both runs need the same machine, since processors round
differently.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

BACKBONES = ("din", "dien", "bst", "transact", "interformer")
EXPERTS = {
    "plain": ["--model.hilomoe", "null"],
    "row": [],
    "sample": ["--model.hilomoe.routing", "sample", "--model.hilomoe.sites", "[all]"],
}
OPTIONS = ["--train.max_steps", "30", "--train.batch_size", "64", "--train.log_every", "1"]
OPTIONS += ["--checkpoint.every_steps", "30", "--data.train_rows", "4096"]
OPTIONS += ["--data.eval_rows", "2048", "--seed", "3"]
OPTIONS += ["--model.hilomoe.routing", "row", "--model.hilomoe.route_by", "null"]
LOSSES = ("step", "stage", "split", "auc", "logloss", "ne", "calibration", "auxiliary_loss")


def cases() -> Iterator[tuple[str, list[str], int]]:
    """Name, options and ranks of each run."""
    for ranks in (1, 2):
        for backbone in BACKBONES:
            for experts, options in EXPERTS.items():
                name = f"{backbone}-{experts}-{ranks}"
                yield name, ["--model.backbone", backbone, *options], ranks


def train(tree: Path, options: list[str], ranks: int) -> dict:
    """Train one case and return its losses and the checksums of its tensors."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
        command = [sys.executable, *(launcher if ranks > 1 else []), str(tree / "apps/train.py")]
        command += [*OPTIONS, *options, "--out_dir", folder]
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").open()]
        losses = [{name: line.get(name) for name in LOSSES} for line in lines]
        return {"losses": losses, "tensors": checksums(Path(folder) / "checkpoints/step_30")}


def checksums(checkpoint: Path) -> dict[str, str]:
    """Return a checksum of each tensor of a checkpoint that this machine has written itself."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        dcp_to_torch_save(checkpoint, whole)
        state = torch.load(whole, weights_only=False)
    found: dict[str, str] = {}

    def walk(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            raw = value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            shape = f"{tuple(value.shape)} {value.dtype} "
            found[name] = hashlib.sha256(shape.encode() + raw).hexdigest()

    walk(state, "")
    return found


def differences(was: dict, now: dict) -> list[str]:
    """Say what differs between a case's two runs; the first difference of each kind."""
    said = []
    if len(was["losses"]) != len(now["losses"]):
        said.append(f"{len(was['losses'])} lines of losses became {len(now['losses'])}")
    for before, after in zip(was["losses"], now["losses"], strict=False):
        if before != after:
            said.append(f"losses: {before} became {after}")
            break
    gone = Counter(was["tensors"].values()) - Counter(now["tensors"].values())
    said += [f"tensor {n} is gone" for n, s in was["tensors"].items() if s in gone][:3]
    return said


def main() -> int:
    """Record or compare; return 1 if a number differs."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["record", "compare"])
    parser.add_argument("tree", type=Path, help="a checkout")
    parser.add_argument("numbers", type=Path, help="JSON file, written or compared with")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    args = parser.parse_args()
    known = json.loads(args.numbers.read_text()) if args.numbers.exists() else {}
    wrong = seen = 0
    for name, options, ranks in cases():
        if args.only not in name or (args.what == "record" and name in known):
            continue
        found = train(args.tree.resolve(), options, ranks)
        if args.what == "record":
            known[name] = found
            args.numbers.write_text(json.dumps(known))
            print(f"{name}: {len(found['losses'])} lines, {len(found['tensors'])} tensors")
            continue
        said = differences(known[name], found)
        names = known[name]["tensors"].keys() ^ found["tensors"].keys()
        seen, wrong = seen + 1, wrong + bool(said)
        renamed = f" ({len(names)} names changed, such as {min(names)})" if names else ""
        print(f"{name}: {'; '.join(said) or 'same'}{renamed}", flush=True)
    if args.what == "compare":
        print(f"{seen - wrong} of {seen} cases have the same numbers")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
