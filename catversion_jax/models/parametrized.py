"""Flax's layers with parameters, as every network here uses them: their parameters come from files."""

from functools import partial

import flax.linen as nn

# Nothing is ever initialized. But flax traces a parameter's initializer each time the parameter is used, to check its
# shape: with flax's defaults, which sample, that is a fifth of the time that tracing a training step takes.
ZEROS = nn.initializers.zeros
Dense = partial(nn.Dense, kernel_init=ZEROS)
Conv = partial(nn.Conv, kernel_init=ZEROS)
Embed = partial(nn.Embed, embedding_init=ZEROS)
