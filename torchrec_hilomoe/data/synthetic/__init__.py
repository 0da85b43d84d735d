"""Endless generated clicks, drawn from known probabilities, so that the best AUC is known.

``population`` draws users and the items' category tree, ``sessions`` draws visits of those users,
``inputs`` derives what decides a click, ``worlds`` says how likely each is, ``source`` makes
numbered blocks of rows, and ``write`` stores them as a prepared folder for those who ask.
"""

from torchrec_hilomoe.data.synthetic.source import SyntheticSource
from torchrec_hilomoe.data.synthetic.worlds import WorldName, WORLDS
from torchrec_hilomoe.data.synthetic.write import write_synthetic

__all__ = ["WORLDS", "SyntheticSource", "WorldName", "write_synthetic"]
