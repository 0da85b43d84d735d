"""Training of each backbone: the first step's gradients, 200 steps of each pipeline, and a kill.

The first step's dense gradients may err by at most twice what the CPU's do in the same precision,
both compared with float64. The loss after 200 steps must lie where a further seed on the CPU would:
within Student's interval of a few seeds. A run that was killed and resumed must end with the bits
of one that was not, where two that were not end with equal bits themselves.
"""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from scipy import stats
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.overrides import TorchFunctionMode

from benchmarks.driving import ALL, assembled, BY_ROW, fill_table
from benchmarks.gpu.cases import Case, Setting
from benchmarks.random_batches import click_log, draw_batches, Stream
from tests.helpers.models import cancelled, dense_parameters, in_memory
from tests.helpers.rounding import assert_as_exact_as, assert_within, rounding_of
from tests.helpers.runs import read_tensors
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.config import InjectionConfig, ModelConfig, RunConfig, TrainConfig
from torchrec_hilomoe.data.batch import CTRBatch
from torchrec_hilomoe.embeddings.features import SequenceFeatures
from torchrec_hilomoe.hilomoe import set_auxiliary_loss_scale
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.runtime.distributed import init_distributed
from torchrec_hilomoe.training.optimizers.precision import DTYPES, Precision, use_precision
from torchrec_hilomoe.training.run import run_training
from torchrec_hilomoe.training.stages.staging import enter_stage

__all__ = ["BACKBONES", "PRECISIONS", "cases", "first_step", "kill_and_resume"]

ROOT = Path(__file__).parents[2]
BACKBONES = ("bst", "din", "dien", "transact", "interformer")
SEEDS = (0, 1, 2, 3)
LEVEL = 0.999  # of the interval in which a further seed's loss lies
ROWS, LENGTH = 64, 20  # of the first step's batch
# Every expert is chosen: a choice that hangs on a rounding would not be a fair comparison.
EXPERTS = InjectionConfig(num_layers=2, num_experts=4, top_k=4, sites=("all",), balance_weight=0.1)
SCALE = 256.0  # of float16's loss
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "fp16")


def cases(setting: Setting) -> list[Case]:
    """A lane a backbone: its first step, then ``sparse_dist``, then the other pipelines."""
    found = []
    backbones = BACKBONES[:1] if setting.rehearsal else BACKBONES
    for name in backbones:
        lane = name
        for precision in PRECISIONS[: 2 if setting.rehearsal else None]:
            run = partial(first_step, name, precision, setting.device)
            found.append(Case(name=f"{name} first step {precision}", run=run, lane=lane))
        for pipeline, precision in _variants(setting):
            run = partial(_train, name, pipeline, precision, setting)
            title = f"{name} {pipeline} {precision}"
            found.append(Case(name=title, run=run, lane=lane, seconds=150))
    for name in backbones[:2]:
        run = partial(kill_and_resume, name, setting)
        found.append(Case(name=f"{name} killed and resumed", run=run, lane=f"kill {name}"))
    return [replace(case, seconds=150) for case in found]


def _variants(setting: Setting) -> list[tuple[str, str]]:
    if setting.rehearsal:
        return [("sparse_dist", "bf16"), ("base", "fp32")]
    return [
        ("sparse_dist", "bf16"),
        ("sparse_dist", "fp32"),
        ("prefetch", "bf16"),
        ("semi_sync", "bf16"),
        ("sparse_dist", "fp16"),
        ("base", "bf16"),
        ("prefetch", "fp16"),
        ("semi_sync", "fp16"),
    ]


def first_step(backbone: str, precision: Precision, device: str) -> Mapping[str, Any]:
    """Compare the first step's dense gradients and loss with the CPU's."""
    model = ModelConfig(backbone=backbone, batch_norm=True, hilomoe=EXPERTS)
    place = "cuda" if device == "cuda" else "cpu"
    train = TrainConfig(batch_size=ROWS, precision=precision, device=place)
    config = RunConfig(model=model, train=train)
    stream = Stream(schema=click_log(300, LENGTH), mean_length=LENGTH / 2)
    host = torch.device("cpu")
    (batch,) = draw_batches(stream, 1, batch_size=ROWS, rank=0, ranks=1, device=host)
    torch.manual_seed(1)
    task = in_memory(model, stream.schema)
    with torch.no_grad():  # what starts at zero would hide errors in the rest
        for name, parameter in task.named_parameters():
            if name.endswith("expert_out"):
                parameter.normal_(std=0.3)
    exact_task = deepcopy(task).double()
    exact_task.model.sparse.register_forward_hook(
        lambda _, __, found: _doubled(cast(SequenceFeatures, found))
    )
    dtype = DTYPES[precision] or torch.float32
    doubled = replace(batch, dense=batch.dense.double())
    with _JaggedInDouble():
        exact = _gradients(exact_task, doubled)
        carried = {}
        if dtype == torch.float32:  # 16 bits round on the way, too: twice the CPU's error is theirs
            carried = rounding_of(_gradients, exact_task, doubled, dtype=dtype, terms=ROWS * LENGTH)
    plain_task = deepcopy(task)
    use_precision(plain_task, precision, host)
    plain = _gradients(plain_task, batch)
    with init_distributed(device) as context:
        assembly = assembled(config, stream.schema, context)
        whole = task.state_dict()
        with torch.no_grad():
            for name, value in assembly.model.state_dict().items():
                if isinstance(value, ShardedTensor):
                    fill_table(value, whole[name])
                else:
                    value.copy_(whole[name])
        wrapped = enter_stage(assembly.model, ALL)
        inner = wrapped.module
        assert isinstance(inner, TrainTask)
        if precision == "fp16":  # the first scale is one that a run backs off from
            inner.loss_scale = SCALE
            set_auxiliary_loss_scale(inner, SCALE)
        loss, _ = wrapped(batch.to(context.device))
        loss.backward()
        tables = set(inner.model.sparse.tables)
        got = {
            name: p.grad.detach().cpu() / inner.loss_scale
            for name, p in inner.named_parameters()
            if p not in tables and p.grad is not None
        }
        got = {name.replace("_dmp_wrapped_module.", ""): of for name, of in got.items()}
        got["loss"] = (loss.detach() / inner.loss_scale).cpu()
    noise = cancelled(task)
    compared = exact.keys() - noise
    assert compared <= got.keys(), f"without a gradient: {sorted(compared - got.keys())}"
    got, plain, exact = ({name: of[name] for name in compared} for of in (got, plain, exact))
    if carried:  # what cancels to nothing errs by its terms, which are as large as other results
        units = torch.finfo(dtype).eps * max(of.abs().max().item() for of in exact.values())
        errors = {name: (plain[name] - exact[name]).abs().max().item() for name in compared}
        allowed = {name: carried[name] + 2 * errors[name] + units for name in compared}
        assert_within(got, exact, allowed)
    else:
        assert_as_exact_as(got, plain, exact, dtype, ROWS * LENGTH)
    largest = max(exact[name].norm().item() for name in compared)
    worst = max(
        ((got[name].double() - exact[name]).norm() / exact[name].norm()).item()
        for name in compared
        if exact[name].norm() > largest / 1000
    )
    return {
        "say": f"{len(compared)} gradients as exact as the CPU's; the worst is off by {worst:.1e}",
        "worst_relative_error": worst,
    }


def _doubled(features: SequenceFeatures) -> SequenceFeatures:
    """TorchRec's pooled vectors are float32, whatever the table is; of one id they are exact."""
    histories = [
        replace(of, events=of.events.double(), target=of.target.double())
        for of in features.histories
    ]
    return replace(
        features,
        candidate=features.candidate.double(),
        context=features.context.double(),
        histories=tuple(histories),
    )


class _JaggedInDouble(TorchFunctionMode):
    """FBGEMM's jagged operators by plain indexing, since they refuse float64 on a CPU."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See the class."""
        name = str(func)
        if "jagged_to_padded_dense" in name or "dense_to_jagged" in name:
            values, (offsets,), size, *_ = args
            lengths = offsets.diff()
            row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
            place = torch.arange(int(offsets[-1])) - offsets[row]
            if "dense_to_jagged" in name:
                return values[row, place], offsets
            padded = values.new_zeros(len(lengths), size[0], values.shape[1])
            return padded.index_put((row, place), values)
        return func(*args, **(kwargs or {}))


def _gradients(task: TrainTask, batch: CTRBatch) -> dict[str, Tensor]:
    loss, _ = task(batch)
    loss.backward()
    found = {n: p.grad.detach() for n, p in dense_parameters(task).items() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def _train(backbone: str, pipeline: str, precision: str, setting: Setting) -> Mapping[str, Any]:
    losses = _losses_of_seeds(backbone, setting, pipeline == "semi_sync")
    own = [f"--train.pipeline={pipeline}", f"--train.precision={precision}"]
    if pipeline == "prefetch":  # it fills caches of tables that are in the host's memory
        own += ['--sharding.tables={"item": {"kernel": "fused_uvm_caching"}}']
    folder = setting.scratch / f"{backbone}-{pipeline}-{precision}"
    summary = _run(folder, backbone, setting, setting.device, 100, own, pipeline == "semi_sync")
    loss = summary["test"]["logloss"]
    mean, deviation = statistics.mean(losses), statistics.stdev(losses)
    students = float(stats.t.ppf((1 + LEVEL) / 2, len(losses) - 1))
    reach = students * deviation * math.sqrt(1 + 1 / len(losses))
    say = (
        f"log loss {loss:.5f}; seeds on the CPU {min(losses):.5f} to {max(losses):.5f}, a further "
        f"one lies in {mean:.5f} +- {reach:.5f}; {summary['samples_per_second']:,.0f} samples/s"
    )
    assert abs(loss - mean) <= reach, say
    return {"say": say, "logloss": loss, "auc": summary["test"]["auc"], "of_seeds": list(losses)}


@cache
def _losses_of_seeds(backbone: str, setting: Setting, no_frozen: bool) -> tuple[float, ...]:
    """The CPU's, in single precision."""
    found = []
    for seed in SEEDS[: 2 if setting.rehearsal else None]:
        folder = setting.scratch / f"{backbone}-cpu-{seed}-{no_frozen}"
        found.append(_run(folder, backbone, setting, "cpu", seed, [], no_frozen)["test"]["logloss"])
    return tuple(found)


def _run(
    folder: Path,
    backbone: str,
    setting: Setting,
    device: str,
    seed: int,
    options: list[str],
    no_frozen: bool,
) -> Mapping[str, Any]:
    shutil.rmtree(folder, ignore_errors=True)
    frozen = ["--train.frozen_share=0"] if no_frozen else []
    argv = [*_options(backbone, setting), f"--train.device={device}", f"--seed={seed}"]
    parsed = parse_run([*argv, *frozen, *options, f"--out_dir={folder}"])
    with init_distributed(device) as context:
        run_training(parsed, context)
    found = json.loads((folder / "summary.json").read_text())
    shutil.rmtree(folder)
    return found


def _options(backbone: str, setting: Setting) -> list[str]:
    steps, rows = (12, 4096) if setting.rehearsal else (200, 65536)
    return [
        f"--model.backbone={backbone}",
        f"--train.max_steps={steps}",
        f"--train.batch_size={64 if setting.rehearsal else 256}",
        f"--data.train_rows={rows}",
        f"--data.eval_rows={512 if setting.rehearsal else 4096}",
        "--train.warmup_steps=20",
        "--train.learning_rate=0.003",
        *BY_ROW,
    ]


def kill_and_resume(backbone: str, setting: Setting) -> Mapping[str, Any]:
    """Kill a run after its first checkpoint, resume it, and compare its end with whole runs'."""
    base = setting.scratch / f"{backbone}-kill"
    shutil.rmtree(base, ignore_errors=True)
    steps = 12 if setting.rehearsal else 60
    middle = steps // 2
    argv = [sys.executable, "apps/train.py", *_options(backbone, setting)]
    argv += [f"--train.max_steps={steps}", f"--train.device={setting.device}"]
    argv += [f"--checkpoint.every_steps={middle}", "--train.log_every=1"]

    def start(name: str) -> subprocess.Popen[str]:
        log = (base / f"{name}.log").open("a")
        return subprocess.Popen(
            [*argv, f"--out_dir={base / name}"], cwd=ROOT, stdout=log, stderr=log, text=True
        )

    base.mkdir(parents=True)
    whole, twin, killed = (start(name) for name in ("whole", "twin", "killed"))
    seen = base / "killed" / "checkpoints" / f"step_{middle}" / "complete.json"
    folder = seen.parent
    while killed.poll() is None and not folder.exists():
        time.sleep(0.01)
    ended_before = killed.poll() is not None
    if not ended_before:
        os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    codes = {"whole": whole.wait(), "twin": twin.wait(), "resumed": start("killed").wait()}
    logs = {name: (base / f"{name}.log").read_text()[-600:] for name in ("whole", "killed")}
    assert not any(codes.values()), f"{codes}: {logs}"
    last = f"step_{steps}"
    ends = {
        name: read_tensors(base / name / "checkpoints" / last)
        for name in ("whole", "twin", "killed")
    }
    of_whole = ends["whole"]

    def different(name: str) -> list[str]:
        assert ends[name].keys() == of_whole.keys()
        return [key for key, value in ends[name].items() if not torch.equal(value, of_whole[key])]

    between_twins, after_kill = different("twin"), different("killed")
    figures = {
        "tensors": len(of_whole),
        "different_without": len(between_twins),
        "different_resumed": len(after_kill),
        "ended_before_the_kill": ended_before,
    }
    resumed = "resumed" in (base / "killed.log").read_text()
    figures["resumed"] = resumed
    say = (
        f"{len(of_whole)} tensors; a resumed run differs in {len(after_kill)}, a second whole run "
        f"in {len(between_twins)}; was killed and resumed: {resumed and not ended_before}"
    )
    assert not after_kill or between_twins, f"{say}: {after_kill[:5]}"
    return {"say": say, **figures}
