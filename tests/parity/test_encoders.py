"""CLIPModel and ViTModel as transformers (PyTorch) saves them, at narrowed width: the same embeddings of pictures."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    ViTConfig,
    ViTModel,
)

from catversion_jax.base import pipeline
from catversion_jax.evaluation import encoders

PROMPTS = ["a photo of a teapot on the beach", "a blue robot"]
IMAGES = [
    np.asarray(Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 7, 3), np.uint8)).resize(size))
    for i, size in enumerate([(300, 240), (100, 333)])
]
WIDTHS = {  # of the layers and shapes of the published models: patch 32 of 224, and 14 of 224
    "B/32": ({"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4}, 32, 12),
    "L/14": ({"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}, 14, 24),
}


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight random, so that no bias is zero."""
    for weights in model.parameters():
        torch.nn.init.normal_(weights, mean=float(weights.ndim == 1), std=0.05)
    return model.eval()


def close(actual: np.ndarray, theirs: torch.Tensor) -> None:
    expected = torch.nn.functional.normalize(theirs.double(), dim=-1).numpy()
    error = np.abs(actual - expected).max()
    print(f"max-abs error {error:.1e}")
    assert error < 2e-5


@pytest.mark.parametrize("saved", [{}, {"safe_serialization": False}], ids=["safetensors", "bin"])
@pytest.mark.parametrize("size", WIDTHS)
def test_clip(size, saved, tmp_path):
    torch.manual_seed(0)
    width, patch, layers = WIDTHS[size]
    text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "eos_token_id": 1583}
    config = CLIPConfig(
        text_config=text | {"vocab_size": 1584, "bos_token_id": 1582},  # 12 layers, as by default, and so not written
        vision_config=width | {"patch_size": patch, "num_hidden_layers": layers},
        projection_dim=24,
    )
    theirs = randomize(CLIPModel(config))
    tokenizer = CLIPTokenizer.from_pretrained(pipeline.MINI / "tokenizer")
    for part in (theirs, tokenizer):
        part.save_pretrained(tmp_path, **(saved if part is theirs else {}))
    ours = encoders.load_clip(str(tmp_path))
    pixels = CLIPImageProcessor()([Image.fromarray(image) for image in IMAGES], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(
        np.stack([ours.image.preprocessing(image) for image in IMAGES]), pixels.permute(0, 2, 3, 1), atol=1e-5
    )
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        close(ours.image(IMAGES), theirs.get_image_features(pixels))
        close(ours.text(PROMPTS), theirs.get_text_features(tokens["input_ids"]))


@pytest.mark.parametrize("pooler", [True, False])
def test_dino(pooler, tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, intermediate_size=192, num_attention_heads=6, patch_size=16)
    theirs = randomize(ViTModel(config, add_pooling_layer=pooler))
    theirs.save_pretrained(tmp_path)
    ours = encoders.load_dino(str(tmp_path))
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    processor = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=224, **imagenet)
    pixels = processor([Image.fromarray(image) for image in IMAGES], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(
        np.stack([ours.preprocessing(image) for image in IMAGES]), pixels.permute(0, 2, 3, 1), atol=1e-5
    )
    with torch.no_grad():
        close(ours(IMAGES), theirs(pixels).last_hidden_state[:, 0])
