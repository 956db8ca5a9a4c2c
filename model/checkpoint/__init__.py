"""Checkpoint folders: reading, writing, converting."""
