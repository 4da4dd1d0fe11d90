"""Array annotations used in every signature: `Float[Array, "batch query channels"]`.

Axis letters, the same everywhere:
    C concepts          B batch            T prompts           N photos
    P prefix length     L prefixed layers  H attention heads   D channels of a head
    Q, K query and key positions (77 tokens in CLIP's text encoder)
    h, w, c height, width and channels; images and latents are NHWC everywhere
"""

from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key, Shaped, UInt8, UInt32

AnyArray = Array | np.ndarray
"""An array on a device or on the host."""

Params = dict[str, Any]
"""A nested dict of arrays, named as in the last Flax releases of diffusers and transformers."""

__all__ = ["AnyArray", "Array", "Bool", "Float", "Int", "Key", "Params", "Shaped", "UInt8", "UInt32"]
