"""Settings: one home for each default, a constraint on every key, and the way to the flags and back."""

import math

import pytest

from catversion_jax.config import Config, default, from_config_dict, to_config_dict
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.settings import check_settings, flatten

GIVEN = {"run_dir": "out", "data.dir": "photos", "concept.class_word": "teapot"}
FREE = {"model.path", "model.revision", "model.variant", "data.masks_dir"}
"""Keys that take any text; what is wrong with it is noticed where it is used."""
BAD = {
    "run_dir": ["", " ", None],
    "seed": [-1, 2**32, None],
    "model.prediction_type": ["v"],
    "model.dtype": ["float16", ""],
    "data.dir": ["", None],
    "data.crop": ["", "top"],
    "data.captions": [1, "no"],
    "data.flip": [1, "yes"],
    "concept.class_word": ["", "\t", "mug}", "{concept}", "a\0", "a\x1b[2J", "a\nb", "a\ufffd"],
    "concept.article": ["{the", "a}"],
    "concept.templates": [(), ("",), "a photo", None, ("a\0",), ("\ud800",)],
    "concept.identifier": ["", " ", "sks}"],
    "method": ["lora", ""],
    "adapter.layers": [()],
    "train.timesteps": [(0.5,), (0.5, 0.5), (0.6, 0.2), (-0.1, 1.0), (0.0, 1.5), (0.0, "1"), (), None, 0.5],
    "train.text_penalty": [-0.1, float("nan"), None],
    "sample.strength": [-0.1, 2.1, float("nan"), None],
    "adapter.length": [0],
    "adapter.init_std": [-0.1, math.inf, math.nan],
    "adapter.logit_bias": [math.nan, math.inf],
    "adapter.scope": ["some", ""],
    "adapter.parts": [(), ("query",)],
    "prior.weight": [-1.0, math.nan],
    "prior.pictures": [0, 10_001],
    "train.learning_rate": [0, -1, math.nan, math.inf],
    "train.decay": ["step", ""],
    "train.warmup_steps": [-5],
    "train.b1": [-0.1, 1, math.nan],
    "train.b2": [-0.1, 1],
    "train.eps": [0, math.nan],
    "train.weight_decay": [-10, math.nan],
    "train.clip_norm": [-1, 0, math.nan],
    "train.steps": [0, None, 2**31],
    "train.batch_size": [0, 2**21],
    "train.background_weight": [-0.1, 1.1, math.nan],
    "train.remat": [1],
    "train.steps_per_dispatch": [0],
    "stop.every": [-1],
    "stop.patience": [0],
    "stop.margin": [-0.1, 1, math.nan],
    "batch.slots": [0],
    "batch.previews": [-1],
    "mesh.fsdp": [0],
    "mesh.tensor": [0],
    "mesh.rules": [(("x", 1, "row"),)],
    "checkpoint.every": [0],
    "checkpoint.keep": [0],
    "sample.steps": [0, 1001],
    "sample.guidance": [-1, math.nan, math.inf],
    "sample.batch_size": [0, 1025],
    "sample.scheduler": ["ipndm"],
    "sample.every": [-1],
    "sample.prompts": [(), ("a", " ")],
}


def test_every_key_has_a_constraint_and_a_bad_value():
    keys = {key for key, _, _ in flatten(Config())}
    assert keys == BAD.keys() | FREE
    for key, field, _ in flatten(Config()):
        help = field.metadata["help"]
        assert help[0].isupper() or help[0] == '"', key
        assert help.endswith("."), key


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in BAD.items() for value in values])
def test_a_value_that_cannot_work_is_refused(key, value):
    check_settings(Config().replaced(GIVEN))
    with pytest.raises(UserError, match=rf"config\.{key.replace('.', r'[.]')}=.*: expected "):
        check_settings(Config().replaced(GIVEN | {key: value}))


def test_to_the_flags_and_back():
    config = Config().replaced(GIVEN | {"train.clip_norm": 0.5, "adapter.layers": (0, 1), "sample.prompts": ("a", "b")})
    assert from_config_dict(to_config_dict(config)) == config
    values = default()
    values.update_from_flattened_dict(GIVEN)
    assert from_config_dict(values) == Config().replaced(GIVEN)
    with pytest.raises(UserError, match=r"config\.run_dir=''"):
        from_config_dict(default())
    from_config_dict(default(), unset=tuple(GIVEN))


def test_a_key_of_a_config_file_that_is_none():
    values = default()
    values.train.unlock()
    values.train.stps = 5
    with pytest.raises(UserError, match=r"config\.train\.stps: no such key; expected one of "):
        from_config_dict(values, unset=tuple(GIVEN))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("train", 5, "a section with keys, not 5"), ("seed", {"a": 1}, "a value, not keys")],
)
def test_a_section_and_a_value_are_not_each_other(key, value, expected):
    values = default()
    with values.ignore_type():
        values[key] = value
    with pytest.raises(UserError, match=rf"config\.{key}: expected {expected}"):
        from_config_dict(values, unset=tuple(GIVEN))


def test_the_parts_of_a_section_are_its_own():
    config = Config().replaced({"train.learning_rate": 0.5, "train.steps": 7, "sample.steps": 3, "sample.every": 2})
    assert config.train.optimizer.learning_rate == 0.5
    assert config.sample.sampler.steps == 3
    assert config.train.optimizer == Config().replaced({"train.learning_rate": 0.5}).train.optimizer
    assert "run_dir" not in config.identity()
    with pytest.raises(KeyError, match=r"train\.stps"):
        Config().replaced({"train.stps": 5})
