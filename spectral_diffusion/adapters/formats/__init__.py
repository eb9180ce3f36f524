"""Adapters and fusions as files."""
