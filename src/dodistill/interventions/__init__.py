"""Each file is one choice on this axis, found by its name: see `dodistill.config.registry`."""
