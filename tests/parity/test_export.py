"""What catversion export writes, at work in PyTorch: transformers' text encoder, a whole diffusers pipeline, and
ComfyUI's interface, against our own text states."""

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

from catversion_jax.methods import concept_file
from catversion_jax.sampling import conditioning, export
from tests import tiny
from tests.commands import catversion
from tests.conftest import max_error
from tests.parity import comfyui

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
    handle = catversion_torch.attach(pipe.text_encoder, path, tokenizer=pipe.tokenizer, **kwargs)
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
    with attached(pipe, path):
        states, _ = encode(pipe, prompts)
    assert max_error(states, ours(tiny_pipeline, prompts, concept)) < TOLERANCE


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


def test_the_second_text_encoder(pipe, tiny_pipeline, make, tmp_path):
    """A concept of SDXL holds a prefix for each text encoder; here the second is the first with other layers."""
    concept, _ = make("all")
    second, two = with_second(concept)
    path = tmp_path / "two.safetensors"
    concept_file.save(path, two)
    for encoder, expected in ((1, concept), (2, second)):
        with attached(pipe, path, encoder=encoder):
            states, _ = encode(pipe, PROMPTS)
        assert max_error(states, ours(tiny_pipeline, PROMPTS, expected)) < TOLERANCE
    with pytest.raises(ValueError, match=r"for 2 text encoder\(s\); expected one for encoder 3"):
        catversion_torch.attach(pipe.text_encoder, path, pipe.tokenizer, encoder=3)


@pytest.mark.parametrize("scope", ["all", "trigger"])
def test_base_model_bit_for_bit(pipe, make, scope):
    _, path = make(scope)
    states, negative = encode(pipe, PROMPTS, NEGATIVE)
    with attached(pipe, path) as handle:
        assert not torch.equal(encode(pipe, PROMPTS, NEGATIVE)[0], states)
        assert not torch.equal(encode(pipe, PROMPTS, NEGATIVE)[1], negative)  # as nobody said what it is
        handle.negatives.add(NEGATIVE)
        assert torch.equal(encode(pipe, PROMPTS, NEGATIVE)[1], negative)
        with handle.disabled():
            assert torch.equal(encode(pipe, PROMPTS)[0], states)
        assert not torch.equal(encode(pipe, PROMPTS)[0], states)
        assert torch.equal(encode(pipe, ["a car"])[0], encode(pipe, ["a car"])[0])
        handle.strength = 0
        assert torch.equal(encode(pipe, PROMPTS)[0], states)
    for module in pipe.text_encoder.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks
    assert torch.equal(encode(pipe, PROMPTS)[0], states)


def test_half_precision(pipe, make):
    _, path = make("all")
    with attached(pipe, path):
        single, _ = encode(pipe, PROMPTS)
    encoder = copy.deepcopy(pipe.text_encoder).bfloat16()
    catversion_torch.attach(encoder, path, pipe.tokenizer)
    ids = pipe.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")["input_ids"]
    half = encoder(ids).last_hidden_state
    assert half.dtype == torch.bfloat16
    assert max_error(half.detach().float(), single) < 0.1


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
    with attached(pipe, path) as handle:
        handle.negatives.add(NEGATIVE)
        hooked = latents(**asked)
        for states, name in zip(encode(pipe, PROMPTS, NEGATIVE), embeds, strict=True):
            assert max_error(states, embeds[name]) < TOLERANCE
    assert max_error(hooked, expected) < TOLERANCE
    assert max_error(hooked[:2], base[:2]) > 0.01


def test_the_recorded_strength(pipe, tiny_pipeline, make, tmp_path):
    """It is what the handle and the node start from; a file of before it was recorded means 1."""
    concept, path = make("all")
    with attached(pipe, path) as handle:
        assert handle.strength == 1
    concept = concept.at(0.25)
    concept_file.save(path, concept)
    with attached(pipe, path) as handle:
        assert handle.strength == 0.25
        assert max_error(encode(pipe, PROMPTS)[0], ours(tiny_pipeline, PROMPTS, concept, None)) < TOLERANCE
    catversion("export", "--embedding", path, "--out", tmp_path / "out", "--strength=0.75")
    folder = tmp_path / "out" / "comfyui_catversion"
    node = load_module("comfyui_strength", folder / "__init__.py").NODE_CLASS_MAPPINGS["ApplyCatVersion"]
    assert node.INPUT_TYPES()["required"]["strength"][1]["default"] == 0.75
    (folder / concept_file.FILE_NAME).write_bytes(b"damaged")
    assert node.INPUT_TYPES()["required"]["strength"][1]["default"] == 1
    path.write_bytes(path.read_bytes().replace(b'"strength":"0.25"', b'"strength":"9.25"'))
    with pytest.raises(ValueError, match=r"strength 9.25; expected 0 \(the base model\) to 2"):
        catversion_torch.load(path)


def test_refused(pipe, make, tmp_path):
    concept, path = make("all")
    with attached(pipe, path), pytest.raises(ValueError, match="holds a concept already"):
        catversion_torch.attach(pipe.text_encoder, path, pipe.tokenizer)
    with pytest.raises(ValueError, match="expected a transformers CLIPTextModel"):
        catversion_torch.attach(pipe.unet, path, pipe.tokenizer)
    with pytest.raises(ValueError, match=r"strength 3; expected 0"):
        catversion_torch.attach(pipe.text_encoder, path, pipe.tokenizer, strength=3)
    bad = tmp_path / "bad.safetensors"
    concept_file.save(
        bad, dataclasses.replace(concept, method=dataclasses.replace(concept.method, layers=((2, 3, 4),)))
    )
    with pytest.raises(ValueError, match=r"in layers \(2, 3, 4\), the text encoder 4 layers of width 32"):
        catversion_torch.attach(pipe.text_encoder, bad, pipe.tokenizer)
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
        assert "forward" not in vars(module)


@pytest.mark.parametrize("scope", ["all", "trigger"])
def test_comfyui(pipe, tiny_pipeline, make, tmp_path, scope):
    """The node on ComfyUI's interface: the clone has the concept, the CLIP it came from has not, in any order."""
    concept, path = make(scope)
    catversion("export", "--embedding", path, "--out", tmp_path / "out")
    package = load_module("comfyui_catversion", tmp_path / "out" / "comfyui_catversion" / "__init__.py")
    node = package.NODE_CLASS_MAPPINGS["ApplyCatVersion"]
    inputs = node.INPUT_TYPES()["required"]
    assert inputs["concept"] == ([concept_file.FILE_NAME],)
    assert inputs["strength"][1] == {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05}
    assert node.IS_CHANGED(clip=None, concept=concept_file.FILE_NAME, strength=[1.0]) > 0

    clip = comfyui.CLIP(pipe.text_encoder, pipe.tokenizer)
    base = {prompt: clip.encode(prompt) for prompt in PROMPTS}
    assert max_error(base[PROMPTS[0]], ours(tiny_pipeline, PROMPTS[:1])) < TOLERANCE

    def apply(clip, strength):
        return getattr(node(), node.FUNCTION)(clip, concept_file.FILE_NAME, strength)[0]

    clones = {strength: apply(clip, strength) for strength in (1.0, 0.05, 1.5, 0.0)}
    for prompt, (strength, clone) in itertools.product(PROMPTS, clones.items()):
        assert max_error(clone.encode(prompt), ours(tiny_pipeline, [prompt], concept, strength)) < TOLERANCE
        assert torch.equal(clip.encode(prompt), base[prompt])
    assert torch.equal(clones[1.0].encode(""), clip.encode(""))
    vector = torch.zeros(32)  # a textual inversion between the words
    assert clones[1.0].encode("a teapot", vector).shape == (1, 77, 32)
    with pytest.raises(ValueError, match="holds a concept already"):
        apply(clones[1.0], 1.0)
    message = r"for 1 text encoder\(s\), but this CLIP has 2 \(clip_l, clip_g\)"
    with pytest.raises(ValueError, match=message):
        apply(comfyui.CLIP(pipe.text_encoder, pipe.tokenizer, ("clip_l", "clip_g")), 1.0)

    second, two = with_second(concept)
    concept_file.save(tmp_path / "out" / "comfyui_catversion" / concept_file.FILE_NAME, two)
    pair = apply(comfyui.CLIP(pipe.text_encoder, pipe.tokenizer, ("clip_l", "clip_g")), 1.0)
    expected = np.concatenate([ours(tiny_pipeline, PROMPTS[:1], c) for c in (concept, second)], -1)
    assert max_error(pair.encode(PROMPTS[0]), expected) < TOLERANCE
