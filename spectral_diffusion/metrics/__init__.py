"""Encoders, identity, attribute classifiers and statistics: measures of pictures, used by training and evaluation."""
