"""Dynamic steering: what is read from the stream decides, step by step, what is added to it."""
