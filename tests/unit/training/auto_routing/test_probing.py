"""The options that a probe prints are those of a run."""

import shlex
from dataclasses import replace

import pytest

from torchrec_hilomoe.command_line import parse_run
from torchrec_hilomoe.hilomoe import Gain, ProbeReport
from torchrec_hilomoe.models.build import build_task
from torchrec_hilomoe.training.auto_routing.probing import route_flags
from torchrec_hilomoe.training.inputs import schema_of

GAIN = Gain(name="hour", site="up", gain=0.005, low=0.004, high=0.006)
REPORT = ProbeReport(
    features=(GAIN,),
    controls={},
    layers=(),
    route_by=(("hour",), ("category_history",), ("category",)),
    pays=True,
    verdict="experts should pay",
    costs=(),
    not_judged={},
    fit_rows=1,
    held_out_rows=1,
)


@pytest.mark.parametrize("given", [[], ["--model.hilomoe.enabled=false"], ["--model.hilomoe=null"]])
def test_what_is_printed_parses_and_builds(given):
    flags = route_flags(parse_run(given).config, REPORT)
    assert "\n" not in flags
    config = parse_run([*given, *shlex.split(flags)]).config
    experts = config.model.hilomoe
    assert experts.enabled
    assert experts.routing == "sample"
    assert [list(names) for names in experts.route_by or ()] == [list(it) for it in REPORT.route_by]
    build_task(config.model, schema_of(config))


def test_names_are_quoted_whatever_is_in_them():
    odd = (("it's",), ('say "x"',), ("größe $HOME",))
    flags = route_flags(parse_run([]).config, replace(REPORT, route_by=odd))
    config = parse_run(shlex.split(flags)).config
    assert [list(names) for names in config.model.hilomoe.route_by or ()] == [
        list(it) for it in odd
    ]
