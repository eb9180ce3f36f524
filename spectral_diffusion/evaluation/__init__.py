"""Evaluation: how well pictures show each concept."""
