"""Methods: how an adapter parametrises the change of a weight. One file each."""

from .registry import Method, all_methods, get_method

__all__ = ["Method", "all_methods", "get_method"]
