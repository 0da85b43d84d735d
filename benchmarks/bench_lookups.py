"""What FBGEMM's lookups cost on this device: unpooled, as histories are, against pooled.

    python -m benchmarks.bench_lookups --out benchmarks/results/lookups.jsonl

The same ids of one table are looked up one vector an id, and as bags of one id each, which gives
the same vectors and the same updates: checked before anything is timed. Backward includes the fused
optimizer's step.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    PoolingMode,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from benchmarks.harness import append, environment, measure
from benchmarks.rounding import off_by

WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """``ids`` drawn evenly from ``rows``."""

    rows: int
    ids: int


CASES = [Case(rows=rows, ids=ids) for rows in (1_000, 1_000_000) for ids in (15_000, 200_000)]


def table(case: Case, mode: PoolingMode, device: str) -> SplitTableBatchedEmbeddingBagsCodegen:
    """One table under row-wise Adagrad."""
    location = EmbeddingLocation.HOST if device == "cpu" else EmbeddingLocation.DEVICE
    where = ComputeDevice.CPU if device == "cpu" else ComputeDevice.CUDA
    return SplitTableBatchedEmbeddingBagsCodegen(
        [(case.rows, WIDTH, location, where)],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.1,
        pooling_mode=mode,
    )


def calls(case: Case, device: str) -> dict[str, Callable[[], object]]:
    """A forward and backward pass of each, once their results have been found equal."""
    modes = {"pooled": PoolingMode.SUM, "unpooled": PoolingMode.NONE}
    tables = {name: table(case, mode, device) for name, mode in modes.items()}
    weights = torch.randn(case.rows, WIDTH, device=device)
    for one in tables.values():
        one.split_embedding_weights()[0].data.copy_(weights)
    ids = torch.randint(case.rows, (case.ids,), device=device)
    offsets = torch.arange(case.ids + 1, device=device)
    grad = torch.randn(case.ids, WIDTH, device=device)

    def step(one: SplitTableBatchedEmbeddingBagsCodegen) -> torch.Tensor:
        vectors = one(ids, offsets)
        vectors.backward(grad)
        return vectors.detach()

    first, second = (step(one) for one in tables.values())
    assert torch.equal(first, second)
    after = [one.split_embedding_weights()[0] for one in tables.values()]
    assert off_by(after[0], after[1], terms=case.ids) <= 1  # a row adds up no more gradients
    return {name: lambda one=one: step(one) for name, one in tables.items()}


def main() -> None:
    """Run the benchmark."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on a case")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    for case in CASES:
        for name, figures in measure(calls(case, args.device), args.seconds, args.device).items():
            print(
                f"{case.rows:>9,} rows {case.ids:>8,} ids {name:9s} {figures.median_us:>12,.0f} us "
                f"x{figures.ratio:7.1f} (iqr {figures.ratio_iqr:.1f})"
            )
            row = {**asdict(case), "provider": name, **asdict(figures)}
            append(args.out, [{**row, **environment(args.device)}])


if __name__ == "__main__":
    main()
