"""Chat models: how they are opened, asked and paid for."""
