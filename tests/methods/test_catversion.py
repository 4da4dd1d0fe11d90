"""Where CatVersion's prefix enters."""

import numpy as np

from catversion_jax.methods.catversion import CatVersion

LAYERS = ((1, 2, 3),)


def test_who_sees_the_prefix(mini):
    tokenizer = mini.tokenizer
    prompt = "a photo of a teapot on the beach"
    token_ids, word = tokenizer([prompt, "a car"]), tokenizer.word("teapot")
    assert CatVersion(LAYERS, scope="all").token_mask(token_ids, word).all()
    mask = CatVersion(LAYERS, scope="trigger").token_mask(token_ids, word)
    assert mask.shape == (2, 77, 1)
    at = token_ids[0].tolist().index(word[-1])
    np.testing.assert_array_equal(mask[0, :, 0], np.arange(77) >= at)
    assert not mask[1].any()
