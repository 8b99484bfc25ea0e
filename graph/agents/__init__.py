"""The planner and the reflector: what they see in, validated decisions out."""
