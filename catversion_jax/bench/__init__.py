"""`catversion bench`: times the training step of C concepts with batches of B, also in PyTorch."""
