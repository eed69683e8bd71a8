"""Helpers of the demo: byte tokenizer and style scorer for the small bundled language model."""
