"""Samples images from prompts and concepts."""
