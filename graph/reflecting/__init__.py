"""What a trial taught."""
