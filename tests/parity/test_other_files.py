"""Embeddings and LoRAs of other programs: what they do here is what they do in diffusers and in ComfyUI."""

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
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from catversion_jax.base import lora
from catversion_jax.methods import concept_file
from catversion_jax.sampling import conditioning
from tests import tiny
from tests.conftest import max_error
from tests.parity import comfyui

TOLERANCE = 1e-4
PROMPTS = ["a photo of <toy>", "<toy>, on the beach", "a <toy> and a <toy>", "a car"]


@pytest.fixture(scope="module")
def xl_model(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("xl"), changes=tiny.XL_CHANGES)


def pipe_of(model, kind=StableDiffusionPipeline):
    """A pipeline of its own: what is loaded stays in its parts."""
    parts = {
        "vae": AutoencoderKL, "text_encoder": CLIPTextModel, "unet": UNet2DConditionModel,
        **({"text_encoder_2": CLIPTextModelWithProjection} if kind is StableDiffusionXLPipeline else {}),
    }  # fmt: skip
    loaded = {name: part.from_pretrained(model / name, torch_dtype=torch.float32) for name, part in parts.items()}
    words = ["tokenizer", *(["tokenizer_2"] if len(parts) > 3 else [])]
    loaded |= {name: CLIPTokenizer.from_pretrained(model / name) for name in words}
    loaded["scheduler"] = DDIMScheduler.from_pretrained(model / "scheduler")
    if kind is StableDiffusionPipeline:
        loaded |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(**loaded)


@torch.no_grad()
def encode(pipe, prompts):
    return pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)


@pytest.mark.parametrize("count", [1, 3])
def test_an_embedding_in_diffusers(tiny_model, tiny_pipeline, tmp_path, count):
    """At every place of the word, with the positions that the vectors have there."""
    vectors = torch.randn(count, 32, generator=torch.Generator().manual_seed(0))
    save_file({"<toy>": vectors[0] if count == 1 else vectors}, tmp_path / "learned_embeds.safetensors")
    pipe = pipe_of(tiny_model)
    pipe.load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    concept = concept_file.load(tmp_path / "learned_embeds.safetensors")
    for prompt in PROMPTS:
        states, _ = encode(pipe, [prompt])
        assert max_error(conditioning.context(tiny_pipeline, [prompt], concept).states, states) < TOLERANCE, prompt


def test_files_of_torch(tiny_model, tiny_pipeline, tmp_path):
    """As torch.save itself writes them, with a parameter among them; by AUTOMATIC1111's names and by diffusers'."""
    vectors = torch.nn.Parameter(torch.randn(2, 32, generator=torch.Generator().manual_seed(0)))
    torch.save(
        {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "toy", "step": 5}, tmp_path / "a.pt"
    )
    torch.save({"toy": vectors.detach().half()}, tmp_path / "b.bin")
    (tmp_path / "embeddings").mkdir()
    torch.save({"string_to_param": {"*": vectors.detach()}}, tmp_path / "embeddings" / "toy.pt")
    clip = comfyui.sd_clip(tiny_model, tmp_path / "embeddings")
    states, _ = comfyui.encode(clip, "a photo of embedding:toy on the beach")
    for name, tolerance in (("a.pt", TOLERANCE), ("b.bin", 0.01)):
        concept = concept_file.load(tmp_path / name)
        assert concept.class_word == "toy"
        ours = conditioning.context(tiny_pipeline, ["a photo of toy on the beach"], concept).states
        assert max_error(ours, states) < tolerance


def test_an_embedding_of_sdxl(xl_model, tmp_path):
    """With vectors for both text encoders."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(2, size, generator=generator) for name, size in (("clip_l", 32), ("clip_g", 48))}
    save_file(tensors, tmp_path / "toy.safetensors")
    pipe, pipeline = pipe_of(xl_model, StableDiffusionXLPipeline), tiny.load(xl_model)
    for name, encoder, tokenizer in (
        ("clip_l", pipe.text_encoder, pipe.tokenizer),
        ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
    ):
        pipe.load_textual_inversion(tensors[name], token="<toy>", text_encoder=encoder, tokenizer=tokenizer)
    concept = concept_file.load(tmp_path / "toy.safetensors")
    states, _, pooled, _ = encode(pipe, ["a photo of <toy>"])
    ours = conditioning.context(pipeline, ["a photo of toy"], concept)
    assert max_error(ours.states, states) < TOLERANCE
    assert max_error(ours.pooled, pooled) < TOLERANCE


BLOCK = "attentions.0.transformer_blocks.0"
LAYERS = {
    "unet": [
        f"down_blocks.0.{BLOCK}.attn1.to_q",
        f"down_blocks.0.{BLOCK}.attn2.to_out.0",
        "down_blocks.0.attentions.0.proj_in",
        "down_blocks.0.resnets.0.conv1",
        f"mid_block.{BLOCK}.ff.net.0.proj",
        f"up_blocks.1.{BLOCK}.attn2.to_v",
    ],
    "text_encoder": ["text_model.encoder.layers.0.self_attn.q_proj", "text_model.encoder.layers.2.mlp.fc1"],
}


def matrices(pipe, layers=LAYERS) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random ones of rank 4 for each layer: down and up."""
    generator, found = torch.Generator().manual_seed(0), {}
    for part, names in layers.items():
        modules = dict(getattr(pipe, part).named_modules())
        for name in names:
            weight = modules[name].weight
            down = torch.randn(4, *weight.shape[1:], generator=generator) * 0.3
            up = torch.randn(weight.shape[0], 4, *[1] * (weight.ndim - 2), generator=generator) * 0.3
            found[f"{part}.{name}"] = (down, up)
    return found


def write(path, layers, names: str, alpha: float | None) -> None:
    tensors = {}
    for name, (down, up) in layers.items():
        part, module = name.split(".", 1)
        if names == "kohya":
            start = f"lora_{'te' if part == 'text_encoder' else 'unet'}_{module.replace('.', '_')}"
            tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
            tensors[f"{start}.alpha"] = torch.tensor(alpha)
        else:
            tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(tensors, path)


@pytest.mark.parametrize("names", ["kohya", "diffusers"])
@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_a_lora(tiny_model, tiny_pipeline, tmp_path, names, scale):
    """Text states as in ComfyUI, and the UNet's prediction as in diffusers; with kohya's alpha."""
    pipe = pipe_of(tiny_model)
    write(tmp_path / "style.safetensors", matrices(pipe), names, 2.0)
    rng = np.random.default_rng(0)
    latents, context = rng.normal(size=(1, 4, 8, 8)), rng.normal(size=(1, 77, 32))
    given = [torch.tensor(latents, dtype=torch.float32), 500, torch.tensor(context, dtype=torch.float32)]
    with torch.no_grad():
        before = pipe.unet(*given).sample
        pipe.load_lora_weights(tmp_path, weight_name="style.safetensors")
        pipe.fuse_lora(lora_scale=scale)
        predicted = pipe.unet(*given).sample
    assert max_error(predicted, before) > 0.01
    ours = lora.merge_lora(tiny_pipeline, lora.read_lora(tmp_path / "style.safetensors"), scale)
    inputs = np.float32(latents.transpose(0, 2, 3, 1)), np.int32([500]), np.float32(context)
    out = ours.networks.unet.apply({"params": ours.params["unet"]}, *inputs)
    assert max_error(np.asarray(out).transpose(0, 3, 1, 2), predicted) < TOLERANCE
    states, _ = comfyui.encode(with_lora(comfyui.sd_clip(tiny_model), tmp_path / "style.safetensors", scale), "a car")
    assert max_error(states, conditioning.context(tiny_pipeline, ["a car"]).states) > 0.01
    assert max_error(conditioning.context(ours, ["a car"]).states, states) < TOLERANCE


def with_lora(clip, path, scale):
    """ComfyUI's CLIP with a LoRA, as its node loads one."""
    import comfy.lora
    import comfy.lora_convert

    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    patched = clip.clone()
    patched.add_patches(comfy.lora.load_lora(comfy.lora_convert.convert_lora(load_file(path)), names), scale)
    return patched


def test_kohyas_names_for_sdxl(xl_model, tmp_path):
    """Both text encoders as in ComfyUI, and the UNet's layers by the original layout's names as by diffusers'."""
    pipe, pipeline = pipe_of(xl_model, StableDiffusionXLPipeline), tiny.load(xl_model)
    module = "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_q"
    layers = {
        "text_encoder": ["text_model.encoder.layers.0.self_attn.k_proj"],
        "text_encoder_2": ["text_model.encoder.layers.1.mlp.fc2"],
        "unet": [module],
    }
    spelled = {
        "text_encoder": "lora_te1_text_model_encoder_layers_0_self_attn_k_proj",
        "text_encoder_2": "lora_te2_text_model_encoder_layers_1_mlp_fc2",
        "unet": "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_q",
    }
    tensors = {}
    for name, (down, up) in matrices(pipe, layers).items():
        start = spelled[name.split(".", 1)[0]]
        tensors |= {f"{start}.lora_down.weight": down, f"{start}.lora_up.weight": up}
        tensors[f"{start}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "style.safetensors")
    ours = lora.merge_lora(pipeline, lora.read_lora(tmp_path / "style.safetensors"), 1.0)
    clip = with_lora(comfyui.sdxl_clip(xl_model), tmp_path / "style.safetensors", 1.0)
    states, pooled = comfyui.encode(clip, "a car")
    context = conditioning.context(ours, ["a car"])
    assert max_error(context.states, states) < TOLERANCE
    assert max_error(context.pooled, pooled) < TOLERANCE
    down, up = matrices(pipe, layers)[f"unet.{module}"]
    weight = dict(pipe.unet.named_modules())[module].weight.detach() + 2 / 4 * up @ down
    block = ours.params["unet"]["down_blocks_1"]["attentions_0"]["transformer_blocks_1"]
    assert max_error(block["attn2"]["to_q"]["kernel"].T, weight) < TOLERANCE
