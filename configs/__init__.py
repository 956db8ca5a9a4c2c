"""mtp_spec.configs."""
