"""Tasks of our own, a file each, as `tools.measure.own_tasks` finds them; a file imports the harness in functions."""
