"""Base models written by diffusers 0.39 and transformers 4.57, and single files read by diffusers' own converters."""

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlaxAutoencoderKL,
    FlaxUNet2DConditionModel,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from safetensors.numpy import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, FlaxCLIPTextModel

from catversion_jax.weights import ldm, source
from tests import ldm_files, tiny
from tests.weights.models import read

FAMILIES = tuple(ldm_files.CONFIGS)
SAVED = {
    "whole": ({}, ""),
    "fp16_in_shards": ({"variant": "fp16", "max_shard_size": "200KB"}, "fp16"),
    "bin": ({"safe_serialization": False}, ""),
}


def text_encoder(config: dict):
    kind = CLIPTextModelWithProjection if "CLIPTextModelWithProjection" in config["architectures"] else CLIPTextModel
    return kind(CLIPTextConfig(**{key: value for key, value in config.items() if key != "architectures"}))


MAKE = {
    "text": text_encoder,
    "text_2": text_encoder,
    "unet": lambda config: UNet2DConditionModel(**{k: v for k, v in config.items() if k != "_class_name"}),
    "vae": lambda config: AutoencoderKL(**{k: v for k, v in config.items() if k != "_class_name"}),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_folders(family, saved, tmp_path):
    options, variant = SAVED[saved]
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    models = {c: MAKE[c](config).half() for c, config in ldm_files.CONFIGS[family].items()}
    for component, model in models.items():
        model.save_pretrained(tmp_path / source.FOLDERS[component], **options)
    assert bool(variant) == bool(list(tmp_path.rglob("*.index.fp16.json")))
    assert (saved == "bin") == (not list(tmp_path.rglob("*.safetensors")))
    opened = source.open_source(str(tmp_path), variant=variant)
    assert set(opened.components) == models.keys()
    for component, model in models.items():
        back = tiny.to_torch(read(opened, component), opened.rules(component))
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        assert back.keys() == state.keys()
        for name, value in state.items():
            np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("family", FAMILIES)
def test_single_files_as_diffusers_reads_them(family, tmp_path):
    params, configs = ldm_files.random_params(family), ldm_files.CONFIGS[family]
    tensors = ldm_files.to_ldm(ldm_files.to_diffusers(params), family)
    save_file(tensors, tmp_path / "model.safetensors")
    opened = source.open_source(str(tmp_path / "model.safetensors"))
    file = {name: torch.from_numpy(np.array(value)) for name, value in tensors.items()}
    prefixes = {component: part.prefix for component, part in ldm.FAMILIES[FAMILIES.index(family)].texts.items()}
    models = {component: MAKE[component](config) for component, config in configs.items()}

    def text(component):
        if prefixes[component].endswith("transformer."):
            return convert_ldm_clip_checkpoint(file)
        return convert_open_clip_checkpoint(models[component], file, prefix=prefixes[component])

    theirs = {component: text(component) for component in prefixes}
    theirs["unet"] = convert_ldm_unet_checkpoint(dict(file), configs["unet"])
    theirs["vae"] = convert_ldm_vae_checkpoint(dict(file), configs["vae"])
    for component, converted in theirs.items():
        ours = tiny.to_torch(read(opened, component), ldm_files.RULES[component])
        assert ours.keys() == models[component].state_dict().keys()
        for name, value in ours.items():
            np.testing.assert_array_equal(value, converted[name].numpy())


PUBLISHED = {
    "sd1": {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sd2": {
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
    },
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "projection_class_embeddings_input_dim": 2816,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_published_unets_are_told_by_their_shapes(family):
    config = ldm_files.CONFIGS[family]["unet"] | PUBLISHED[family]
    with torch.device("meta"):
        state = MAKE["unet"](config).state_dict()
    shapes = {ldm_files.unet_name(name, config): tuple(value.shape) for name, value in state.items()}
    told = ldm.FAMILIES[FAMILIES.index(family)]
    assert ldm.unet_config(shapes, told, told.prediction_type) == config


def test_the_folders_of_the_last_flax_classes(tmp_path):
    configs, params = ldm_files.CONFIGS["sd1"], ldm_files.random_params("sd1")
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    flax_text = FlaxCLIPTextModel(CLIPTextConfig(**configs["text"]), _do_init=False)
    flax_text.save_pretrained(tmp_path / "text_encoder", params=params["text"])
    for component, kind in (("unet", FlaxUNet2DConditionModel), ("vae", FlaxAutoencoderKL)):
        config = {key: value for key, value in configs[component].items() if key != "_class_name"}
        config |= {key: tuple(value) for key, value in config.items() if isinstance(value, list)}
        kind(**config).save_pretrained(tmp_path / component, params[component])
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    assert len(list(tmp_path.rglob("*.msgpack"))) == 3
    opened = source.open_source(str(tmp_path))
    for component, expected in params.items():
        assert opened.rules(component) is None
        actual = read(opened, component)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)
