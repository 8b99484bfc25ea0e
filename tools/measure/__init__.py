"""What a model is worth: losses, recall, tasks."""
