"""Single files in the original layout: what they say of themselves, and files that are something else."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.utils.errors import UserError
from catversion_jax.weights import source
from tests import ldm_files
from tests.weights.models import assert_same, read, refused, without, write_folder

# ---- what a single file says of itself


def write_single(path: Path, family: str, metadata: dict[str, str] | None = None, **marks: np.ndarray) -> Path:
    tensors = ldm_files.to_ldm(ldm_files.to_diffusers(ldm_files.random_params(family)), family)
    save_file(tensors | marks, path, metadata)
    return path


EMPTY = np.zeros(0, np.float32)


@pytest.mark.parametrize(
    ("family", "metadata", "marks", "expected"),
    [
        ("sd2", {"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
        ("sd2", {"modelspec.predict_key": "epsilon"}, {}, "epsilon"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, {}, "epsilon"),
        ("sd2", {"modelspec.prediction_type": "v"}, {}, "v_prediction"),
        ("sd1", {"modelspec.prediction_type": "V"}, {}, "v_prediction"),
        ("sdxl", {"modelspec.predict_key": "v", "other": "x"}, {}, "v_prediction"),
        ("sdxl", {"ss_v_parameterization": "True"}, {}, "v_prediction"),
        ("sdxl", {"ss_v_parameterization": "False", "modelspec.prediction_type": ""}, {}, "epsilon"),
        ("sdxl", {}, {"v_pred": EMPTY}, "v_prediction"),
        ("sdxl", {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, {}, "epsilon"),
    ],
)
def test_the_prediction_type_that_a_file_states(tmp_path, caplog, family, metadata, marks, expected):
    opened = source.open_source(str(write_single(tmp_path / "model.safetensors", family, metadata, **marks)))
    assert opened.scheduler()["prediction_type"] == expected
    assert "rescale_betas_zero_snr" not in opened.scheduler()
    if family == "sd2":
        assert opened.config("unet")["sample_size"] == {"epsilon": 64, "v_prediction": 96}[expected]
    assert not caplog.text


def test_marks_of_noobai(tmp_path, caplog):
    """v_pred and ztsnr, empty tensors: v-prediction from a last timestep without signal."""
    path = write_single(tmp_path / "model.safetensors", "sdxl", v_pred=EMPTY, ztsnr=EMPTY)
    opened = source.open_source(str(path))
    assert_same(opened, ldm_files.random_params("sdxl"))
    schedule = NoiseSchedule.from_json(opened.scheduler())
    assert schedule.prediction_type == "v_prediction"
    assert schedule.alphas_cumprod[-1] == 0
    assert dict(schedule.sampling)["timestep_spacing"] == "trailing"
    assert not caplog.text
    overridden = source.open_source(str(path), prediction_type="epsilon").scheduler()
    assert overridden["prediction_type"] == "epsilon"
    assert NoiseSchedule.from_json(overridden).alphas_cumprod[-1] > 0
    assert "its tensor ztsnr is ignored, because the model is taken as epsilon" in caplog.text


def test_statements_that_are_refused_unless_the_config_decides(tmp_path):
    path = tmp_path / "model.safetensors"
    for metadata, marks, message in (
        (
            {"modelspec.prediction_type": "flow"},
            {},
            "modelspec.prediction_type='flow' in its header: expected one of ep",
        ),
        ({"modelspec.predict_key": "\x1b[2J"}, {}, r"predict_key='\x1b[2J'"),
        (
            {"modelspec.predict_key": "epsilon"},
            {"v_pred": EMPTY},
            "contradicts itself by modelspec.predict_key=epsilon, ",
        ),
    ):
        write_single(path, "sdxl", metadata, **marks)
        refused(message, "set config.model.prediction_type", path=str(path))
        opened = source.open_source(str(path), prediction_type="v_prediction")
        assert opened.scheduler()["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("family", ldm_files.CONFIGS)
def test_what_is_assumed_is_told_where_there_are_two_kinds(tmp_path, caplog, family):
    path = write_single(tmp_path / "model.safetensors", family, {"modelspec.title": "x"})
    source.open_source(str(path))
    told = "does not say what it predicts; taken as v_prediction" in caplog.text
    assert told == (family == "sd2")


def test_sd_turbo(tmp_path):
    """Stable Diffusion 2.1's networks; the text encoder's names are those that XL's refiner also has."""
    params = ldm_files.random_params("sd2")
    tensors = ldm_files.to_ldm(ldm_files.to_diffusers(params), "sd2")
    renamed = {
        name.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): value
        for name, value in tensors.items()
    }
    save_file(renamed | {"denoiser.sigmas": np.ones(1000)}, tmp_path / "sd_turbo.safetensors")
    opened = source.open_source(str(tmp_path / "sd_turbo.safetensors"))
    assert_same(opened, params)
    assert opened.scheduler()["prediction_type"] == "epsilon"
    assert opened.scheduler()["timestep_spacing"] == "trailing"
    assert opened.config("unet")["sample_size"] == 64
    assert opened.config("text") == ldm_files.CONFIGS["sd2"]["text"]


def test_harmless_tensors_of_text_encoders(sd1, tmp_path):
    """Left from the whole CLIP, or named as transformers 5 does."""
    params = ldm_files.random_params("sd1")
    extra = {"text_projection.weight": np.ones((64, 64), np.float16), "logit_scale": np.ones((), np.float16)}
    extra["text_model.embeddings.position_ids"] = np.arange(77)[None]
    folder = write_folder(tmp_path / "extra", sd1 | {"text": sd1["text"] | extra})
    assert_same(source.open_source(str(folder)), params)
    shorter = {name.removeprefix("text_model."): value for name, value in (sd1["text"] | extra).items()}
    folder = write_folder(tmp_path / "transformers5", sd1 | {"text": shorter})
    assert_same(source.open_source(str(folder)), params)
    tensors = ldm_files.to_ldm(sd1, "sd1") | {
        "cond_stage_model.logit_scale": np.ones((), np.float16),
        "cond_stage_model.text_projection": np.ones((64, 64), np.float16),
        "cond_stage_model.transformer.text_projection.weight": np.ones((64, 64), np.float16),
    }
    for path, old, new in (("a", "", ""), ("b", "transformer.text_model.", "transformer.")):
        renamed = {name.replace(old, new) if old else name: value for name, value in tensors.items()}
        save_file(renamed, tmp_path / f"{path}.safetensors")
        assert_same(source.open_source(str(tmp_path / f"{path}.safetensors")), params)


# ---- what is refused


OTHER_FILES = {
    "lora": ({"lora_unet_down_blocks_0.lora_down.weight": np.zeros(2)}, "this is a LoRA"),
    "lora_of_diffusers": ({"unet.down_blocks.0.to_q.lora.down.weight": np.zeros(2)}, "this is a LoRA"),
    "peft": ({"base_model.model.to_q.lora_A.weight": np.zeros(2)}, "this is a LoRA"),
    "sd3": ({"model.diffusion_model.joint_blocks.0.x.weight": np.zeros(2)}, "this is Stable Diffusion 3"),
    "flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": np.zeros(2)}, "this is Flux"),
    "controlnet": ({"control_model.input_blocks.0.0.weight": np.zeros(2)}, "this is a ControlNet"),
    "vae": ({"encoder.conv_in.weight": np.zeros(2)}, "this is an autoencoder alone"),
    "vae_of_a_whole": ({"first_stage_model.encoder.conv_in.weight": np.zeros(2)}, "this is an autoencoder alone"),
    "unet": ({"model.diffusion_model.input_blocks.0.0.weight": np.zeros(2)}, "this is a UNet alone"),
    "text": ({"text_model.embeddings.token_embedding.weight": np.zeros(2)}, "this is a text encoder alone"),
    "textual_inversion": ({"emb_params": np.zeros((2, 768))}, "this is a Textual Inversion embedding"),
    "textual_inversion_of_diffusers": ({"<cat>": np.zeros(768)}, "this is a Textual Inversion embedding"),
    "textual_inversion_of_xl": ({"clip_g": np.zeros(2), "clip_l": np.zeros(2)}, "this is a Textual Inversion"),
    "concept": ({"prefix": np.zeros(2)}, "this is a trained concept"),
    "lycoris": ({"lora_te_text_model_encoder.hada_w1_a": np.zeros(2)}, "this is a LyCORIS adapter"),
    "controlnet_of_diffusers": ({"controlnet_cond_embedding.conv_in.bias": np.zeros(2)}, "this is a ControlNet"),
    "ip_adapter": ({"image_proj.norm.bias": np.zeros(2)}, "this is an IP-Adapter"),
    "unet_of_diffusers": ({"down_blocks.0.resnets.0.conv1.bias": np.zeros(2)}, "in diffusers layout; give the folder"),
    "refiner": (
        {
            "conditioner.embedders.0.model.ln_final.bias": np.zeros(2),
            "model.diffusion_model.label_emb.0.0.bias": np.zeros(2),
            "first_stage_model.quant_conv.bias": np.zeros(2),
        },
        "this is the refiner of Stable Diffusion XL",
    ),
    "language_model": (
        {"model.layers.0.mlp.weight": np.zeros(2)},
        "lacks text (cond_stage_model.transformer.*), unet (model.diffusion_model.*), vae (first_stage_model.*)",
    ),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_single_files(tmp_path, kind):
    tensors, message = OTHER_FILES[kind]
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    refused(f"{path}: ", message, "expected a whole Stable Diffusion 1.x, 2.x or XL model in one file", path=str(path))


def test_single_files_with_something_wrong(sd1, tmp_path):
    tensors, path = ldm_files.to_ldm(sd1, "sd1"), tmp_path / "model.safetensors"

    def attempt(changed, *expected):
        save_file(changed, path)
        refused(str(path), *expected, path=str(path))

    attempt(without(tensors, "first_stage_model."), "lacks vae (first_stage_model.*)")
    attempt(without(tensors, "cond_stage_model.", "first_stage_model."), "this is a UNet alone")
    attempt(tensors | {"extra.weight": np.zeros(2)}, "Stable Diffusion 1.x has no extra.weight")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    attempt(tensors | {key: np.zeros((32, 9, 3, 3), np.float16)}, "takes 9 channels", "inpainting")
    attempt(without(tensors, key), "not a whole Stable Diffusion 1.x model", "input_blocks.0.0.weight")
    path.write_bytes(path.read_bytes()[:-100])
    refused("not a readable safetensors file", path=str(path))
    other = tmp_path / "model.gguf"
    other.write_bytes(b"GGUF")
    refused("expected a .safetensors or .ckpt file", path=str(other))
    refused("config.model.variant='fp16'", "is a single file; unset it", path=str(path), variant="fp16")


def test_long_lists_are_cut(sd1, tmp_path):
    """Five names, and how many more; nothing that a terminal would obey."""
    path = tmp_path / "model.safetensors"
    odd = {f"extra.{i}.\x1b[31m": np.zeros(2) for i in range(1000)}
    save_file(ldm_files.to_ldm(sd1, "sd1") | odd, path)
    message = refused("Stable Diffusion 1.x has no extra.0.\\x1b[31m, ", "and 995 more", path=str(path))
    assert "\x1b" not in message
    save_file(ldm_files.to_ldm(sd1, "sd1") | {f"model.diffusion_model.{k}": v for k, v in odd.items()}, path)
    with pytest.raises(UserError, match=r"no rule for: .* and 995 more") as error:
        read(source.open_source(str(path)), "unet")
    assert "\x1b" not in str(error.value)
    assert len(str(error.value)) < 600


def test_a_tensor_no_table_knows_is_listed(sd1, tmp_path):
    """Inside a component the table decides, when it is applied."""
    path = tmp_path / "model.safetensors"
    save_file(ldm_files.to_ldm(sd1, "sd1") | {"model.diffusion_model.extra.weight": np.zeros(2)}, path)
    with pytest.raises(UserError, match=r"no rule for: model\.diffusion_model\.extra\.weight"):
        read(source.open_source(str(path)), "unet")
