"""mtp_spec.kernels."""
