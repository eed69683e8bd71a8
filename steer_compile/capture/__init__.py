"""Captured rows: who they are of, what is kept of them, and where they go."""
