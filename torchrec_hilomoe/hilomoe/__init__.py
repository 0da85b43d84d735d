"""The HiLoMoE module: linear maps that carry stacked layers of routed rank-1 experts.

Read in this order: `config` (the options), `reference` (the equations as loops), `routing` (the
equations in score space), `experts`, `mixing` and `function` (what a row computes, its gradient),
`losses` (how routers are kept balanced), `plan` (which backend), `linear` (the module), `router`
(one for several sites), `inject` (how an existing model gets them), then `sites`, `report`,
`plots`, `collapse` and `controls` (what one asks of a whole model).
"""

from torchrec_hilomoe.hilomoe.collapse import CollapseWatch
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.controls import fix_random_routing
from torchrec_hilomoe.hilomoe.inject import inject_hilomoe, remove_hilomoe, share_routing
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.plots import draw_routing
from torchrec_hilomoe.hilomoe.report import (
    LayerReport,
    record_routing,
    routing_report,
    RoutingReport,
    SiteReport,
)
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.hilomoe.sites import (
    auxiliary_loss,
    expert_parameters,
    set_auxiliary_loss_scale,
    sites_of,
)

__all__ = [
    "CollapseWatch",
    "HiLoMoEConfig",
    "HiLoMoELinear",
    "LayerReport",
    "RoutingReport",
    "SampleRouter",
    "SiteReport",
    "auxiliary_loss",
    "draw_routing",
    "expert_parameters",
    "fix_random_routing",
    "inject_hilomoe",
    "record_routing",
    "remove_hilomoe",
    "routing_report",
    "set_auxiliary_loss_scale",
    "share_routing",
    "sites_of",
]
