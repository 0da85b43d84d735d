"""The HiLoMoE module: linear maps that carry stacked layers of routed rank-1 experts.

Read in this order: `config` (the options), `reference` (the equations as loops), `routing` (which
experts a row uses), `experts` (what they add to it), `function` (both with their gradient; `fused`
is the same in Triton), `losses` (how routers are kept balanced) and `ranks` (over whom),
`execution` (which backend), `linear` (the module), `router` (one for several sites, by `views`) and
`passes` (whose routing a site gets that is recomputed), `inject` (how an existing model gets them,
and what one tells them), `remove` (how it loses them), `costs` (what they cost), `monitor` and
`report` (what the routers do, in training and in a pass; `scalars`, as numbers for TensorBoard),
`probe` (which features should route, before there is an expert).
"""

from torchrec_hilomoe.hilomoe.base_checkpoint import load_base_checkpoint
from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.costs import expert_costs, Flops, ModelCosts, ModuleCosts
from torchrec_hilomoe.hilomoe.fixed_routing import fix_random_routing
from torchrec_hilomoe.hilomoe.inject import (
    auxiliary_loss,
    expert_parameters,
    inject_hilomoe,
    inject_shared_router,
    routers_of,
    set_auxiliary_loss_scale,
    set_process_group,
    sites_of,
)
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.monitor import CollapseWatch, LayerLoad, RoutingLog
from torchrec_hilomoe.hilomoe.probe import (
    CannotJudgeError,
    draw_probe,
    Gain,
    InteractionProbe,
    LaterLook,
    LayerChoice,
    LossTerms,
    ProbeReport,
    SiteCost,
)
from torchrec_hilomoe.hilomoe.remove import remove_hilomoe
from torchrec_hilomoe.hilomoe.report import (
    LayerReport,
    record_routing,
    RouterReport,
    routing_report,
    RoutingReport,
    SiteReport,
)
from torchrec_hilomoe.hilomoe.report_plots import draw_routing
from torchrec_hilomoe.hilomoe.router import SampleRouter
from torchrec_hilomoe.hilomoe.scalars import routing_scalars, write_routing

__all__ = [
    "CannotJudgeError",
    "CollapseWatch",
    "Flops",
    "Gain",
    "HiLoMoEConfig",
    "HiLoMoELinear",
    "InteractionProbe",
    "LaterLook",
    "LayerChoice",
    "LayerLoad",
    "LayerReport",
    "LossTerms",
    "ModelCosts",
    "ModuleCosts",
    "ProbeReport",
    "RouterReport",
    "RoutingLog",
    "RoutingReport",
    "SampleRouter",
    "SiteCost",
    "SiteReport",
    "auxiliary_loss",
    "draw_probe",
    "draw_routing",
    "expert_costs",
    "expert_parameters",
    "fix_random_routing",
    "inject_hilomoe",
    "inject_shared_router",
    "load_base_checkpoint",
    "record_routing",
    "remove_hilomoe",
    "routers_of",
    "routing_report",
    "routing_scalars",
    "set_auxiliary_loss_scale",
    "set_process_group",
    "sites_of",
    "write_routing",
]
