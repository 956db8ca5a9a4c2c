"""The model on the CPU engine."""
