"""Everything done to the model, as plain typed functions; knows no graph and no agent."""
