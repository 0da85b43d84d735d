"""Which features decide: found from the gradients of a plain model, before any expert is trained.

Read in this order: `rows` (in buckets, and their sums), `interactions` (the statistic), `buckets`
(a feature as a router would read it), `wider` (the control of as many FLOPs), `heard` (a pass of
the host's), `listener` (the hooks on a host's loop), `gathered` (a site's sums), `probe` (all of
it), `verdict` (what it means: ranking, intervals, views), `advice` (whether that pays, in words),
`report`, `picture`.
"""

from torchrec_hilomoe.hilomoe.probe.checks import CannotJudgeError
from torchrec_hilomoe.hilomoe.probe.heard import LossTerms
from torchrec_hilomoe.hilomoe.probe.picture import draw_probe
from torchrec_hilomoe.hilomoe.probe.probe import InteractionProbe
from torchrec_hilomoe.hilomoe.probe.report import (
    Gain,
    LaterLook,
    LayerChoice,
    ProbeReport,
    SiteCost,
)

__all__ = [
    "CannotJudgeError",
    "Gain",
    "InteractionProbe",
    "LaterLook",
    "LayerChoice",
    "LossTerms",
    "ProbeReport",
    "SiteCost",
    "draw_probe",
]
