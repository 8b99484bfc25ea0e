"""Where text and questions come from, and how they become disjoint windows."""
