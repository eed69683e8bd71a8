"""The package's own consumers of captured rows, one file each."""
