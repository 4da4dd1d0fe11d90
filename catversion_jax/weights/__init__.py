"""Weights of base models: where they come from, and a reader for each format; nothing is unpickled."""
