"""What a planner may know, what it answers, and what that comes to."""
