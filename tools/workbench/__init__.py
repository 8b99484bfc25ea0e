"""The one loaded model of a run."""
