"""Stable Diffusion 1.5 at its real size, with random weights, on the CPU: `make full-size`; minutes and 20 GiB."""
