"""What processes that share a model must agree on."""
