"""Implementation packages; import the public names from `kfac`."""
