"""The data sets, and the other commands, that ``apps/prepare.py`` knows, by name."""

from collections.abc import Callable, Mapping

from torchrec_hilomoe.data.prepare.amazon_electronics import prepare_amazon_electronics
from torchrec_hilomoe.data.prepare.amazon_sequences import prepare_amazon_sequences
from torchrec_hilomoe.data.prepare.check import check_prepared
from torchrec_hilomoe.data.prepare.criteo import prepare_criteo
from torchrec_hilomoe.data.prepare.describe import Description
from torchrec_hilomoe.data.prepare.describe_plots import describe_and_draw
from torchrec_hilomoe.data.prepare.folder import Report
from torchrec_hilomoe.data.prepare.kuaivideo import prepare_kuaivideo
from torchrec_hilomoe.data.prepare.microvideo import prepare_microvideo
from torchrec_hilomoe.data.prepare.movielens import prepare_movielens
from torchrec_hilomoe.data.prepare.outcomes import Checked, Draft
from torchrec_hilomoe.data.prepare.own_tables import prepare_parquet
from torchrec_hilomoe.data.prepare.schema_draft import draft_schema
from torchrec_hilomoe.data.prepare.taobao_ad import prepare_taobao_ad
from torchrec_hilomoe.data.prepare.trivago import prepare_trivago

__all__ = ["COMMANDS", "DATASETS"]

# The signature of each function is its command line, and its docstring the help.
DATASETS: Mapping[str, Callable[..., Report]] = {
    "movielens": prepare_movielens,
    "amazon-sequences": prepare_amazon_sequences,
    "trivago": prepare_trivago,
    "amazon-electronics": prepare_amazon_electronics,
    "taobao-ad": prepare_taobao_ad,
    "kuaivideo": prepare_kuaivideo,
    "microvideo": prepare_microvideo,
    "criteo": prepare_criteo,
    "parquet": prepare_parquet,
}

COMMANDS: Mapping[str, Callable[..., Report | Description | Draft | Checked]] = {
    **DATASETS,
    "describe": describe_and_draw,
    "schema init": draft_schema,
    "check": check_prepared,
}
