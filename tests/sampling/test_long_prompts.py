"""Prompts beyond the text encoder's length and with weights, beside others in one request."""

import dataclasses
import re

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from PIL import Image

from catversion_jax.base.sampler_config import SamplerConfig
from catversion_jax.methods.dreambooth import DreamBooth
from catversion_jax.models.unet import Context
from catversion_jax.sampling import conditioning, picture_record, sampler
from catversion_jax.sampling.branches import BatchKey, batches_of
from catversion_jax.utils.errors import UserError
from tests.commands import catversion, error_of
from tests.conftest import max_error

CONFIG = SamplerConfig(steps=2, guidance=3.0, batch_size=2)
FILL = "photo " * 74


def latents(pipeline, prompts, seeds, *concepts, negative_prompt="") -> np.ndarray:
    request = sampler.SampleRequest(tuple(prompts), tuple(seeds), CONFIG, negative_prompt)
    return np.concatenate([np.asarray(x)[:real] for x, real in sampler.sample_latents(pipeline, request, concepts)])


def test_batches_of_equal_length():
    keys = [BatchKey(0, 1, (chunks,)) for chunks in (1, 1, 1, 2, 2, 1)]
    assert batches_of(keys, range(6), 2) == [[0, 1], [2], [3, 4], [5]]
    assert batches_of(keys, sorted(range(6), key=keys.__getitem__), 2) == [[0, 1], [2, 5], [3, 4]]


def test_neighbours_of_other_lengths(tiny_pipeline, loaded):
    """An image depends on its own prompt, to the bit, whatever the lengths of the others; with two concepts too."""
    prompts = ("a teapot", f"{FILL} a teapot and a dog", "a (dog:1.3)", f"{FILL * 2} a dog")
    together = latents(tiny_pipeline, prompts, range(4), *loaded)
    for i, prompt in enumerate(prompts):
        np.testing.assert_array_equal(latents(tiny_pipeline, [prompt], [i], *loaded)[0], together[i])


def test_a_concept_in_a_later_chunk(tiny_pipeline, loaded):
    """It moves the chunk that holds its word, and no other; weights scale the way from the empty prompt's states."""
    teapot, _ = loaded
    prompt = f"{FILL} a teapot"
    base, moved = (conditioning.context(tiny_pipeline, [prompt], c).states[0] for c in (None, teapot))
    np.testing.assert_array_equal(base[:77], moved[:77])
    assert max_error(base[77:], moved[77:]) > 0.01
    (plain, weighted, empty) = (
        conditioning.context(tiny_pipeline, [text], teapot).states[0] for text in ("a teapot", "a (teapot:1.5)", "")
    )
    changed = np.flatnonzero((weighted != plain).any(-1))
    assert len(changed) == len(tiny_pipeline.tokenizer.word("teapot"))
    expected = empty[changed] + 1.5 * (plain[changed] - empty[changed])
    np.testing.assert_allclose(weighted[changed], expected, atol=1e-5)


def test_a_long_negative_prompt(tiny_pipeline, loaded):
    """Repeating the shorter side's states changes nothing: the same as giving the longer one twice as often."""
    states = np.random.default_rng(0).normal(size=(3, 1, 77, 4)).astype(np.float32)
    one, two = Context(states[0], None), Context(np.concatenate([states[1], states[2]], 1), None)
    assert [x.states.shape[1] for x in conditioning.same_length([one, two, one])] == [154] * 3
    teapot, _ = loaded
    long = latents(tiny_pipeline, ["a teapot"], [0], teapot, negative_prompt="photo " * 80)
    assert np.abs(long - latents(tiny_pipeline, ["a teapot"], [0], teapot)).max() > 1e-3
    # The empty prompt's own chunk as often as the other side has chunks.
    doubled = conditioning.same_length([conditioning.condition(tiny_pipeline, [""]), two])[0]
    networks, params = tiny_pipeline.networks, tiny_pipeline.params["unet"]
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(1, *networks.latent_shape)), jnp.float32)
    once = conditioning.condition(tiny_pipeline, [""])
    given = (networks.unet.apply({"params": params}, noise, jnp.ones(1), *x) for x in (once, doubled))
    assert max_error(*given) < 1e-5


def test_an_identifier_that_begins_a_chunk(tiny_pipeline, loaded):
    """The tokens in front of it decide, with the identifier, how many chunks there are."""
    teapot, _ = loaded
    method = DreamBooth(identifier="sks")
    unet = {"unet": tiny_pipeline.params["unet"]}
    concept = dataclasses.replace(teapot, method=method, learned=unet)
    prompt = "photo " * 74 + "teapot"
    sizes = [len(x[0][0].ids) for x in (conditioning.tokens_of(tiny_pipeline, [prompt], c) for c in (None, concept))]
    assert sizes == [1, 2]


def test_the_commands(tmp_path, concepts):
    """`generate --check` names the token of a later chunk; export writes states of one length; no warning of a cut."""
    prompts = [f"--prompt={FILL} a teapot", "--prompt=a (teapot:1.2)"]
    err = catversion("generate", f"--embedding={concepts[0]}", f"--out={tmp_path}", "--steps=2", *prompts).stderr
    assert "without the class word" not in err
    assert "cut" not in err
    out = catversion("generate", f"--embedding={concepts[0]}", "--check", *prompts).stdout
    assert int(re.search(r"the most at token (\d+)", out)[1]) >= 77 + 2
    message = error_of("generate", f"--embedding={concepts[0]}", f"--out={tmp_path}", "--prompt=a (teapot:nan)")
    assert "prompt 'a (teapot:nan)': the weight of 'teapot' is nan; expected at most 1000" in message


def test_lengths_without_a_common_one():
    """Are refused before the memory is full."""
    states = [Context(np.zeros((1, 77 * chunks, 2), np.float32), None) for chunks in (11, 13, 60)]
    assert [x.states.shape[1] for x in conditioning.same_length([states[2], states[2]])] == [77 * 60] * 2
    with pytest.raises(UserError, match="prompts of 847, 1001 tokens, negative ones included: no length in common"):
        conditioning.same_length(states[:2])


def test_like_of_a_picture_from_before(tmp_path, concepts):
    """Whose prompt was read as it stands: told, unless a prompt is given."""
    few = (f"--embedding={concepts[0]}", "--steps=1", "--num=1", f"--out={tmp_path / 'out'}")
    catversion("generate", *few, "--prompt=a teapot (blue)", "--prompt=a teapot")
    weighted, plain = sorted((tmp_path / "out").glob("a-*.png"), key=lambda path: "blue" not in path.name)
    for path, reading in ((weighted, 1), (plain, 0)):
        record = picture_record.read_picture(path)
        assert record.reading == reading
        old = msgspec.structs.replace(record, reading=0)
        assert (old.key == record.key) == (reading == 0)
        with Image.open(path) as image:
            image.save(path, pnginfo=picture_record.png_info(picture_record.texts_of(old)))
    assert "made when prompts had no weights and were cut" in error_of("generate", f"--like={weighted}")
    like = (f"--like={weighted}", f"--out={tmp_path / 'again'}")
    catversion("generate", *like, r"--prompt=a teapot \(blue\)")
    catversion("generate", f"--like={plain}", f"--out={tmp_path / 'again'}")
