"""Endless generated clicks, drawn from known probabilities, so that the best AUC is known.

``population`` draws users, the items' category tree and visits, ``inputs`` derives what decides a
click, ``worlds`` says how likely each is, and ``source`` makes numbered blocks of rows, also as a
prepared folder for those who ask.
"""

from torchrec_hilomoe.data.synthetic.source import SyntheticSource, write_synthetic
from torchrec_hilomoe.data.synthetic.worlds import WorldName, WORLDS

__all__ = ["WORLDS", "SyntheticSource", "WorldName", "write_synthetic"]
