"""Data, models, evaluation and the training loop; plain functions that need no cluster."""
