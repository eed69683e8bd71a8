"""What is known of a model's graphs without running them: the debugging commands read it."""
