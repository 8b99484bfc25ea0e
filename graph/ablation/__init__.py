"""The experiment of `python -m graph.ablate`: arms, their rows, and what comes of them."""
