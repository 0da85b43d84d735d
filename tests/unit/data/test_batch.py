"""CTRBatch: what moves with it and what stays."""

from dataclasses import fields

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.helpers.datasets import toy_source
from torchrec_hilomoe.data.loader import Loader


def test_to_copies_every_tensor_and_keeps_the_rest():
    batch = next(iter(Loader(toy_source(12), batch_size=4, prefetch=0)))
    moved = batch.to(torch.device("meta"))
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, KeyedJaggedTensor):
            assert after.keys() == before.keys()
            assert after.values().is_meta
            assert after.lengths().is_meta
            assert after.length_per_key() == before.length_per_key()
        elif isinstance(before, torch.Tensor):
            assert after.is_meta
            assert after.shape == before.shape
        else:
            assert after == before
