"""What routers do, as any ``SummaryWriter`` is given it."""

import pytest
import torch
from torch import nn

from torchrec_hilomoe import HiLoMoEConfig, inject_hilomoe, routing_report
from torchrec_hilomoe.hilomoe import record_routing, routing_scalars, RoutingLog, write_routing

EXPERTS = 4


class Writer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.drawn[tag, global_step] = scalar_value


def host(experts: int = EXPERTS) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    inject_hilomoe(model, HiLoMoEConfig(num_layers=2, num_experts=experts), ["*"])
    return model


def test_a_log_of_the_loop_and_a_report_of_a_pass_say_the_same():
    model, rows = host(), torch.randn(64, 6)
    log, counted, reported = RoutingLog(model), Writer(), Writer()
    model(rows)
    log.observe()
    write_routing(counted, log.flush(), step=3)
    with record_routing(model):
        model(rows)
    report = routing_report(model)
    write_routing(reported, report, step=3)
    assert counted.drawn.items() <= reported.drawn.items()
    layer = report.routers[1].layers[0]
    for tag, value in (
        ("router/1/layer1/entropy", layer.entropy),
        ("router/1/layer1/largest_load", max(layer.load)),
        ("router/1/layer1/dead_experts", len(layer.dead_experts)),
        ("router/1/layer1/load/2", layer.load[2]),
        ("router/1/layer1/balance_loss", layer.balance_loss),
        ("router/1/paths_in_use", report.routers[1].paths_in_use),
        ("site/1/output_ratio", 0.0),
    ):
        assert reported.drawn[tag, 3] == value


@pytest.mark.parametrize(("experts", "curves"), [(16, 16), (17, 0)])
def test_more_experts_than_anybody_can_tell_apart_have_no_curves(experts, curves):
    model = host(experts)
    log = RoutingLog(model)
    model(torch.randn(64, 6))
    log.observe()
    of_one = [tag for tag in routing_scalars(log.flush()) if tag.startswith("router/0/layer1/load")]
    assert len(of_one) == curves


def test_tensorboard_s_own_writer_takes_it(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = host()
    with record_routing(model):
        model(torch.randn(64, 6))
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        write_routing(writer, routing_report(model), step=1)
    assert any(tmp_path.iterdir())
