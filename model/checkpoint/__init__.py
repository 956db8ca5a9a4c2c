"""Folders of weights: reading, writing, converting."""
