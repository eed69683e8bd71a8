"""The `steer-compile` command: sites, graphs, explanations of what did not match, the demo and the coverage table."""
