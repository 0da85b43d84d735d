"""``model.hilomoe.route_by: auto``: which features decide, found while the plain model trains.

In the last steps before experts begin a probe listens to the steps of training. Every row is heard
before it is trained on, and blocks of rows judge each other (`probe.pairs`), since a run has few
rows to spare. At the boundary the views are chosen and experts are injected; where nothing stands
out, and in a run that is too short to tell, the model stays plain, and the stages that would train
experts alone are left out.

Once the experts have warmed up, rows of the validation split say what they have brought
(`confirming`); where it is surely no gain, they are taken out again.

A run whose warm-up is too short for that, but which is long enough itself, trains and probes a
plain model aside first (`probing`), and then begins with what was found.

    window.py     to which steps it listens       decision.py   what was found, and what it makes
    listening.py  a probe of the run's model      confirming.py what experts have brought
    beginning.py  what is known before a step     probing.py    a plain model, trained aside
    routing.py    all of it, in a run
"""

from torchrec_hilomoe.training.auto_routing.decision import (
    chooses_routing,
    confirmed,
    decided_model,
    found_and_brought,
)
from torchrec_hilomoe.training.auto_routing.routing import AutoRouting
from torchrec_hilomoe.training.auto_routing.window import Window, window_of

__all__ = [
    "AutoRouting",
    "Window",
    "chooses_routing",
    "confirmed",
    "decided_model",
    "found_and_brought",
    "window_of",
]
