"""A run's directory, events, replay and forks."""
