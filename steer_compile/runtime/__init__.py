"""Run time: the only objects that hold tensors or change between calls."""
