"""What the calibration text says of every layer."""
