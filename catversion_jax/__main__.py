"""`python -m catversion_jax`."""

from catversion_jax.main import run

run()
