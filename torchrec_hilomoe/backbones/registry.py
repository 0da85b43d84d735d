"""Backbones by name."""

from torchrec_hilomoe.backbones.base import Backbone
from torchrec_hilomoe.backbones.bst import BST

__all__ = ["BACKBONES"]

BACKBONES: dict[str, type[Backbone]] = {"bst": BST}
