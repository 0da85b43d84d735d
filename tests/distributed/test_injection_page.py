"""The loop that ``docs/injection.md`` shows, as torchrun starts it on two ranks."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.helpers.processes import ROOT, run_ranks
from tests.helpers.sharded import flat

PAGE = (ROOT / "docs" / "injection.md").read_text()
(LOOP,) = [
    code
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    if "DistributedModelParallel(" in code
]


def run(folder: Path) -> None:
    os.chdir(folder)
    exec(compile(LOOP, "docs/injection.md", "exec"), {"__name__": "__main__"})


def whole(folder: Path, step: int) -> dict[str, Any]:
    """Every tensor of a checkpoint that this machine has written itself."""
    path = folder / "whole.pt"
    dcp_to_torch_save(folder / "checkpoints" / str(step), path)
    return flat(torch.load(path, weights_only=False))


@pytest.mark.slow
def test_it_trains_and_goes_on_with_the_same_bits_and_is_short(tmp_path):
    assert LOOP.count("\n") < 80
    run_ranks(run, 2, tmp_path, joined=False)
    want, before = whole(tmp_path, 40), whole(tmp_path, 20)
    shutil.rmtree(tmp_path / "checkpoints" / "40")
    run_ranks(run, 2, tmp_path, joined=False)
    got = whole(tmp_path, 40)
    assert got.keys() == want.keys() == before.keys()
    for name, value in want.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(got[name], value), name
    moved = [
        name
        for name, value in want.items()
        if isinstance(value, torch.Tensor) and not torch.equal(value, before[name])
    ]
    for part in ("expert_out", "hilomoe_router", "dense_arch", "embedding_bags.hour"):
        assert any(part in name for name in moved), part
