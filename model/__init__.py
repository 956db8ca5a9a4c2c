"""mtp_spec.model."""
