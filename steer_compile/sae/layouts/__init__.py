"""Layouts in which autoencoders are released, one file for each."""
