"""Tasks of our own, a file each, as `tools.measure.benchmarks` finds them; a file imports the harness in functions."""
