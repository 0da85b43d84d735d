"""What a request costs: eager, as a program of torch.export, and compiled by AOTInductor.

The form ``request`` is the program that computes one user's histories once; others take them for
each candidate anew.

    python -m benchmarks.bench_serving --out benchmarks/results/serving.jsonl

A request is one user and some candidates, on generated data with the sizes of the recipe
``bst-synthetic``; DLRM has experts on all of its maps, the others on their heads. Each model with
experts is timed in turns with the same one without, after its logits were found equal to the eager
model's. A minute of compiling comes before each model's figures.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn, Tensor

from benchmarks.driving import BY_ROW
from benchmarks.harness import append, environment, measure
from benchmarks.rounding import off_by
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.data.decode import decode_block
from torchrec_hilomoe.data.synthetic import SyntheticSource
from torchrec_hilomoe.hilomoe.inject import sites_of
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.models.train_task import CTRModel
from torchrec_hilomoe.serving.artifact import Artifact, PROGRAM_FILE, REQUEST_FILE
from torchrec_hilomoe.serving.export import export_model, ExportOptions
from torchrec_hilomoe.serving.inputs import (
    InputLayout,
    ProgramInputs,
    RequestInputs,
    RequestLayout,
)
from torchrec_hilomoe.serving.model import ServedModel
from torchrec_hilomoe.serving.package import load_package
from torchrec_hilomoe.serving.program import load_program, load_request
from torchrec_hilomoe.serving.tables import Precision
from torchrec_hilomoe.training.inputs import schema_of

Form = Callable[..., Tensor]
MODELS = {"bst": "[head]", "din": "[head]", "dlrm": "[all]"}
CANDIDATES = (1, 10, 200, 1000)
FORMS = ("eager", "program", "request", "package")
TERMS = 512  # of the longest sum: no map is wider


def ranker(backbone: str, provider: str) -> CTRModel:
    """A model as a run has it, with experts that say something."""
    argv = ["--config", "bst-synthetic", f"--model.backbone={backbone}"]
    if provider == "plain":
        argv.append("--model.hilomoe=null")
    else:
        argv.extend([f"--model.hilomoe.sites={MODELS[backbone]}", *BY_ROW])
    config = parse_run(argv).config
    torch.manual_seed(0)
    task = build_task(config.model, schema_of(config), torch.device("cpu"))
    for site in sites_of(task).values():
        nn.init.normal_(site.expert_out, std=0.1)
    return task.model


def forms_of(model: CTRModel, tables: Precision) -> dict[str, Form]:
    """The ways to compute a model, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model"
        export_model(model, path, options=ExportOptions(tables=tables, package=True))
        artifact = Artifact(path)
        program = load_program(f"{path}/{PROGRAM_FILE}")
        package = load_package(artifact)
        request = load_request(f"{path}/{REQUEST_FILE}", program)
    eager = ServedModel(model, tables)
    return {"eager": eager, "program": program, "request": request, "package": package}


def request(layout: InputLayout, candidates: int) -> dict[str, ProgramInputs | RequestInputs]:
    """One user and some candidates, as each form takes them."""
    source = SyntheticSource(world="composed", split="test", rows=max(CANDIDATES), seed=0)
    table = source.read(0, 0).slice(0, candidates)
    own = {field.name for field in layout.schema.candidate}
    first = pa.array(np.zeros(candidates, dtype=np.int64))
    for index, name in enumerate(table.column_names):
        if name not in own:
            table = table.set_column(index, name, table.column(name).take(first))
    rows = decode_block(table, layout.columns, None)
    own_layout = RequestLayout(layout)
    own = decode_block(table, own_layout.candidates.columns, None).rows
    of_rows = dict.fromkeys(FORMS, layout.of(rows.rows))
    return of_rows | {"request": own_layout.of(rows.pieces([0, 1])[0], own)}


def check(found: Mapping[str, Form], inputs: Mapping[str, ProgramInputs | RequestInputs]) -> None:
    """Refuse to time a wrong answer."""
    want = found["eager"](*inputs["eager"].arguments)
    for name in FORMS[1:]:
        assert off_by(found[name](*inputs[name].arguments), want, terms=TERMS) <= 1, name


def main() -> None:
    """Run the benchmark."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tables", choices=["fp32", "fp16", "int8"], default="fp32")
    parser.add_argument("--candidates", nargs="+", type=int, default=list(CANDIDATES))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on a case")
    parser.add_argument("--out", type=Path, required=True, help="append JSON lines to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name in args.models:
        models = {provider: ranker(name, provider) for provider in ("plain", "experts")}
        layout = InputLayout(models["plain"].sparse.schema)
        forms = {who: forms_of(model, args.tables) for who, model in models.items()}
        for count in args.candidates:
            for line in lines_of(forms, request(layout, count), args.seconds):
                case = {"model": name, "candidates": count, "tables": args.tables}
                append(args.out, [{**case, **line, **environment("cpu")}])
                print(
                    f"{name:5s} {count:>5} candidates {line['form']:8s} {line['provider']:8s} "
                    f"p50 {line['median_us']:>8,.0f} us  p99 {line['p99_us']:>8,.0f} us "
                    f"{line['candidates_per_second']:>9,.0f} a second  x{line['ratio']:5.2f}"
                )


@torch.inference_mode()
def lines_of(
    forms: Mapping[str, Mapping[str, Form]],
    inputs: Mapping[str, ProgramInputs | RequestInputs],
    seconds: float,
) -> Iterator[dict[str, Any]]:
    """Time every form of both models; the ratio is to the plain model in the same form."""
    for found in forms.values():
        check(found, inputs)
    whole = inputs["eager"]
    assert isinstance(whole, ProgramInputs)
    for form in FORMS:
        taken = inputs[form].arguments
        calls = {who: partial(found[form], *taken) for who, found in forms.items()}
        for who, figures in measure(calls, seconds, "cpu").items():
            rate = whole.rows / figures.median_us * 1e6
            row = {"form": form, "provider": who, "candidates_per_second": rate}
            yield {**row, **asdict(figures)}


if __name__ == "__main__":
    main()
