"""`catversion bench`: how fast the training step is, for C concepts with batches of B, also in PyTorch."""
