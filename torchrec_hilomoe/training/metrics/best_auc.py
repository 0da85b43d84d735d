"""The AUC that no model can expect to exceed, where the probabilities of clicks are known."""

import pyarrow as pa

from torchrec_hilomoe.data.synthetic.source import PROBABILITY, SyntheticSource
from torchrec_hilomoe.training.metrics.definitions import auc

__all__ = ["best_auc"]


def best_auc(source: SyntheticSource) -> float:
    """AUC of the true probabilities on epoch 0 of ``source``.

    Reads the whole epoch, and keeps two numbers a row.
    """
    tables = [
        source.read(epoch=0, block=block).select([PROBABILITY, source.schema.label])
        for block in range(len(source.block_rows))
    ]
    table = pa.concat_tables(tables)
    return auc(table[PROBABILITY].to_numpy(), table[source.schema.label].to_numpy())
