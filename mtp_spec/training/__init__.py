"""Training MTP modules on a frozen model: `train`. Read `run` first."""
