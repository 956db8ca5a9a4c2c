"""The step on a GPU: captured as CUDA graphs, launched ahead of the host."""
