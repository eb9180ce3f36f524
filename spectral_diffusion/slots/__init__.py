"""Slots: disjoint intervals of singular vectors, one per concept, and the ledger that hands them out."""
