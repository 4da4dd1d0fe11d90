"""Weights of base models: where they come from, and the readers of every format; nothing is unpickled."""
