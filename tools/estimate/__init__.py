"""What a run will need, foretold from the shapes of its model: memory, disk and time."""
