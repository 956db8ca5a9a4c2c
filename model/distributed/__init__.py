"""Processes that share a model: start, store, collectives."""
