"""Flax modules of Stable Diffusion 1.x and 2.x, NHWC, with diffusers 0.39's and transformers 4.57's parameter names."""
