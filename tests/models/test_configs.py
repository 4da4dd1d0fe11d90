"""Values of config.json and scheduler_config.json that are wrong: each is refused, named, before anything is traced."""

import numpy as np
import pytest

from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.base.pipeline import read_text_config
from catversion_jax.base.schedulers import check_options, plan
from catversion_jax.models.clip import CLIPVisionConfig
from catversion_jax.models.unet import UNetConfig
from catversion_jax.models.vae import VAEConfig
from catversion_jax.models.vit import ViTConfig
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.json_config import from_json
from tests.ldm_files import CONFIGS, TEXT, UNET, VAE

READERS = {
    "text": lambda changes: read_text_config(TEXT | changes, np.float32),
    "image": lambda changes: from_json(CLIPVisionConfig, changes, {}),
    "vit": lambda changes: from_json(ViTConfig, changes, {}),
    "unet": lambda changes: UNetConfig.from_json(UNET | changes),
    "sdxl": lambda changes: UNetConfig.from_json(CONFIGS["sdxl"]["unet"] | changes),
    "vae": lambda changes: VAEConfig.from_json(VAE | changes),
    "noise": NoiseSchedule.from_json,
    "options": lambda changes: check_options(NoiseSchedule.from_json(changes)),
    "plan": lambda changes: plan(NoiseSchedule.from_json(changes), "ddim", 10),
}

WRONG = [
    ("text", "hidden_size", "64", "Expected `int`, got `str` - at `$.hidden_size`"),
    ("text", "hidden_size", [64], "Expected `int`, got `array`"),
    ("text", "hidden_size", -64, "Expected `int` >= 1"),
    ("text", "hidden_size", 2**40, "Expected `int` <= 65536"),
    ("text", "num_attention_heads", 7, "num_attention_heads=7 does not divide hidden_size=64"),
    ("text", "num_attention_heads", None, "got `null` - at `$.num_attention_heads`"),
    ("text", "num_attention_heads", 0, "Expected `int` >= 1"),
    ("text", "num_hidden_layers", 10**9, "Expected `int` <= 128"),
    ("text", "hidden_act", "gelu_new", "hidden_act='gelu_new', expected one of quick_gelu, gelu"),
    ("text", "hidden_act", ["gelu"], "Expected `str`, got `array`"),
    ("text", "layer_norm_eps", "1e-5", "Expected `float`, got `str`"),
    ("text", "layer_norm_eps", 0, "Expected `float` > 0"),
    ("text", "vocab_size", 2**31, "Expected `int` <= 1048576"),
    ("text", "vocab_size", True, "Expected `int`, got `bool`"),
    ("text", "max_position_embeddings", {}, "Expected `int`, got `object`"),
    ("text", "eos_token_id", None, "Expected `int`, got `null`"),
    ("text", "eos_token_id", 2**70, "Expected `int` <= 1048575"),
    ("text", "eos_token_id", -1, "Expected `int` >= 0"),
    ("text", "attention_dropout", [0.1], "not supported: attention_dropout=[0.1] (only 0.0)"),
    ("image", "patch_size", 500, "patch_size=500 exceeds image_size=224"),
    ("image", "image_size", 10**6, "Expected `int` <= 2048"),
    ("vit", "num_attention_heads", 5, "num_attention_heads=5 does not divide hidden_size=384"),
    ("vit", "patch_size", "16", "Expected `int`, got `str`"),
    ("unet", "transformer_layers_per_block", [1, [1, 2]], "Expected `int`, got `array` - at `$.transformer_layers_p"),
    ("unet", "transformer_layers_per_block", [1, 2, 3], "a list for other than the 2 block_out_channels"),
    ("unet", "transformer_layers_per_block", 128, "more than 256 transformer blocks"),
    ("unet", "attention_head_dim", None, "Expected `int | array`, got `null` - at `$.attention_head_dim`"),
    ("unet", "attention_head_dim", [8], "a list for other than the 2 block_out_channels"),
    ("unet", "attention_head_dim", 7, "attention_head_dim=7 does not divide 32 channels"),
    ("unet", "block_out_channels", [], "Expected `array` of length >= 1"),
    ("unet", "block_out_channels", [32] * 9, "Expected `array` of length <= 8"),
    ("unet", "block_out_channels", 32, "Expected `array`, got `int`"),
    ("unet", "block_out_channels", [33, 64], "norm_num_groups=32 does not divide 33 channels"),
    ("unet", "down_block_types", ["DownBlock2D"], "a list for other than the 2 block_out_channels"),
    ("unet", "down_block_types", ["DownBlock2D", "X"], "blocks of type X, expected DownBlock2D, CrossAttn"),
    ("unet", "up_block_types", "UpBlock2D", "Expected `array`, got `str`"),
    ("unet", "sample_size", [64, 64], "Expected `int`, got `array`"),
    ("unet", "sample_size", 10**9, "Expected `int` <= 2048"),
    ("unet", "sample_size", 65, "sample_size=65 cannot be halved 1 times"),
    ("unet", "out_channels", 8, "in_channels=4 and out_channels=8 differ"),
    ("unet", "norm_num_groups", 0, "Expected `int` >= 1"),
    ("unet", "freq_shift", 160, "Expected `int` <= 1"),
    ("unet", "flip_sin_to_cos", "yes", "Expected `bool`, got `str`"),
    ("unet", "act_fn", ["silu"] * 999, "not supported: act_fn="),
    ("unet", "_class_name", ["X"], None),
    ("sdxl", "addition_embed_type", "image", "not supported: addition_embed_type='image'"),
    ("sdxl", "addition_embed_type", ["text_time"], "Expected `str | null`, got `array`"),
    ("sdxl", "addition_time_embed_dim", None, "do not fit it"),
    ("sdxl", "addition_time_embed_dim", 3, "sinusoids of 3 channels, expected even numbers"),
    ("sdxl", "projection_class_embeddings_input_dim", 100, "do not fit it"),
    ("vae", "block_out_channels", [32, 65], "norm_num_groups=32 does not divide block_out_channels=(32, 65)"),
    ("vae", "scaling_factor", None, "Expected `float`, got `null`"),
    ("vae", "scaling_factor", -1, "Expected `float` > 0"),
    ("vae", "in_channels", 4, "not supported: in_channels=4 (only 3)"),
    ("vae", "layers_per_block", 10**6, "Expected `int` <= 128"),
    ("noise", "num_train_timesteps", 10**9, "Expected `int` <= 100000"),
    ("noise", "num_train_timesteps", "1000", "Expected `int`, got `str`"),
    ("noise", "beta_start", 0, "Expected `float` > 0"),
    ("noise", "beta_end", 2, "Expected `float` < 1"),
    ("noise", "beta_end", 0.99, "beta_end=0.99: leaves no signal"),
    ("noise", "beta_schedule", ["linear"], "Expected `str`, got `array`"),
    ("noise", "prediction_type", {"a": 1}, "Expected `str`, got `object`"),
    ("noise", "rescale_betas_zero_snr", "yes", "Expected `bool`, got `str`"),
    ("noise", "rescale_betas_zero_snr", True, "expected prediction_type v_prediction"),
    ("plan", "timestep_spacing", ["leading"], "Expected `str`, got `array`"),
    ("options", "steps_offset", [1], "Expected `int`, got `array` - at `$.steps_offset`"),
    ("options", "_class_name", "Unknown", None),
    ("plan", "steps_offset", -5, "Expected `int` >= 0"),
    ("plan", "clip_sample", {"a": []}, "not supported: clip_sample="),
]


@pytest.mark.parametrize(("reader", "key", "value", "message"), WRONG)
def test_wrong_values(reader, key, value, message):
    if message is None:  # harmless
        READERS[reader]({key: value})
        return
    with pytest.raises(UserError) as error:
        READERS[reader]({key: value})
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


def test_keys_that_are_ours_are_not_read_from_a_file():
    """transformers 5 writes dtype, which is that of the file."""
    config = from_json(CLIPVisionConfig, {"dtype": "float16", "hidden_size": 96, "num_attention_heads": 3}, {})
    assert config.dtype == np.float32
    unet = UNetConfig.from_json(UNET | {"remat": True, "resolution": "x"})
    assert (unet.remat, unet.resolution) == (False, 512)
    assert read_text_config(TEXT | {"skip": 1}, np.float32).skip == 0


def test_a_scheduler_config_with_lists_and_objects_can_be_a_static_argument():
    schedule = NoiseSchedule.from_json({"_use_default_values": ["a", {"b": [1]}], "_class_name": {"a": "b"}})
    assert isinstance(hash(schedule), int)
