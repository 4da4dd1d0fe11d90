"""Where CatVersion's prefix enters."""

import numpy as np

from catversion_jax.base.words import find_word
from catversion_jax.methods.catversion import CatVersion

LAYERS = ((1, 2, 3),)


def test_who_sees_the_prefix(mini):
    tokenizer = mini.tokenizer
    prompt = "a photo of a teapot on the beach"
    token_ids, word = tokenizer([prompt, "a car"]), tokenizer.word("teapot")
    last = find_word(tokenizer, token_ids, "teapot")
    assert CatVersion(LAYERS, scope="all").token_mask(last, 77).all()
    mask = CatVersion(LAYERS, scope="trigger").token_mask(last, 77)
    assert mask.shape == (2, 77, 1)
    at = token_ids[0].tolist().index(word[-1])
    np.testing.assert_array_equal(mask[0, :, 0], np.arange(77) >= at)
    assert not mask[1].any()
