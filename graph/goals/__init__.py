"""What the model is for, in words: a goal, and what is made of it."""
