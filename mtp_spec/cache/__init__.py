"""Pages of latent cache and the prompt prefixes that sequences share."""
