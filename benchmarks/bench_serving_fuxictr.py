"""What a request costs beside FuxiCTR's eager DIN of the same widths, in one run.

    python -m benchmarks.bench_serving_fuxictr --out benchmarks/results/serving_fuxictr.jsonl

Ours is the exported artifact, eager, as a program and as a package. Every row has a full history,
so that nobody computes padding. With FuxiCTR's weights copied in, logits must be the same before
anything is timed; experts, which FuxiCTR does not have, are ours of the same map besides.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn, Tensor

from benchmarks.bench_serving import CANDIDATES, Form, forms_of
from benchmarks.fuxictr_pairs.din import DINPair
from benchmarks.fuxictr_pairs.size import PLAIN, Size
from benchmarks.harness import append, environment, measure
from benchmarks.random_batches import draw
from torchrec_hilomoe.config import InjectionConfig
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import CTRModel
from torchrec_hilomoe.serving.inputs import InputLayout

SIZE = Size(
    embedding=16,
    attention=(64,),
    head=(256, 128),
    items=10**5,
    max_length=50,
    mean_length=50,
    batch_size=1024,
)
FORMS = ("eager", "program", "package")
EXPERTS = InjectionConfig(num_layers=3, num_experts=8, rank=4, sites=("head",), routing="row")


def ours(pair: DINPair, experts: InjectionConfig) -> CTRModel:
    """The pair's model, with its weights, in evaluation."""
    config = pair.config(experts)
    task = build_task(config.model, pair.size.stream.schema, torch.device("cpu"))
    pair.copy_weights(task)
    for site in sites_of(task).values():
        nn.init.normal_(site.expert_out, std=0.1)
    return task.eval().model


def main() -> None:
    """Run the benchmark."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", nargs="+", type=int, default=list(CANDIDATES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10.0, help="spent on a case")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pair = DINPair(SIZE)
    plain = ours(pair, PLAIN)
    layout = InputLayout(plain.sparse.schema)
    forms = {"plain": forms_of(plain, "fp32"), "experts": forms_of(ours(pair, EXPERTS), "fp32")}
    stamp = environment("cpu") | {"fuxictr": version("fuxictr")}
    for rows in args.candidates:
        with torch.inference_mode():
            for who, figures in measure(
                dict(contenders(pair, layout, forms, rows)), args.seconds, "cpu"
            ).items():
                append(args.out, [{"candidates": rows, "who": who, **asdict(figures), **stamp}])
                print(
                    f"{rows:>5} candidates {who:16s} p50 {figures.median_us:>8,.0f} us  "
                    f"p99 {figures.p99_us:>8,.0f} us  x{figures.ratio:5.2f}"
                )


def contenders(
    pair: DINPair, layout: InputLayout, forms: dict[str, dict[str, Form]], rows: int
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What is timed, by name, once it was seen to compute the same."""
    batch = draw(SIZE.stream, rows, torch.Generator().manual_seed(rows))
    theirs, inputs = pair.batch(batch), layout.of_batch(batch).arguments
    pair.theirs.eval()
    yield "fuxictr", lambda: pair.theirs(theirs)["y_pred"]
    for provider, form in itertools.product(forms, FORMS):
        call = partial(forms[provider][form], *inputs)
        if provider == "plain":
            pair.check_logits(call(), batch)
            pair.theirs.eval()
        yield f"{form}, {provider}", call


if __name__ == "__main__":
    main()
