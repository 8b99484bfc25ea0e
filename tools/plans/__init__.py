"""What is decided before a weight is touched: recipes, and how sparsity is shared out. No torch in here."""
