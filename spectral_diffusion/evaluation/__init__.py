"""Measuring: does a picture show this very thing?"""
