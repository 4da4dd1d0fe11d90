"""The Python interface, which catversion_jax exports: a pipeline, learning, and concepts."""
