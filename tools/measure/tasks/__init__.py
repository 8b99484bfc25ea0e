"""Tasks that lm-evaluation-harness lacks, or whose questions may come from local files. Imports the harness."""
