"""`python -m catversion_jax`."""

from catversion_jax.cli.main import run

run()
