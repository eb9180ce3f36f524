"""Fusion: several adapters into one model. One short pure file per merge."""

from .registry import Contribution, Merge, all_merges, get_merge

__all__ = ["Contribution", "Merge", "all_merges", "get_merge"]
