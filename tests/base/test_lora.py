"""LoRAs merged into a base model, against numpy; against diffusers in tests/parity/test_other_files.py."""

import json
import re

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

import catversion_jax as cv
from catversion_jax.base import lora
from catversion_jax.utils.errors import UserError
from tests import tiny, torch_files
from tests.commands import catversion, error_of
from tests.conftest import max_error

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = f"lora_unet_{ATTENTION.replace('.', '_')}"
KOHYA_XL = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k"
PROCESSOR = ATTENTION.replace("to_k", "processor.to_k_lora")
LOST = "lora_unet_mid_block_nothing"
RNG = np.random.default_rng(0)
DOWN, UP = RNG.normal(size=(4, 32)).astype(np.float32), RNG.normal(size=(32, 4)).astype(np.float32)
CHANGED = "down_blocks_0/attentions_0/transformer_blocks_0/attn2/to_k/kernel"


def pair(down: np.ndarray) -> dict[str, np.ndarray]:
    return {f"unet.{ATTENTION}.lora_A.weight": down, f"unet.{ATTENTION}.lora_B.weight": UP}


def file_of(path, layers: dict, alpha: float | None = None):
    """A file of kohya's: {layer: (down, up)}."""
    tensors = {}
    for layer, (down, up) in layers.items():
        tensors |= {f"{layer}.lora_down.weight": down, f"{layer}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{layer}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


def changes(pipeline, path, scale=1.0) -> dict[str, np.ndarray]:
    """What a LoRA changes, by the parameter's path."""
    after = lora.merge_lora(pipeline, lora.read_lora(path), scale)
    assert after.fingerprint == pipeline.fingerprint
    trees = []
    for each in (pipeline, after):
        networks = {str(i): x for i, x in enumerate([*each.params["text"], each.params["unet"]])}
        trees.append(flatten_dict(networks, sep="/"))
    moved = {name: np.asarray(trees[1][name]) - np.asarray(trees[0][name]) for name in trees[0]}
    return {name.split("/", 1)[1]: x for name, x in moved.items() if np.abs(x).max() > 0}


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (f"{KOHYA}.lora_down.weight", f"{KOHYA}.lora_up.weight"),
        (f"{KOHYA_XL}.lora_down.weight", f"{KOHYA_XL}.lora_up.weight"),
        (f"unet.{ATTENTION}.lora_A.weight", f"unet.{ATTENTION}.lora_B.weight"),
        (f"unet.{ATTENTION}.lora_A.default.weight", f"unet.{ATTENTION}.lora_B.default.weight"),
        (f"unet.{ATTENTION}.lora.down.weight", f"unet.{ATTENTION}.lora.up.weight"),
        (f"{PROCESSOR}.down.weight", f"{PROCESSOR}.up.weight"),
    ],
)
def test_names(tiny_pipeline, tmp_path, down, up):
    """Each program's name of one layer changes that layer and no other."""
    tensors = {down: DOWN, up: UP}
    save_file(tensors, tmp_path / "style.safetensors")
    ((name, change),) = changes(tiny_pipeline, tmp_path / "style.safetensors", 0.5).items()
    assert name == CHANGED
    assert max_error(change, 0.5 * (UP @ DOWN).T) < 1e-5
    torch_files.save_tensors(tmp_path / "style.bin", tensors)
    assert changes(tiny_pipeline, tmp_path / "style.bin", 0.5).keys() == {CHANGED}


def test_alpha_and_the_text_encoder(tiny_pipeline, tmp_path):
    layer = "text_model_encoder_layers_2_self_attn_q_proj"
    path = file_of(tmp_path / "a.safetensors", {f"lora_te_{layer}": (DOWN, UP)}, alpha=2.0)
    ((name, change),) = changes(tiny_pipeline, path).items()
    assert name == "text_model/encoder/layers/2/self_attn/q_proj/kernel"
    assert max_error(change, 2 / 4 * (UP @ DOWN).T) < 1e-5
    dotted = "text_encoder.text_model.encoder.layers.2.self_attn.q_proj.lora_linear_layer"
    named = {f"{dotted}.down.weight": DOWN, f"{dotted}.up.weight": UP}
    save_file(named, tmp_path / "b.safetensors")
    assert changes(tiny_pipeline, tmp_path / "b.safetensors").keys() == {name}


def test_alpha_in_the_metadata(tiny_pipeline, tmp_path):
    """As diffusers writes it; what else PEFT may say there is refused."""
    path, said = tmp_path / "a.safetensors", {"unet.r": 4, "unet.lora_alpha": 16, "unet.use_rslora": False}
    save_file(pair(DOWN), path, {"lora_adapter_metadata": json.dumps(said)})
    ((_, change),) = changes(tiny_pipeline, path).items()
    assert max_error(change, 16 / 4 * (UP @ DOWN).T) < 1e-4
    digest = lora.read_lora(path).digest
    save_file(pair(DOWN), path, {"lora_adapter_metadata": json.dumps(said | {"unet.lora_alpha": 4})})
    assert lora.read_lora(path).digest != digest
    save_file(pair(DOWN), path, {"lora_adapter_metadata": json.dumps(said | {"unet.alpha_pattern": {"to_k": 2}})})
    with pytest.raises(UserError, match=r"has unet.alpha_pattern, which are not known; expected a plain LoRA"):
        lora.read_lora(path)


def test_convolutions(tiny_pipeline, tmp_path):
    """Also in three parts, and a matrix for a convolution of 1 x 1."""
    down, up = RNG.normal(size=(4, 32, 3, 3)).astype(np.float32), UP[:, :, None, None]
    layer = "lora_unet_down_blocks_0_resnets_0_conv1"
    ((_, change),) = changes(tiny_pipeline, file_of(tmp_path / "a.safetensors", {layer: (down, up)})).items()
    assert max_error(change, np.einsum("or,rikl->klio", UP, down)) < 1e-4
    mid = RNG.normal(size=(4, 4, 3, 3)).astype(np.float32)
    parts = {"down": DOWN[:, :, None, None], "up": up, "mid": mid}
    save_file({f"{layer}.lora_{part}.weight": x for part, x in parts.items()}, tmp_path / "b.safetensors")
    ((_, change),) = changes(tiny_pipeline, tmp_path / "b.safetensors").items()
    assert max_error(change, np.einsum("or,rskl,si->klio", UP, mid, DOWN)) < 1e-4
    layer = "lora_unet_down_blocks_0_attentions_0_proj_in"
    ((_, change),) = changes(tiny_pipeline, file_of(tmp_path / "c.safetensors", {layer: (DOWN, UP)})).items()
    assert max_error(change.reshape(32, 32), (UP @ DOWN).T) < 1e-4


def test_both_text_encoders(tmp_path):
    pipeline = tiny.load(tiny.write(tmp_path / "xl", changes=tiny.XL_CHANGES))
    wide = RNG.normal(size=(2, 48)).astype(np.float32)
    layers = {"lora_te1_text_model_encoder_layers_0_mlp_fc2": (np.ones((2, 64), np.float32), UP[:, :2])}
    layers |= {"lora_te2_text_model_encoder_layers_0_self_attn_k_proj": (wide, wide.T)}
    assert sorted(changes(pipeline, file_of(tmp_path / "a.safetensors", layers))) == [
        "text_model/encoder/layers/0/mlp/fc2/kernel",
        "text_model/encoder/layers/0/self_attn/k_proj/kernel",
    ]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {f"{LOST}.lora_down.weight": DOWN, f"{LOST}.lora_up.weight": UP},
            f"1 of 1 layers are not in this base model ({LOST}); expected a LoRA of the same kind",
        ),
        ({f"unet.{ATTENTION}.lora_A.weight": DOWN}, "without both of its matrices"),
        (pair(DOWN[:, :5]), "down [4, 5], up [32, 4]; expected a change of [32, 32]: a LoRA of another"),
        (
            pair(DOWN[:3]),
            "expected a change of [32, 32]",
        ),
        (
            pair(DOWN * np.nan),
            "holds NaN or infinity",
        ),
        ({"lora_unet_mid.hada_w1_a": DOWN}, "tensors lora_unet_mid.hada_w1_a; expected a LoRA"),
        ({f"unet.{ATTENTION}.dora_scale": DOWN}, "expected a LoRA by the names of kohya or diffusers"),
        ({**pair(DOWN), f"unet.{ATTENTION}.lora_down.weight": DOWN}, "given by two names"),
        ({"base_model.model.to_q.lora_A.weight": DOWN}, "of PEFT, whose scale is in another file"),
        ({"emb_params": DOWN}, "tensors emb_params; expected a LoRA"),
    ],
)
def test_refused(tiny_pipeline, tmp_path, tensors, message):
    """What does not belong to the model is never left out."""
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=re.escape(message)):
        lora.merge_lora(tiny_pipeline, lora.read_lora(tmp_path / "a.safetensors"), 1.0)


def test_the_command(tmp_path, tiny_model):
    """A concept on top of a LoRA: the picture is another, says so, and is made again; at scale 0 it is the same."""
    pipeline = tiny.load(tiny_model)
    prefix = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 16)).astype(np.float32)
    (tmp_path / "teapot").mkdir()
    tiny.save_run(tmp_path / "teapot" / "concept.safetensors", tiny.concept(prefix, pipeline.fingerprint, tiny_model))
    style = file_of(tmp_path / "style.safetensors", {KOHYA: (3 * DOWN, UP)})
    few = ("--steps=2", "--num=1", f"--out={tmp_path / 'out'}")
    given = (f"--embedding={tmp_path / 'teapot'}", "--prompt=a teapot", *few)

    def pictures() -> dict:
        found = {}
        for path in (tmp_path / "out").glob("a-teapot_*.png"):
            with Image.open(path) as image:
                said = json.loads(image.info["catversion"])["loras"]
                found[path] = (np.asarray(image), said, image.info["parameters"])
        return found

    catversion("generate", *given)
    ((plain, (pixels, none, _)),) = pictures().items()
    assert none == []
    catversion("generate", *given, f"--lora={style}:0.8")
    ((styled, (moved, used, parameters)),) = ((path, x) for path, x in pictures().items() if path != plain)
    assert (moved != pixels).any()
    assert [(x["name"], x["scale"]) for x in used] == [("style.safetensors", 0.8)]
    assert "Lora 1: style.safetensors 0.8 " in parameters
    catversion("generate", f"--like={styled}", f"--out={tmp_path / 'again'}")
    assert (tmp_path / "again" / styled.name).read_bytes() == styled.read_bytes()
    pipe = cv.Pipeline.from_pretrained(tiny_model).with_lora(style, 0.8)
    (image,) = pipe("a teapot", concepts=cv.Concept.load(tmp_path / "teapot"), steps=2)
    np.testing.assert_array_equal(np.asarray(image), moved)
    (same,) = pipe.with_lora(style, -0.8)("a teapot", concepts=cv.Concept.load(tmp_path / "teapot"), steps=2)
    assert max_error(np.asarray(same), pixels) <= 1
    jax.tree.map(np.testing.assert_array_equal, pipe.base.params["text"], tiny.load(tiny_model).params["text"])
    with pytest.raises(UserError, match=r"the LoRA style.safetensors: learn on its base model"):
        cv.learn(pipe, [tmp_path / "photo.png"], "teapot")
    file_of(style, {KOHYA: (DOWN, UP)})
    assert "its LoRAs are others by now; give them as --lora" in error_of("generate", f"--like={styled}")
    for flag, message in (
        (f"--lora={tmp_path / 'none'}:0.5", "none: not found; expected a LoRA of kohya or diffusers"),
        (f"--lora={style}:11", "scale 11.0: expected a number up to 10"),
        (f"--lora={style}:nan", "scale nan: expected a number up to 10"),
        ("--lora=:0.5", "--lora=:0.5: no file; expected FILE:SCALE"),
    ):
        assert message in error_of("generate", *given, flag)
