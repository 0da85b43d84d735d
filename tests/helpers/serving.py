"""Small rankers of the toy data as they are served, and batches and rows of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from tests.helpers.datasets import replace_column, SCHEMA
from tests.helpers.models import in_memory
from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.config import BSTConfig, InjectionConfig, InterFormerConfig, ModelConfig
from torchrec_hilomoe.data.batch import CTRBatch, LoaderState
from torchrec_hilomoe.data.collate import collate
from torchrec_hilomoe.data.decode import decode_block
from torchrec_hilomoe.data.layout import ColumnLayout
from torchrec_hilomoe.data.schema import Schema
from torchrec_hilomoe.hilomoe import sites_of
from torchrec_hilomoe.models.train_task import TrainTask
from torchrec_hilomoe.training import checkpoint
from torchrec_hilomoe.training.checkpoint import Progress, RoutingDecision, Saver

__all__ = ["Routing", "batch_of", "ranker", "save_ranker", "with_histories"]

Routing = Literal["plain", "row", "sample", "view"]
START = LoaderState(epoch=0, lane_rows=0, num_canonical_shards=1)


def ranker(
    backbone: str = "din", routing: Routing = "row", schema: Schema = SCHEMA, experts: int = 3
) -> TrainTask:
    """One with experts at every site that say something, away from where it starts."""
    route_by = (("item",), ("views_item",)) if routing == "view" else None
    config = ModelConfig(
        backbone=backbone,
        embedding_dim=4,
        head=(8, 6),
        batch_norm=True,
        bst=BSTConfig(num_heads=2),
        interformer=InterFormerConfig(num_layers=1),
        hilomoe=InjectionConfig(
            enabled=routing != "plain",
            num_layers=2,
            num_experts=experts,
            sites=("all",),
            routing="row" if routing in ("plain", "row") else "sample",
            route_by=route_by,
        ),
    )
    task = in_memory(config, schema)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for site in sites_of(task).values():
            nn.init.normal_(site.expert_out, std=0.3)
    return task.eval()


def with_histories(table: pa.Table, lengths: Sequence[int]) -> pa.Table:
    """The same rows with histories of these lengths, in turn; of no more events than are kept."""
    rng = np.random.default_rng(7)
    for group in SCHEMA.sequences:
        for field in group.fields:
            lists = [
                rng.integers(SCHEMA.tables[field.table], size=lengths[row % len(lengths)]).tolist()
                for row in range(table.num_rows)
            ]
            table = replace_column(table, field.name, pa.array(lists, pa.list_(pa.int32())))
    return table


def batch_of(table: pa.Table, schema: Schema = SCHEMA) -> CTRBatch:
    """The batch that training and evaluation make of rows."""
    layout = ColumnLayout(schema)
    rows = decode_block(table, layout, None).rows
    return collate(layout, [rows], loss_denominator=1.0, position=START)


def save_ranker(
    folder: Path,
    task: TrainTask,
    *options: str,
    stage: str = "finetune",
    decision: RoutingDecision | None = None,
    schema: Schema = SCHEMA,
) -> str:
    """Save a checkpoint of a ranker, as a run of these options does; return its path."""
    by_row = ("--model.hilomoe.routing=row", "--model.hilomoe.route_by=null")
    parsed = parse_run([f"--out_dir={folder}", *by_row, *options])
    documents = {"config.yaml": parsed.resolved, "schema.json": schema.to_json()}
    progress = Progress(step=3, stage=stage, position=START, total_steps=9, decision=decision)
    Saver(folder, keep=1, documents=documents).save({"model": task.state_dict()}, progress)
    found = checkpoint.latest(folder)
    assert found is not None
    return found
