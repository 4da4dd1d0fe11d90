"""TPU v5e programs of the step, with libtpu's compiler: they can be built, and hold the kernel and the collectives that
they should. A narrow and shallow network: what takes the time of compiling is the number of its layers."""

import os

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from catversion_jax.base.noise_schedule import NoiseSchedule
from catversion_jax.base.pipeline import COMPONENTS, Networks, abstract
from catversion_jax.bench.random_model import RANDOM
from catversion_jax.bench.step import random_data
from catversion_jax.config import Config, from_config_dict, stable_diffusion
from catversion_jax.models import attention
from catversion_jax.models.sharding import make_mesh, sharding
from catversion_jax.training.state import Frozen
from catversion_jax.training.step import StepConfig, compile_chunk
from catversion_jax.weights import ldm
from tests.training.eight_devices import COLLECTIVE

NARROW = {
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 4},
    "unet": {
        "block_out_channels": [64, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 2,
        "sample_size": 32,  # 1024 positions
    },
    "vae": {},
}


@pytest.fixture(scope="module")
def chips() -> list[jax.Device]:
    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


def program(chips, monkeypatch, concepts: int, length: int, **mesh: int) -> str:
    """The compiled step of `concepts` concepts of batch 2."""
    config = from_config_dict(stable_diffusion("none"), unset=("run_dir", "data.dir", "concept.class_word"))
    config = config.replaced({f"mesh.{key}": value for key, value in mesh.items()})
    dtype = jnp.bfloat16
    of_text, unet, vae = (COMPONENTS[name].make(RANDOM[name] | NARROW[name], dtype) for name in NARROW)
    networks = Networks((of_text,), unet, vae, NoiseSchedule.from_json(ldm.FAMILIES[0].scheduler))
    monkeypatch.setattr(Config, "make_mesh", lambda *_: make_mesh(concepts, 2, **mesh, devices=chips))
    step_config = StepConfig.of(config, networks, concepts)

    def on_concepts(tree):
        place = sharding(step_config.mesh, "concept")
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def spread(name, module):
        return abstract(name, module, dtype, step_config.mesh, config.mesh.rules)

    text_params = (spread("text", of_text),)
    frozen = Frozen(spread("unet", unet), text_params, jax.ShapeDtypeStruct((1000,), jnp.float32))
    state = jax.eval_shape(lambda: step_config.init_state(range(concepts)))
    data = random_data(config, step_config, text_params, concepts)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # the attention that a TPU takes
    lowered = compile_chunk(step_config, length).lower(on_concepts(state), frozen, on_concepts(data))
    return lowered.compile().as_text()


def test_concepts_share_nothing(chips, monkeypatch):
    compiled = program(chips, monkeypatch, concepts=4, length=2)
    assert "tpu_custom_call" in compiled  # the splash kernel
    assert COLLECTIVE.findall(compiled) == []


def test_a_split_base_model(chips, monkeypatch):
    compiled = program(chips, monkeypatch, concepts=2, length=1, fsdp=2)
    assert "tpu_custom_call" in compiled
    assert "all-gather" in COLLECTIVE.findall(compiled)


def test_without_the_kernel_there_is_none(chips, monkeypatch):
    """So that the tests above see what they say."""
    monkeypatch.setitem(attention.KERNELS, "tpu", (attention.XLA,))
    assert "tpu_custom_call" not in program(chips, monkeypatch, concepts=1, length=1)
