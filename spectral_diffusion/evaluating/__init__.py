"""Evaluating adapters: what is drawn for it, and how it goes from settings to a report; measures: ``evaluation``."""
