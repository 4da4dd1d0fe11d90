"""The training step compiled for TPUs ahead of time, on a machine that has none: `make tpu`."""
