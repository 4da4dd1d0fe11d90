"""Flax modules of Stable Diffusion 1.x, 2.x and XL, NHWC, with parameter names of diffusers 0.39, transformers 4.57."""
