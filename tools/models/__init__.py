"""The model on disk and in memory: found, loaded, walked through, saved."""
