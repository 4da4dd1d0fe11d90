"""JAX's devices, or what to do if it has none."""

import os

import jax

from catversion_jax.utils.errors import UserError, short


def devices() -> list[jax.Device]:
    """Returns JAX's devices. Raises UserError if it cannot have those that it is told to use."""
    try:
        return jax.devices()
    # An AssertionError where the package for the platform is missing, a RuntimeError where its devices are.
    except (RuntimeError, AssertionError) as error:
        said = f" ({short(error)})" if str(error) else ""
        install = "install 'catversion-jax[cuda]' or 'catversion-jax[tpu]' on a machine that has one"
        wanted = os.environ.get("JAX_PLATFORMS")
        if wanted is None:
            raise UserError(f"JAX finds no device here{said}; unset what JAX_* variables say, or {install}") from None
        raise UserError(
            f"JAX_PLATFORMS={wanted}: JAX finds no such device here{said}; unset it, or {install}"
        ) from None


def devices_problem() -> str | None:
    """Says why JAX has no devices, None if it has."""
    try:
        devices()
    except UserError as error:
        return str(error)
    return None
