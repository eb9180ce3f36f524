"""Fusion: several adapters into one model, and back."""
