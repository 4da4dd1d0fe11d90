"""The encoders that judge pictures: the mini model's, CLIP's and DINO's folders; what is none of them is refused."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from catversion_jax.base.pipeline import MINI
from catversion_jax.evaluation import encoders
from catversion_jax.models.clip import CLIPVisionConfig, CLIPVisionModel
from catversion_jax.models.vit import ViTConfig, ViTModel
from catversion_jax.utils import tree
from catversion_jax.utils.errors import UserError
from catversion_jax.weights.conversion import shapes_of
from tests import tiny
from tests.conftest import max_error


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny.write_clip(tmp_path_factory.mktemp("encoders") / "clip")


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory):
    return tiny.write_dino(tmp_path_factory.mktemp("encoders") / "dino")


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def test_the_mini_models_encoders_are_pytorchs(golden):
    """From a picture and a prompt to embeddings: the golden pixels, turned back into pictures."""
    clip = encoders.of_model(MINI)
    mean, std = (np.float32(x) for x in (clip.image.preprocessing.mean, clip.image.preprocessing.std))
    pixels = golden["image.pixel_values"]
    images = np.round((pixels * std + mean) * 255).astype(np.uint8)
    np.testing.assert_allclose(np.stack([clip.image.preprocessing(image) for image in images]), pixels, atol=1e-5)
    assert max_error(clip.image(images), unit(golden["image.image_embeds"])) < 1e-5
    assert max_error(clip.text(list(golden["prompts"])), unit(golden["text.text_embeds"])) < 1e-5


def test_preprocessing_squares_by_the_shorter_edge():
    """Against Pillow by hand: the shorter edge to 16, of the longer one the middle."""
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    preprocessing = encoders.Preprocessing(16, 12, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    resized = np.asarray(Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC), np.float64) / 255
    expected = (resized[2:14, 6:18] - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.4]
    assert max_error(preprocessing(image), expected) < 1e-5
    turned = preprocessing(image.swapaxes(0, 1).copy())
    assert turned.shape == (12, 12, 3)


VISION = {
    "B/32": CLIPVisionConfig(),
    "L/14": CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14,
        projection_dim=768,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (CLIPVisionModel(VISION["B/32"]), 87_849_216),
        (CLIPVisionModel(VISION["L/14"]), 303_966_208),
        (ViTModel(ViTConfig()), 21_665_664),
    ],
    ids=["clip-b32", "clip-l14", "dino-s16"],
)
def test_published_sizes(module, count):
    shapes = shapes_of(module.init, jnp.zeros((1, 224, 224, 3)))
    assert tree.count_numbers(shapes) == count
    assert encoders.dino_preprocessing(224).edge == 256
    assert encoders.clip_preprocessing(224).edge == 224


def test_a_clip_folder(clip_folder):
    clip = encoders.load_clip(str(clip_folder))
    images = list(np.random.default_rng(0).integers(0, 256, (3, 50, 40, 3), np.uint8))
    embeddings, texts = clip.image(images), clip.text(["a teapot", "a car"])
    assert embeddings.shape == (3, 24)
    assert texts.shape == (2, 24)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(clip.image(images[:1]), embeddings[:1], atol=1e-6)  # not its neighbours' business
    assert clip.image.described()["patch"] == 16


def test_a_dino_folder(dino_folder, tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (2, 50, 40, 3), np.uint8))
    embeddings = encoders.load_dino(str(dino_folder))(images)
    assert embeddings.shape == (2, 32)
    pooled = shutil.copytree(dino_folder, tmp_path / "pooled")  # transformers adds a pooler that was never trained
    pooler = {"pooler.dense.weight": np.ones((32, 32), np.float32), "pooler.dense.bias": np.ones(32, np.float32)}
    save_file(load_file(pooled / "model.safetensors") | pooler, pooled / "model.safetensors")
    np.testing.assert_array_equal(encoders.load_dino(str(pooled))(images), embeddings)


def test_what_is_refused(clip_folder, dino_folder, tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"no image_encoder/.*name a CLIP"):
        encoders.of_model(tiny_model)
    with pytest.raises(UserError, match=r"clip=.*nowhere: no such folder; expected a folder with config.json"):
        encoders.load_clip(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"config.json: model_type 'vit'; clip expects a transformers CLIPModel"):
        encoders.load_clip(str(dino_folder))
    with pytest.raises(UserError, match=r"config.json: model_type 'clip'; dino expects a transformers ViTModel"):
        encoders.load_dino(str(clip_folder))
    with pytest.raises(UserError, match=r"config.json: no such file; dino expects"):
        encoders.load_dino(str(tmp_path))
    broken = shutil.copytree(clip_folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 64
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="wrong shape: vision_model"):
        encoders.load_clip(str(broken))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": None}, "Expected `object`, got `null` - at `$.text_config`"),
        ({"vision_config": [1]}, "Expected `object`, got `array` - at `$.vision_config`"),
        ({"projection_dim": "24"}, "Expected `int`, got `str` - at `$.projection_dim`"),
        ({"vision_config": {"hidden_size": None}}, "config.json: CLIPVisionConfig: Expected `int`, got `null`"),
        ({"text_config": {"num_attention_heads": 7}}, "config.json: CLIPTextConfig: num_attention_heads=7 does not"),
    ],
)
def test_wrong_values_of_a_clips_config(clip_folder, tmp_path, changes, message):
    broken = shutil.copytree(clip_folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError) as error:
        encoders.load_clip(str(broken))
    assert message in str(error.value)


def test_an_image_encoder_as_transformers_5_saves_it(tmp_path):
    """Without the prefix in the tensors' names."""
    images = list(np.random.default_rng(0).integers(0, 256, (1, 50, 40, 3), np.uint8))
    model = shutil.copytree(MINI, tmp_path / "model")
    for part, prefix in (("image_encoder", "vision_model."), ("text_encoder", "text_model.")):
        tensors = load_file(model / part / "model.safetensors")
        renamed = {name.removeprefix(prefix): value for name, value in tensors.items()}
        assert renamed.keys() != tensors.keys()
        save_file(renamed, model / part / "model.safetensors")
    clip, expected = encoders.of_model(model), encoders.of_model(MINI)
    np.testing.assert_array_equal(clip.image(images), expected.image(images))
    np.testing.assert_array_equal(clip.text(["a teapot"]), expected.text(["a teapot"]))
