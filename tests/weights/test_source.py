"""One model in every format gives the same parameters; what is not a base model is refused in one line."""

import fnmatch
import json
import os
import shutil
from pathlib import Path

import flax.serialization
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from catversion_jax.base import pipeline, schedulers
from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.utils.errors import UserError
from catversion_jax.weights import msgpack, safetensors, source, weight_files
from catversion_jax.weights.tensor import FileTensor
from tests import ldm_files, torch_files
from tests.commands import ENVIRONMENT, ROOT, error_of
from tests.weights.models import assert_same, refused, weights_file, write_configs, write_folder

FAMILIES = tuple(ldm_files.CONFIGS)
SCHEDULERS = {"sd1": "PNDMScheduler", "sd2": "DDIMScheduler", "sdxl": "EulerDiscreteScheduler"}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def params(family) -> dict:
    return ldm_files.random_params(family)


# ---- formats


def test_diffusers_folder(family, params, tmp_path):
    opened = source.open_source(str(write_folder(tmp_path, ldm_files.to_diffusers(params), family)))
    assert_same(opened, params)
    assert opened.scheduler()["_class_name"] == "DDIMScheduler"
    assert opened.tokenizer("text") == tmp_path / "tokenizer"


def test_single_file(family, params, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(ldm_files.to_ldm(ldm_files.to_diffusers(params), family), path)
    opened = source.open_source(str(path))
    assert_same(opened, params)
    for component, config in ldm_files.CONFIGS[family].items():
        assert opened.config(component) == config
    assert opened.scheduler()["_class_name"] == SCHEDULERS[family]
    assert opened.scheduler()["prediction_type"] == ("v_prediction" if family == "sd2" else "epsilon")


def test_checkpoint(sd1, tmp_path):
    tensors = ldm_files.to_ldm(sd1, "sd1")
    path = torch_files.save_tensors(tmp_path / "model.ckpt", tensors, global_step=7)
    assert_same(source.open_source(str(path)), ldm_files.random_params("sd1"))


def test_bin_folder(sd1, tmp_path):
    write_configs(tmp_path, "sd1")
    for component, tensors in sd1.items():
        torch_files.save_tensors(weights_file(tmp_path, component, 1), tensors)
    assert_same(source.open_source(str(tmp_path)), ldm_files.random_params("sd1"))


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_flax_folder(family, params, dtype, tmp_path):
    write_configs(tmp_path, family)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    for component, tree in params.items():
        weights_file(tmp_path, component, 2).write_bytes(flax.serialization.to_bytes(tree))
    assert_same(source.open_source(str(tmp_path)), params)


def test_flax_shards_and_scalars(tmp_path):
    shards = {"a.msgpack": {"x": {"kernel": np.ones((2, 3), np.float32)}}, "b.msgpack": {"step": np.float32(7)}}
    for name, tree in shards.items():
        (tmp_path / name).write_bytes(flax.serialization.to_bytes(tree))
    index = {"weight_map": {"x/kernel": "a.msgpack", "step": "b.msgpack"}}
    (tmp_path / "flax_model.msgpack.index.json").write_text(json.dumps(index))
    form, tensors = weight_files.open_weights(tmp_path)
    assert form.is_flax
    assert {name: tensor.shape for name, tensor in tensors.items()} == {"x/kernel": (2, 3), "step": ()}
    assert tensors["step"].read() == 7


def test_bfloat16_and_variant(sd1, tmp_path):
    write_folder(tmp_path, sd1)
    halves = {c: {name: value.astype(jnp.bfloat16) for name, value in t.items()} for c, t in sd1.items()}
    for component, tensors in halves.items():
        save_file(tensors, weights_file(tmp_path, component, 0, ".bf16"))
    tensor = source.open_source(str(tmp_path), variant="bf16").tensors("unet")["conv_in.weight"]
    assert tensor.dtype == jnp.bfloat16
    np.testing.assert_array_equal(tensor.read(), halves["unet"]["conv_in.weight"])
    refused("no weights of config.model.variant='fp16'", "model.fp16.safetensors", path=str(tmp_path), variant="fp16")


def test_nothing_is_read_before_it_is_asked_for(sd1, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(ldm_files.to_ldm(sd1, "sd1"), path)
    reads = []
    read_one = FileTensor.read
    monkeypatch.setattr(FileTensor, "read", lambda tensor: reads.append(tensor.shape) or read_one(tensor))
    tensors = source.open_source(str(path)).tensors("vae")
    assert not reads
    tensors["first_stage_model.quant_conv.bias"].read()
    assert reads == [(8,)]


def test_prediction_type(sd1, tmp_path):
    assert source.open_source(str(write_folder(tmp_path, sd1)), prediction_type="v_prediction").scheduler() == (
        json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text()) | {"prediction_type": "v_prediction"}
    )
    path = tmp_path / "model.safetensors"
    save_file(ldm_files.to_ldm(ldm_files.to_diffusers(ldm_files.random_params("sd2")), "sd2"), path)
    opened = source.open_source(str(path), prediction_type="epsilon")
    assert opened.config("unet")["sample_size"] == 64
    assert opened.scheduler()["prediction_type"] == "epsilon"


# ---- variants


def test_a_component_without_the_variant_has_its_plain_files(sd1, tmp_path, caplog):
    write_folder(tmp_path, sd1)
    save_file(sd1["unet"], weights_file(tmp_path, "unet", 0, ".fp16"))
    assert_same(source.open_source(str(tmp_path), variant="fp16"), ldm_files.random_params("sd1"))
    assert "no weights of config.model.variant='fp16' in text_encoder, vae; the plain ones are read" in caplog.text


def test_a_folder_of_a_variant_alone(sd1, tmp_path):
    write_folder(tmp_path, sd1, variant=".fp16")
    message = "text_encoder: no weights; expected model.safetensors or diffusion_pytorch_model.safetensors; there are "
    refused(message, "those of variant fp16: set config.model.variant", path=str(tmp_path))
    assert_same(source.open_source(str(tmp_path), variant="fp16"), ldm_files.random_params("sd1"))


def test_plain_files_are_downloaded_where_the_variant_lacks_some(sd1, remote):
    write_folder(remote.remote, sd1)
    weights_file(remote.remote, "text", 0).unlink()
    save_file(sd1["text"], weights_file(remote.remote, "text", 0, ".fp16"))
    save_file(sd1["unet"], weights_file(remote.remote, "unet", 0, ".fp16"))
    assert_same(source.open_source("owner/name", variant="fp16"), ldm_files.random_params("sd1"))
    assert "vae/diffusion_pytorch_model.safetensors" in remote.fetched
    assert "unet/diffusion_pytorch_model.safetensors" not in remote.fetched


def test_a_variant_that_is_nowhere_downloads_no_plain_files(sd1, remote):
    write_folder(remote.remote, sd1)
    refused("owner/name: no weights of config.model.variant='fp61' for", path="owner/name", variant="fp61")
    assert not any(name.endswith(".safetensors") for name in remote.fetched)


# ---- tokenizers and the hub


class FakeHub:
    """snapshot_download of a folder instead of a network; what it was asked for is kept."""

    def __init__(self, remote: Path, cache: Path):
        self.remote, self.cache, self.calls = remote, cache, []
        self.endpoint = "https://huggingface.co"

    def __call__(self, repo_id, *, revision, allow_patterns, endpoint):
        self.calls.append((repo_id, revision))
        assert endpoint == self.endpoint
        for path in self.remote.rglob("*"):
            name = path.relative_to(self.remote).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    @property
    def fetched(self) -> set[str]:
        return {path.relative_to(self.cache).as_posix() for path in self.cache.rglob("*") if path.is_file()}


@pytest.fixture
def remote(tmp_path, monkeypatch) -> FakeHub:
    fake = FakeHub(tmp_path / "remote", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    return fake


def test_a_mirror(sd1, remote, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    remote.endpoint = "https://mirror.example"
    write_folder(remote.remote, sd1)
    source.open_source("owner/name")
    assert remote.calls
    refused("a model's name (owner/name) on https://mirror.example", path="nowhere")


def test_only_what_is_needed_is_downloaded(sd1, remote):
    write_folder(remote.remote, sd1)
    needed = {path.relative_to(remote.remote).as_posix() for path in remote.remote.rglob("*") if path.is_file()}
    for name in ("model.fp16.safetensors", "pytorch_model.bin", "flax_model.msgpack", "model.non_ema.safetensors"):
        (remote.remote / "text_encoder" / name).write_bytes(b"not this")
    for name in ("v1-5.ckpt", "safety_checker/model.safetensors", "README.md"):
        (remote.remote / name).parent.mkdir(exist_ok=True)
        (remote.remote / name).write_bytes(b"not this")
    opened = source.open_source("owner/name", revision="main")
    assert remote.calls == [("owner/name", "main")]
    assert remote.fetched == needed
    assert opened.name == "owner/name"
    assert_same(opened, ldm_files.random_params("sd1"))
    refused("owner/name: no weights of config.model.variant='bf16' for text_enc", path="owner/name", variant="bf16")


def test_other_formats_are_downloaded_where_there_are_no_safetensors(sd1, remote):
    write_folder(remote.remote, sd1)
    names = sorted(sd1["unet"])
    folder = remote.remote / "unet"
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for shard, keys in shards.items():
        save_file({key: sd1["unet"][key] for key in keys}, folder / shard)
    index = {"weight_map": {key: shard for shard, keys in shards.items() for key in keys}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    weights_file(remote.remote, "vae", 0).unlink()
    torch_files.save_tensors(weights_file(remote.remote, "vae", 1), sd1["vae"])
    weights_file(remote.remote, "text", 0).unlink()
    tree = ldm_files.random_params("sd1")["text"]
    weights_file(remote.remote, "text", 2).write_bytes(flax.serialization.to_bytes(tree))
    assert_same(source.open_source("owner/name"), ldm_files.random_params("sd1"))


def test_the_tokenizer_of_a_single_file(remote, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(ldm_files.to_ldm(ldm_files.to_diffusers(ldm_files.random_params("sdxl")), "sdxl"), path)
    for folder in (remote.remote, remote.remote / "tokenizer_2"):
        shutil.copytree(pipeline.MINI / "tokenizer", folder)
    opened = source.open_source(str(path))
    assert not remote.calls
    assert (opened.tokenizer("text") / "vocab.json").is_file()
    assert (opened.tokenizer("text_2") / "merges.txt").is_file()
    assert [repo for repo, _revision in remote.calls] == [
        "openai/clip-vit-large-patch14",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ]
    (tmp_path / "tokenizer").mkdir()
    assert opened.tokenizer("text") == tmp_path / "tokenizer"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "GatedRepoError",
            "only for those who agreed to its terms; do so on https://huggingface.co/owner/name, then log in (`hf auth",
        ),
        ("RevisionNotFoundError", "has no revision 'v9'; correct config.model.revision"),
        ("RepositoryNotFoundError", "no such folder or file, nor model on https://huggingface.co; if private: log in"),
        (
            "LocalEntryNotFoundError",
            "no such folder or file, not in the cache, and https://huggingface.co is out of reach",
        ),
        ("HfHubHTTPError", "not downloaded (HfHubHTTPError"),
    ],
)
def test_what_the_hub_answers(monkeypatch, kind, message):
    error = getattr(huggingface_hub.errors, kind)

    monkeypatch.delenv("HF_ENDPOINT", raising=False)

    def fail(*_, **__):
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(f"owner/name: {message}", path="owner/name", revision="v9")


def test_names_that_are_none():
    refused("ow ner/na..me: no such folder or file, and no name of a model", path="ow ner/na..me")
    refused("nowhere: not found; expected a folder, a file or a model's name (owner/name) on https", path="nowhere")


def test_the_command_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(ENVIRONMENT, "HF_HOME", str(tmp_path))
    photos = ROOT / "catversion_jax" / "concepts" / "teapot" / "train"
    config = {
        "run_dir": tmp_path / "run",
        "data.dir": photos,
        "concept.class_word": "teapot",
        "model.path": "owner/name",
    }
    message = error_of("train", "--config=configs/mini.py", *(f"--config.{k}={v}" for k, v in config.items()))
    assert "error: owner/name: no such folder or file, not in the cache, and https://huggingface.co is out" in message
    assert "run `hf download owner/name --local-dir FOLDER` where there is a network" in message


# ---- what is refused


def test_folders_that_lack_something(sd1, tmp_path):
    write_folder(tmp_path, sd1)
    refused("config.model.revision='x'", "is local; unset it", path=str(tmp_path), revision="x")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    refused("takes 9 channels", path=str(tmp_path))
    (tmp_path / "unet" / "config.json").write_text("{")
    refused("unet/config.json: not JSON", path=str(tmp_path))
    shutil.rmtree(tmp_path / "unet")
    refused(f"{tmp_path}: no unet/config.json; expected a Stable Diffusion", path=str(tmp_path))
    shutil.rmtree(tmp_path / "vae")
    refused("no unet/config.json, no vae/config.json", path=str(tmp_path))


def test_an_index_that_is_none(tmp_path):
    absent = ['{"weight_map": {"a": "3"}}']
    absent += [f'{{"weight_map": {{"a": "{name}"}}}}' for name in ("x" * 1000, "../a", "\\u0000", "")]
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000, *absent):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json: (.*expected an index|lists shards that are not beside)"):
            weight_files.open_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_lora_weights.safetensors", "", "this is a LoRA"),
        ("adapter_config.json", "{}", "this is a LoRA"),
        ("learned_embeds.bin", "", "this is a Textual Inversion"),
        ("concept.safetensors", "", "this is a trained concept"),
        (
            "config.json",
            '{"_class_name": "AutoencoderKL"}',
            "its config.json says AutoencoderKL: no text_encoder/config",
        ),
        ("config.json", '{"architectures": ["CLIPModel"]}', "its config.json says ['CLIPModel']"),
        ("model_index.json", '{"_class_name": "FluxPipeline"}', "its model_index.json says FluxPipeline"),
    ],
)
def test_folders_of_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    refused(message, "expected a Stable Diffusion 1.x, 2.x or XL model in diffusers layout", path=str(tmp_path))


def test_a_textual_inversion_of_torch(tmp_path):
    """As A1111's webui saves it."""
    vectors = {"*": np.zeros((2, 768), np.float32)}
    value = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch_files.whole("0", vectors["*"])}}
    path = torch_files.save(tmp_path / "cat.pt", value, {"0": vectors["*"]})
    refused("this is a Textual Inversion embedding, not a model; expected", path=str(path))


def test_a_scheduler_that_clips_nothing(sd1, tmp_path):
    """diffusers writes -Infinity, which is no JSON, for DPM-Solver++."""
    path = write_folder(tmp_path, sd1) / "scheduler" / "scheduler_config.json"
    config = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf"), "solver_order": 2}
    path.write_text(json.dumps(config))
    assert "-Infinity" in path.read_text()
    schedule = NoiseSchedule.from_json(source.open_source(str(tmp_path)).scheduler())
    assert len(schedulers.plan(schedule, "", 5).calls.number) == 5
    path.write_text(json.dumps(config | {"lambda_min_clipped": -5.1}))
    schedule = NoiseSchedule.from_json(source.open_source(str(tmp_path)).scheduler())
    with pytest.raises(UserError, match=r"lambda_min_clipped=-5\.1"):
        schedulers.plan(schedule, "", 5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "its header is no JSON object"),
        ((2**62).to_bytes(8, "little") + b"{}", "its header would have more than 32 MiB"),
        ((2**20).to_bytes(8, "little") + b"{}", "it ends within its header"),
        ((2).to_bytes(8, "little") + b"[]", "its header is no JSON object"),
        ((100_000).to_bytes(8, "little") + b'{"a":' + b"[" * 99_995, "not a readable safetensors file"),
        ((22).to_bytes(8, "little") + b'{"__metadata__": "x"} ', "not a readable safetensors file"),
        ((16).to_bytes(8, "little") + b'{"\\ud800": "x"}', "not a readable safetensors file"),
        ((12).to_bytes(8, "little") + b'{"a": "\x1b"} ', "not a readable safetensors file"),
    ],
)
def test_headers_that_are_none(tmp_path, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        safetensors.open_safetensors(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        safetensors.open_safetensors(tmp_path / "model.safetensors")


def test_types_that_are_not_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(2, np.uint16)}, path)
    with pytest.raises(UserError, match="numbers of type U16; expected a file of float16"):
        safetensors.open_safetensors(path)


def array(shape, dtype, data) -> bytes:
    """An array as flax packs it, whatever it says."""
    import msgpack as library

    return library.packb({"a": library.ExtType(1, library.packb((shape, dtype, data)))})


MSGPACK = flax.serialization.to_bytes({"a": {"kernel": np.ones((4, 4), np.float32)}, "b": np.zeros(3, np.float16)})
BAD_MSGPACK = {
    "empty": (b"", "ends too early"),
    "cut": (MSGPACK[:-3], "ends too early"),
    "cut_in_a_head": (MSGPACK[:20], "ends too early"),
    "longer": (MSGPACK + b"\0", "something follows"),
    "number": (b"\x07", "integer of length 7 at ''"),
    "reserved": (b"\xc1", "begins with 0xc1"),
    "wrong_size": (array((2, 2), "float32", b"1234"), "4 bytes for an array of shape (2, 2) and type float32"),
    "object": (array((1,), "object", b"12345678"), "numbers of type 'object'"),
    "complex": (flax.serialization.to_bytes({"a": 1j}), "an extension of type 2"),
    "twice": (b"\x82" + 2 * array((1,), "uint8", b"1")[1:], "'a' is there twice"),
    "deep": (b"\x81\xa1a" * 100, "at 'a/a/a"),
    "axes": (array((1,) * 99, "uint8", b"1"), "an array of 99 axes"),
    "chunked": (flax.serialization.to_bytes({"a": {"__msgpack_chunked_array__": True}}), "'a' is larger than 1 GiB"),
    "long_name": (b"\x81\xdb\xff\xff\xff\xff", "a name that is text of length 4294967295"),
    "text": (b"just some text", "integer of length 106 at ''"),
    "long_path": ((b"\x81\xda\x04\x00" + b"a" * 1024) * 5 + b"\x80", "a name of more than 4096 characters"),
}


@pytest.mark.parametrize("kind", BAD_MSGPACK)
def test_damaged_flax_files(tmp_path, kind):
    content, message = BAD_MSGPACK[kind]
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        msgpack.open_msgpack(path)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{path}: not a file of Flax parameters (")


def test_a_file_that_becomes_shorter(tmp_path):
    path = tmp_path / "flax_model.msgpack"
    path.write_bytes(MSGPACK)
    tensors = msgpack.open_msgpack(path)
    assert tensors["a/kernel"].read().sum() == 16
    path.write_bytes(MSGPACK[:40])
    with pytest.raises(UserError, match="became shorter"):
        tensors["a/kernel"].read()
