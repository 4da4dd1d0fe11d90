"""Agreement with the last Flax releases; `make parity` runs them in their own environment."""
