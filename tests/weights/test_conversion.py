"""The conversion tables: everything is covered once, and what is not is listed."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from catversion_jax.base import pipeline
from catversion_jax.models.sharding import make_mesh, sharding
from catversion_jax.utils.errors import UserError
from catversion_jax.weights import rules
from catversion_jax.weights.conversion import from_torch
from catversion_jax.weights.source import FOLDERS, RULES, open_source
from catversion_jax.weights.weight_files import open_weights
from tests import tiny

MODEL_FILES = {
    name: f"{part}/{'model' if name == 'text' else 'diffusion_pytorch_model'}.safetensors"
    for name, part in FOLDERS.items()
    if part in tiny.CHANGES
}


@pytest.fixture(scope="module")
def text(tiny_model):
    """The tiny text encoder's tensors and the shapes they must fill."""
    module, _ = pipeline.load_component(open_source(str(tiny_model)), "text")
    return load_file(tiny_model / MODEL_FILES["text"]), pipeline.abstract("text", module)


@pytest.mark.parametrize("name", ["text", "unet", "vae"])
def test_the_way_back_gives_the_same_files(tiny_model, name):
    _module, params = pipeline.load_component(open_source(str(tiny_model)), name)
    back = tiny.to_torch(params, RULES[name])
    original = load_file(tiny_model / MODEL_FILES[name])
    assert back.keys() == original.keys()
    for key, value in original.items():
        np.testing.assert_array_equal(back[key].astype(np.float16), value)


def refused(tensors, shapes, *expected):
    with pytest.raises(UserError) as error:
        from_torch(tensors, rules.CLIP_TEXT, shapes, "folder/text_encoder")
    for part in ("folder/text_encoder", *expected):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_and_missing_and_misshapen_tensors_are_listed(text):
    tensors, shapes = text
    refused(tensors | {"text_model.extra.weight": np.zeros(3)}, shapes, "no rule for: text_model.extra.weight")
    lost = dict(tensors)
    del lost["text_model.encoder.layers.1.mlp.fc1.bias"]
    refused(lost, shapes, "missing: text_model/encoder/layers/1/mlp/fc1/bias")
    key = "text_model.final_layer_norm.weight"
    refused(tensors | {key: np.zeros(7, np.float16)}, shapes, f"wrong shape: {key} (7,), expected (32,)")
    one_more = {"text_model.encoder.layers.4.layer_norm1.bias": np.zeros(32)}
    refused(tensors | one_more, shapes, "not part of this model: text_model.encoder.layers.4.layer_norm1.bias")


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(text, dtype, value):
    """In each position and with either sign; the largest numbers that a type has are taken."""
    tensors, shapes = text
    name = "text_model.encoder.layers.1.mlp.fc1.bias"
    largest = np.full(64, min(float(jnp.finfo(dtype).max), 3e38), dtype)
    from_torch(tensors | {name: largest}, rules.CLIP_TEXT, shapes, "x")
    for position in (0, 33, 63):
        bad = -largest
        bad[position] = value
        refused(tensors | {name: bad}, shapes, f"folder/text_encoder: {name} holds NaN, or numbers too large")


def test_numbers_too_large_for_float32_are_refused(text):
    tensors, shapes = text
    name = "text_model.encoder.layers.1.mlp.fc1.bias"
    refused(tensors | {name: np.full(64, 1e39)}, shapes, f"{name} holds NaN, or numbers too large for float32")


@pytest.mark.parametrize("component", ["text", "unet", "vae"])
def test_a_model_with_a_nan_is_refused_by_component_and_tensor(tiny_model, tmp_path, component):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tensors = load_file(model / MODEL_FILES[component])
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name].reshape(-1)[7] = np.nan
    save_file(tensors, model / MODEL_FILES[component])
    with pytest.raises(UserError) as error:
        tiny.load(model)
    assert f"{model}: {component}: {name} holds NaN" in str(error.value)


def test_a_tokenizer_of_another_model_is_refused(tiny_model, tmp_path):
    """Ids without an embedding, and positions without one: both files are named."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "tokenizer" / "added_tokens.json").write_text('{"<cat>": 1584}')
    with pytest.raises(UserError, match=r"tokenizer/vocab\.json: 1585 token ids, but .*model: text's config"):
        tiny.load(model)
    (model / "tokenizer" / "added_tokens.json").unlink()
    (model / "tokenizer" / "tokenizer_config.json").write_text('{"model_max_length": 78}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json: model_max_length=78, but .* max_position_emb"):
        tiny.load(model)


def test_an_end_token_of_another_tokenizer_is_refused(tmp_path):
    """SDXL pools the state at the end token, which has to be in the prompts."""
    model = tiny.write(tmp_path / "model", changes=tiny.XL_CHANGES)
    path = model / "text_encoder_2" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 49407}))
    with pytest.raises(UserError, match=r"vocab\.json: the end token is 1583, but .*: text_2's config"):
        tiny.load(model)


def test_parts_of_different_models_are_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text()) | {"cross_attention_dim": 48}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="the UNet takes text states of 48 channels, but the text encoder gives 32"):
        tiny.load(model)


def test_old_and_new_spelling_at_once_is_refused(tiny_model):
    module, _ = pipeline.load_component(open_source(str(tiny_model)), "vae")
    tensors = load_file(tiny_model / MODEL_FILES["vae"])
    old = {key.replace("to_q", "query"): value for key, value in tensors.items()}
    assert old.keys() != tensors.keys()
    from_torch(old, rules.VAE, pipeline.abstract("vae", module), "vae")
    with pytest.raises(UserError, match=r"given twice: .*query"):
        from_torch(tensors | old, rules.VAE, pipeline.abstract("vae", module), "vae")


def test_overlapping_rules_are_refused(text):
    tensors, shapes = text
    with pytest.raises(UserError, match="several rules for: text_model"):
        from_torch(tensors, [*rules.CLIP_TEXT, rules.Rule("text_model.final_layer_norm", "x", "norm")], shapes, "x")


def test_known_but_unneeded_tensors_are_dropped(text):
    tensors, shapes = text
    ids = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    params = from_torch(tensors | ids, rules.CLIP_TEXT, shapes, "x")
    assert jax.tree.structure(params) == jax.tree.structure(shapes)


def test_shards_and_dtypes_give_the_same_model(tiny_model, tmp_path):
    whole = load_file(tiny_model / MODEL_FILES["unet"])
    names = sorted(whole)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({key: whole[key].astype(np.float32) for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in shards.items() for key in keys}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    _, tensors = open_weights(tmp_path)
    assert tensors.keys() == whole.keys()
    module, params = pipeline.load_component(open_source(str(tiny_model)), "unet")
    sharded = from_torch(tensors, rules.UNET, pipeline.abstract("unet", module), "unet")
    jax.tree.map(np.testing.assert_array_equal, sharded, params)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"lists shards that are not beside it: b\.safetensors"):
        open_weights(tmp_path)


def test_damaged_and_absent_weights(tiny_model, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes((tiny_model / MODEL_FILES["text"]).read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        open_weights(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"no weights; expected model\.safetensors or"):
        open_weights(tmp_path)


def test_fingerprint_tells_models_apart(tiny_pipeline, tmp_path):
    assert tiny.load(tiny.write(tmp_path / "other", seed=1)).fingerprint != tiny_pipeline.fingerprint
    assert tiny.load(tiny.write(tmp_path / "same", dtype=np.float32)).fingerprint is not None


def test_parameters_go_straight_to_where_they_belong(tiny_model, tiny_pipeline):
    mesh = make_mesh(1, 2, devices=jax.devices())
    loaded = pipeline.load_pipeline(pipeline.ModelConfig(str(tiny_model)), mesh)
    for leaf in jax.tree.leaves(loaded.params):
        assert leaf.sharding.is_equivalent_to(sharding(mesh, "frozen"), leaf.ndim)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, tiny_pipeline.params)
    assert loaded.fingerprint == tiny_pipeline.fingerprint


def test_another_network_is_refused(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text()) | {"num_class_embeds": 1000}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"not supported: num_class_embeds=1000 \(only None\)"):
        tiny.load(model)
