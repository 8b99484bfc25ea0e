"""Who does the work: one worker, or a cluster of them."""
