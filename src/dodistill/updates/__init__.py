"""One file, one choice on this axis; found by name, see `dodistill.config.tree.registry`."""
