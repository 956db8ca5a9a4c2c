"""Checks that processes that share a model agree."""
