"""Coverage table over the causal language models of the installed transformers."""
