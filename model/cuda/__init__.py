"""The model on the GPU kernels."""
