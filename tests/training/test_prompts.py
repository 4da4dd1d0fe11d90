"""Training prompts: a run that could learn nothing is refused, and prompts in which nothing is learned are named."""

from dataclasses import replace

import numpy as np
import pytest

from catversion_jax.base.pipeline import MINI
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.config import Config
from catversion_jax.training.class_images import latents_to_npy, read_latents
from catversion_jax.training.training_prompts import check_prompts
from catversion_jax.utils.errors import UserError

LONG = "a very long prompt " * 30
GOOD, WITHOUT, CUT = "a photo of {concept}", "a red car", LONG + "of {concept}"


def check(mini, templates: list[str], tokenizers=None, **changes) -> None:
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    config = Config().replaced({"concept.class_word": "teapot", "concept.templates": tuple(templates)} | changes)
    pipeline = replace(mini, tokenizers=tokenizers or mini.tokenizers)
    check_prompts(config, config.make_method(mini.networks), pipeline, [])


WORD_METHODS = [
    {"adapter__scope": "trigger"},
    {"method": "textual_inversion"},
    {"method": "custom_diffusion"},
    {"method": "dreambooth"},
]


@pytest.mark.parametrize("changes", WORD_METHODS, ids=str)
@pytest.mark.parametrize("templates", [[WITHOUT], [CUT], [WITHOUT, CUT]], ids=["without", "cut", "both"])
def test_nothing_to_learn(mini, changes, templates):
    """The gradient would be zero in every step."""
    with pytest.raises(UserError) as error:
        check(mini, templates, **changes)
    message = str(error.value)
    assert message.startswith("config.concept.templates: nothing would be learned, as the prompts (")
    word = "sks" if changes.get("method") in ("custom_diffusion", "dreambooth") else "teapot"
    assert f"they do not hold {word!r}; write {{concept}} near their beginning" in message
    assert (", cut off after 77 tokens" in message) == (CUT in templates)


@pytest.mark.parametrize("changes", WORD_METHODS, ids=str)
def test_some_prompts_teach_nothing(mini, changes, caplog):
    check(mini, [GOOD, WITHOUT, CUT], **changes)
    (warning,) = caplog.messages
    assert "'a red car', 'a very long prompt" in warning
    assert warning.endswith(", cut off after 77 tokens")
    assert "a photo of" not in warning


def test_a_prefix_that_all_tokens_see(mini, caplog):
    """It is learned without the class word too, which is worth a warning."""
    check(mini, [WITHOUT])
    assert caplog.messages == ["training prompts without 'teapot': 'a red car'"]


@pytest.mark.parametrize("changes", [{}, *WORD_METHODS], ids=str)
def test_good_prompts(mini, changes, caplog):
    check(mini, [GOOD, "{class_word}", "the {class_word} " + LONG], **changes)
    assert caplog.messages == []


def test_the_second_encoder_of_sdxl(mini):
    """Its tokenizer may not hold the word where the first does; its prefix would then learn nothing."""

    other = Tokenizer(MINI / "tokenizer")
    other.length = 4
    with pytest.raises(UserError, match="'a photo of a teapot', cut off after 4 tokens"):
        check(mini, [GOOD], tokenizers=(mini.tokenizer, other), adapter__scope="trigger")


def test_many_prompts_are_counted(mini):
    templates = [f"car number {i}" for i in range(1000)]
    with pytest.raises(UserError, match=r"'car number 4' and 995 more\)"):
        check(mini, templates, adapter__scope="trigger")


LATENTS = np.random.default_rng(0).normal(size=(3, 2, 2, 4)).astype(np.float32)


def test_class_latents(tmp_path, caplog):
    path = tmp_path / "class_latents.npy"
    assert read_latents(path, LATENTS.shape) is None
    path.write_bytes(latents_to_npy(LATENTS))
    np.testing.assert_array_equal(read_latents(path, LATENTS.shape), LATENTS)
    np.testing.assert_array_equal(np.load(path), LATENTS)  # for others it is a .npy file
    np.save(path, LATENTS)  # as it was before there was a digest
    np.testing.assert_array_equal(read_latents(path, LATENTS.shape), LATENTS)
    assert caplog.messages == []


def npz(path) -> None:
    with path.open("wb") as file:
        np.savez(file, LATENTS)


def huge(path) -> None:
    path.write_bytes(path.read_bytes().replace(b"(3, 2, 2, 4)", b"(999999999,)"))


def flipped(path) -> None:
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "an archive": npz,
    "a huge shape": huge,
    "a flipped bit": flipped,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:150]),
    "empty": lambda path: path.write_bytes(b""),
    "other numbers": lambda path: path.write_bytes(latents_to_npy(LATENTS.astype(np.float64))),
    "other shape": lambda path: path.write_bytes(latents_to_npy(LATENTS[:2])),
    "objects": lambda path: np.save(path, np.asarray([{}], object), allow_pickle=True),
    "a longer file": lambda path: path.write_bytes(path.read_bytes() + bytes(10_000)),
    "a header that is too deep": lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 0x76),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_class_latents(tmp_path, caplog, kind):
    """They are sampled again, and the user is told."""
    path = tmp_path / "class_latents.npy"
    path.write_bytes(latents_to_npy(LATENTS))
    DAMAGE[kind](path)
    assert read_latents(path, LATENTS.shape) is None
    (warning,) = caplog.messages
    assert warning.startswith(f"{path}: ")
    assert warning.endswith("; the images of the class are sampled again")
