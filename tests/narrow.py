"""A narrow and shallow network, whose step compiles in seconds for any chip: the layers' number takes the time."""

import jax

from catversion_jax.bench.absent import as_if_there, lower_step
from catversion_jax.bench.random_model import RANDOM, random_networks
from catversion_jax.config import from_config_dict, stable_diffusion

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


def program(backend: str, devices: list[jax.Device], concepts: int, length: int, **mesh: int) -> str:
    """The compiled step of `concepts` concepts of batch 2, on devices that need not be there."""
    config = from_config_dict(stable_diffusion("none"), unset=("run_dir", "data.dir", "concept.class_word"))
    config = config.replaced({"train.batch_size": 2} | {f"mesh.{key}": value for key, value in mesh.items()})
    networks = random_networks("bfloat16", {name: RANDOM[name] | NARROW[name] for name in NARROW})
    on = config.make_mesh(concepts, devices)
    with as_if_there(backend, devices):
        return lower_step(config, networks, on, concepts, length).compile().as_text()
