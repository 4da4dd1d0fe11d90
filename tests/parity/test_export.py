"""What catversion export writes, at work in pipelines of diffusers, against our own text states."""

import contextlib
import copy
import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from catversion_jax.methods import concept_file
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.sampling import conditioning, export
from tests import tiny
from tests.commands import catversion
from tests.conftest import max_error

PROMPTS = ["a photo of a teapot on the beach", "a teapot and a red teapot", "a car"]
NEGATIVE = "blurry, an ugly teapot"
TOLERANCE = 1e-4


def ours(pipeline, prompts, concept=None, strength=1.0) -> np.ndarray:
    return conditioning.context(pipeline, prompts, concept.at(strength) if concept else None).states


def load_module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


catversion_torch = load_module("catversion_torch", export.FOLDER / "catversion_torch.py")


@pytest.fixture(scope="module")
def pipe(tiny_model) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(tiny_model / "vae", torch_dtype=torch.float32),
        text_encoder=CLIPTextModel.from_pretrained(tiny_model / "text_encoder", torch_dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_model / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(tiny_model / "unet", torch_dtype=torch.float32),
        scheduler=DDIMScheduler.from_pretrained(tiny_model / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def make(tiny_model, tiny_pipeline, tmp_path):
    """Write a random concept; returns it and its file."""

    def write(scope: str, length: int = 4, logit_bias: float = 0.0, word: str = "teapot"):
        prefix = np.random.default_rng(length).normal(size=(length, 3, 2, 2, 16)).astype(np.float32)
        fingerprint = tiny_pipeline.fingerprint
        concept = tiny.concept(prefix, fingerprint, tiny_model, logit_bias=logit_bias, scope=scope)
        concept = dataclasses.replace(concept, class_word=word)
        path = tmp_path / f"{scope}-{length}-{logit_bias}-{word}.safetensors"
        tiny.save_run(path, concept)
        return concept, path

    return write


def with_second(concept: concept_file.Concept) -> tuple[concept_file.Concept, concept_file.Concept]:
    """Another concept in other layers, and one with both, as SDXL's is."""
    prefix, method = concept.learned["prefix"], concept.method
    prefix_2, layers_2 = prefix[::-1, :2], (0, 3)
    other = dataclasses.replace(method, layers=(layers_2,))
    both = dataclasses.replace(method, layers=(*method.layers, layers_2))
    return (
        dataclasses.replace(concept, learned={"prefix": prefix_2}, method=other),
        dataclasses.replace(concept, learned={"prefix": prefix, "prefix_2": prefix_2}, method=both),
    )


@contextlib.contextmanager
def attached(pipe, path, **kwargs):
    handle = catversion_torch.attach(pipe, path, **kwargs)
    try:
        yield handle
    finally:
        handle.remove()


def encode(pipe, prompts, negative=None):
    """What the pipeline conditions its UNet on: the prompts' text states and the negative prompt's."""
    negatives = None if negative is None else [negative] * len(prompts)
    with torch.no_grad():
        return pipe.encode_prompt(prompts, "cpu", 1, True, negatives)


@pytest.mark.parametrize("logit_bias", [0.0, 1.0])
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("scope", ["all", "trigger"])
def test_text_states(pipe, tiny_pipeline, make, scope, length, logit_bias):
    concept, path = make(scope, length, logit_bias)
    base, empty = encode(pipe, PROMPTS)
    with attached(pipe, path) as handle:
        for strength in (1.0, 0.5, 1.5, 0.0):
            handle.strength = strength
            states, negative = encode(pipe, PROMPTS)
            assert max_error(states, ours(tiny_pipeline, PROMPTS, concept, strength)) < TOLERANCE
            assert torch.equal(negative, empty)
            moved = (states - base).abs().amax((1, 2)) > 0.01
            assert moved.tolist() == [strength > 0, strength > 0, strength > 0 and scope == "all"]
    assert torch.equal(encode(pipe, PROMPTS)[0], base)


def test_a_class_word_of_several_tokens(pipe, tiny_pipeline, make):
    concept, path = make("trigger", word="teddy bear")
    assert len(tiny_pipeline.tokenizer.word("teddy bear")) > 1
    prompts = ["a Teddy Bear and a teddy bear", "a bear", "teddy bears", "teddy bear " * 50]
    # A pipeline cuts the last one, of which our first chunk is as long.
    with attached(pipe, path):
        states, _ = encode(pipe, prompts)
    assert max_error(states, ours(tiny_pipeline, prompts, concept)[:, :77]) < TOLERANCE


def test_the_class_word_is_a_whole_word(pipe, tiny_pipeline, make):
    """The last token of "hotdog" is that of "dog"."""
    concept, path = make("trigger", word="dog")
    assert tiny_pipeline.tokenizer.word("hotdog")[-1:] == tiny_pipeline.tokenizer.word("dog")
    prompts = ["a hotdog", "a hotdog and a dog", "a  DOG "]
    with attached(pipe, path):
        states, _ = encode(pipe, prompts)
    assert max_error(states, ours(tiny_pipeline, prompts, concept)) < TOLERANCE
    moved = (states - encode(pipe, prompts)[0]).abs().amax((1, 2)) > 0.01
    assert moved.tolist() == [False, True, True]


@pytest.mark.parametrize("scope", ["all", "trigger"])
def test_the_negative_prompt_by_itself(pipe, make, scope):
    """Never sees the concept, though it has the class word, and though it is the prompt's own text."""
    _, path = make(scope)
    states, negative = encode(pipe, PROMPTS, NEGATIVE)
    with attached(pipe, path) as handle:
        moved, same = encode(pipe, PROMPTS, NEGATIVE)
        assert not torch.equal(moved, states)
        assert torch.equal(same, negative)
        moved, same = encode(pipe, [NEGATIVE], NEGATIVE)
        assert not torch.equal(moved[0], negative[0])
        assert torch.equal(same[0], negative[0])
        handle.strength = 0
        assert torch.equal(encode(pipe, PROMPTS)[0], states)
        handle.strength = 1
        ids = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = pipe.text_encoder(ids)[0]  # by another program
            with handle.enabled():
                inside = pipe.text_encoder(ids)[0]
        assert torch.equal(alone, states)
        assert torch.equal(inside, encode(pipe, PROMPTS)[0])
    for module in pipe.text_encoder.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    assert "encode_prompt" not in vars(pipe)
    assert torch.equal(encode(pipe, PROMPTS)[0], states)


def test_several_concepts(pipe, tiny_pipeline, make):
    """What they change is added; each at its strength; in any order, and taken out in any order."""
    (teapot, one), (car, two) = make("trigger", 4), make("trigger", 2, word="car")
    base = encode(pipe, PROMPTS)[0]
    with attached(pipe, [one, two], strength=(0.5, 1.0)) as handle:
        assert handle.strength == (0.5, 1.0)
        states = encode(pipe, PROMPTS)[0]
        assert max_error(states[:2], ours(tiny_pipeline, PROMPTS[:2], teapot, 0.5)) < TOLERANCE
        assert max_error(states[2:], ours(tiny_pipeline, PROMPTS[2:], car)) < TOLERANCE
        both = encode(pipe, ["a car and a teapot"])[0]
        handle.strength = 0
        assert torch.equal(encode(pipe, PROMPTS)[0], base)
        with pytest.raises(ValueError, match="3 strengths; expected one, or one for each of 2"):
            handle.strength = [1, 1, 1]
    first = catversion_torch.attach(pipe, two)
    second = catversion_torch.attach(pipe, one, strength=0.5)
    assert max_error(encode(pipe, ["a car and a teapot"])[0], both) < TOLERANCE
    assert torch.equal(encode(pipe, PROMPTS, NEGATIVE)[1][0], encode(pipe, [""], NEGATIVE)[1][0])
    first.remove()
    assert max_error(encode(pipe, PROMPTS[:1])[0], ours(tiny_pipeline, PROMPTS[:1], teapot, 0.5)) < TOLERANCE
    second.remove()
    assert torch.equal(encode(pipe, PROMPTS)[0], base)


def test_sdxl(tmp_path_factory, tmp_path):
    """Both text encoders, the pooled embedding and the negative prompt, by themselves."""
    folder = tiny.write(tmp_path_factory.mktemp("xl"), changes=tiny.XL_CHANGES)
    parts = {
        name: kind.from_pretrained(folder / name, torch_dtype=torch.float32)
        for name, kind in {
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
            "unet": UNet2DConditionModel,
        }.items()
    }
    words = {name: CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")}
    scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    pipe = StableDiffusionXLPipeline(**parts, **words, scheduler=scheduler, add_watermarker=False)
    pipeline = tiny.load(folder)
    rng = np.random.default_rng(0)
    learned = {
        name: rng.normal(size=(2, 2, 2, *heads)).astype(np.float32)
        for name, heads in zip(("prefix", "prefix_2"), pipeline.networks.heads, strict=True)
    }
    method = CatVersion(layers=((1, 2), (0, 2)), scope="trigger")
    concept = concept_file.Concept(learned, method, "teapot", (), pipeline.fingerprint, "", 1, 0.01, 0)
    concept_file.save(tmp_path / "teapot.safetensors", concept)
    given = {"negative_prompt": [NEGATIVE] * len(PROMPTS), "device": "cpu"}
    with torch.no_grad():
        base = pipe.encode_prompt(PROMPTS, **given)
        with attached(pipe, tmp_path / "teapot.safetensors"):
            states, negative, pooled, negative_pooled = pipe.encode_prompt(PROMPTS, **given)
    expected = conditioning.context(pipeline, PROMPTS, concept)
    assert max_error(states, expected.states) < TOLERANCE
    assert max_error(pooled, expected.pooled) < TOLERANCE
    assert torch.equal(negative, base[1])
    assert torch.equal(negative_pooled, base[3])
    assert max_error(pooled[:1], base[2][:1]) > 0.01


def test_from_the_hub(pipe, make, monkeypatch):
    """A name that is no file here is downloaded."""
    import huggingface_hub

    _, path = make("all")
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *given: asked.append(given) or str(path))
    with attached(pipe, "someone/teapot"):
        pass
    assert asked == [("someone/teapot", "concept.safetensors")]
    with attached(pipe, path.parent / path.name):
        assert len(asked) == 1


def test_half_precision(pipe, make):
    _, path = make("all")
    with attached(pipe, path):
        single, _ = encode(pipe, PROMPTS)
    encoder = copy.deepcopy(pipe.text_encoder).bfloat16()
    half = StableDiffusionPipeline(**pipe.components | {"text_encoder": encoder}, requires_safety_checker=False)
    with attached(half, path):
        states, _ = encode(half, PROMPTS)
    assert states.dtype == torch.bfloat16
    assert max_error(states.float(), single) < 0.1


@pytest.mark.parametrize("scope", ["all", "trigger"])
def test_whole_pipeline(pipe, make, tmp_path, scope):
    """The hooked call, and the call with the exported text states: the same latents."""
    _, path = make(scope)
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    catversion("export", "--embedding", path, "--out", tmp_path / "out", *prompts, f"--negative_prompt={NEGATIVE}")

    def latents(**kwargs):
        generator = torch.Generator().manual_seed(0)
        return pipe(generator=generator, num_inference_steps=3, output_type="latent", **kwargs).images

    exported = load_file(tmp_path / "out" / export.EMBEDS)
    embeds = {name: exported.pop(name) for name in ("prompt_embeds", "negative_prompt_embeds")}
    assert not exported
    asked = {"prompt": PROMPTS, "negative_prompt": [NEGATIVE] * len(PROMPTS)}
    base = latents(**asked)
    expected = latents(**embeds)
    with attached(pipe, path):
        hooked = latents(**asked)
        for states, name in zip(encode(pipe, PROMPTS, NEGATIVE), embeds, strict=True):
            assert max_error(states, embeds[name]) < TOLERANCE
    assert max_error(hooked, expected) < TOLERANCE
    assert max_error(hooked[:2], base[:2]) > 0.01


def test_the_recorded_strength(pipe, tiny_pipeline, make):
    """It is what the handle starts from; a file of before it was recorded means 1."""
    concept, path = make("all")
    with attached(pipe, path) as handle:
        assert handle.strength == 1
    concept = concept.at(0.25)
    concept_file.save(path, concept)
    with attached(pipe, path) as handle:
        assert handle.strength == 0.25
        assert max_error(encode(pipe, PROMPTS)[0], ours(tiny_pipeline, PROMPTS, concept, None)) < TOLERANCE
    path.write_bytes(path.read_bytes().replace(b'"strength":"0.25"', b'"strength":"9.25"'))
    with pytest.raises(ValueError, match=r"strength 9.25; expected 0 \(the base model\) to 2"):
        catversion_torch.load(path)


def test_refused(pipe, make, tmp_path):
    concept, path = make("all")
    with pytest.raises(ValueError, match="expected a pipeline of Stable Diffusion"):
        catversion_torch.attach(pipe.text_encoder, path)
    with pytest.raises(ValueError, match=r"strength 3; expected 0"):
        catversion_torch.attach(pipe, path, strength=3)
    _, two = with_second(concept)
    concept_file.save(tmp_path / "two.safetensors", two)
    with pytest.raises(ValueError, match=r"for 2 text encoder\(s\), but this pipeline has 1"):
        catversion_torch.attach(pipe, tmp_path / "two.safetensors")
    bad = tmp_path / "bad.safetensors"
    concept_file.save(
        bad, dataclasses.replace(concept, method=dataclasses.replace(concept.method, layers=((2, 3, 4),)))
    )
    with pytest.raises(ValueError, match=r"in layers \(2, 3, 4\), the text encoder 4 layers of width 32"):
        catversion_torch.attach(pipe, bad)
    data = path.read_bytes()
    changes = {
        b"": "not a readable concept",
        data[:-4]: "tensor at 0 to 3072; expected 3072 bytes inside",
        b"\xff" * 8 + data[8:]: "not a readable concept",
        data.replace(b'"F32"', b'"F16"'): "tensor F16",
        data.replace(b'\\"all\\"', b'\\"any\\"'): "scope 'any'; expected one of all, trigger",
        data.replace(b'"format_version":"1"', b'"format_version":"2"'): "format version 2; expected 1",
        data.replace(b'"prefix":', b'"suffix":'): "not a readable concept",
    }
    for changed, message in changes.items():
        bad.write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            catversion_torch.load(bad)
    with bad.open("wb") as file:
        file.truncate(catversion_torch.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="larger than 64 MiB"):
        catversion_torch.load(bad)
    for module in pipe.text_encoder.modules():
        assert not module._forward_hooks
