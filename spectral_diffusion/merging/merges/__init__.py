"""Merges: how several adapters' changes of one weight become one change. One file each."""

from .registry import Contribution, Merge, all_merges, get_merge

__all__ = ["Contribution", "Merge", "all_merges", "get_merge"]
