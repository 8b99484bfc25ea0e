"""All survivors of all pruned layers together, fitted to what the dense model says; zeros stay zeros."""
