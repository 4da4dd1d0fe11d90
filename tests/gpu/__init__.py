"""The training step compiled for NVIDIA's GPUs ahead of time, on a machine that has none: `make gpu`."""
