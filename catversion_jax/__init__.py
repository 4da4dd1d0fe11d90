"""CatVersion in JAX: concatenated embeddings for diffusion-based text-to-image personalization."""

__version__ = "0.1.0"
