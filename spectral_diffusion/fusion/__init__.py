"""Fusion: several adapters into one model. One short pure file per merge."""

from .registry import Contribution, all_merges, get_merge

__all__ = ["Contribution", "all_merges", "get_merge"]
