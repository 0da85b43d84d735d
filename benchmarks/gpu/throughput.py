"""Training throughput by the product's own benchmark: phases, peak memory, share of the peak."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.bench_train_throughput import main
from benchmarks.gpu.cases import Case, Setting
from benchmarks.harness import read_lines

__all__ = ["cases"]

BACKBONES = ("bst", "din", "interformer", "transact", "dien")
BATCH = 8192
SWEEPS = ("base", "plain")


def cases(setting: Setting) -> list[Case]:
    """With experts and without, in bfloat16 first."""
    backbones = BACKBONES[:1] if setting.rehearsal else BACKBONES
    wanted = [(name, "bf16", BATCH) for name in backbones]
    if not setting.rehearsal:
        wanted += [("bst", "fp32", BATCH), ("bst", "bf16", 1024), ("bst", "bf16", 65536)]
    return [
        Case(
            name=f"{backbone} {precision} batch {batch} {sweep}",
            run=partial(_run, setting, backbone, precision, batch, sweep),
            seconds=90,
        )
        for backbone, precision, batch in wanted
        for sweep in SWEEPS
    ]


def _run(
    setting: Setting, backbone: str, precision: str, batch: int, sweep: str
) -> Mapping[str, Any]:
    out = setting.scratch / f"throughput-{backbone}-{precision}-{batch}-{sweep}.jsonl"
    out.unlink(missing_ok=True)
    options = ["--model.backbone", backbone, "--train.precision", precision]
    options += ["--train.device", setting.device, "--sweep", sweep]
    if setting.rehearsal:
        options += ["--quick"]
    else:
        options += ["--train.batch_size", str(batch), "--rows", "1e6", "--seconds", "2"]
        options += ["--model.embedding_dim", "64", "--threads", "8"]
    main([*options, "--out", str(out)])
    (line,) = read_lines(out)
    phases = " ".join(f"{name} {took:.1f}" for name, took in line["phase_ms"].items())
    say = (
        f"{line['samples_per_second']:,.0f} samples/s (spread {line['spread']:.0%}), step p50 "
        f"{line['step_ms']['p50']:.1f} ms; ms in order: {phases}; peak "
        f"{line['peak_bytes'] / 2**20:.0f} MiB, {line['flops_share']:.1%} of the peak FLOP/s"
    )
    return {"say": say, **line}
