"""The HiLoMoE module: linear maps that carry stacked layers of routed rank-1 experts.

Read in this order: `config` (the options), `reference` (the equations as loops), `routing` (the
equations in score space), `linear` (the module), `losses` (how its routers are kept balanced),
`inject` (how an existing model gets it), `sites` and `report` (what one asks of a whole model).
"""

from torchrec_hilomoe.hilomoe.config import HiLoMoEConfig
from torchrec_hilomoe.hilomoe.inject import inject_hilomoe, remove_hilomoe
from torchrec_hilomoe.hilomoe.linear import HiLoMoELinear
from torchrec_hilomoe.hilomoe.report import (
    LayerReport,
    record_routing,
    routing_report,
    RoutingReport,
    SiteReport,
)
from torchrec_hilomoe.hilomoe.sites import (
    auxiliary_loss,
    expert_parameters,
    set_auxiliary_loss_scale,
    sites_of,
)

__all__ = [
    "HiLoMoEConfig",
    "HiLoMoELinear",
    "LayerReport",
    "RoutingReport",
    "SiteReport",
    "auxiliary_loss",
    "expert_parameters",
    "inject_hilomoe",
    "record_routing",
    "remove_hilomoe",
    "routing_report",
    "set_auxiliary_loss_scale",
    "sites_of",
]
