"""The training step in PyTorch, made of diffusers' and transformers' modules, for `catversion bench --vs=torch`.

It trains one concept, so C concepts with batches of B become one batch of C x B images. PyTorch is not a dependency:
it is imported only inside the functions that need it.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from catversion_jax.config import Config
from catversion_jax.models.prefix_attention import resolve_layers
from catversion_jax.utils.errors import UserError
from catversion_jax.weights.source import FOLDERS

PACKAGES = ("torch", "diffusers", "transformers")
PLATFORMS = {"cpu": "cpu", "gpu": "cuda"}
"""JAX's platform -> PyTorch's device."""


@dataclass(frozen=True)
class Recipe:
    """One way to train in PyTorch."""

    label: str
    dtype: str | None  # of the text encoder and the UNet; None: the config's
    checkpointing: bool  # recompute the UNet's activations in the backward pass
    encodes: bool  # encode the images with the VAE in every step


RECIPES = {
    "torch_authors": Recipe("PyTorch, the authors' recipe", "float32", checkpointing=True, encodes=True),
    "torch_sdpa": Recipe("PyTorch, SDPA, latents given", None, checkpointing=False, encodes=False),
}


def missing() -> list[str]:
    """Returns the packages that are not installed."""
    return [package for package in PACKAGES if importlib.util.find_spec(package) is None]


def builders(
    config: Config, configs: dict[str, dict], folder: Path | None, platform: str, threads: int
) -> tuple[str, dict[str, Callable]]:
    """Returns PyTorch's version and, for each recipe, a function from a row of the table to the row and a dispatch.

    `configs` are the components' config.json. `folder` is the model in diffusers layout, None for random weights.
    """
    if platform not in PLATFORMS:
        raise UserError(f"PyTorch: this is a {platform}; expected one of {', '.join(PLATFORMS)}")
    if "text_2" in configs:
        raise UserError("PyTorch: Stable Diffusion XL has two text encoders; expected a 1.x or 2.x model")
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    return torch.__version__, {
        what: partial(build, recipe, config, configs, folder, PLATFORMS[platform]) for what, recipe in RECIPES.items()
    }


def load_module(component: str, configs: dict[str, dict], folder: Path | None):
    """Returns a frozen network of the model, float32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    kind = {"text": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL}[component]
    if folder is not None:
        network = kind.from_pretrained(folder / FOLDERS[component], local_files_only=True)
    elif component == "text":
        network = kind(CLIPTextConfig(**configs[component]))
    else:
        network = kind.from_config(configs[component])
    return network.float().requires_grad_(False)


def attach(text_encoder, prefix, layers: tuple[int, ...], logit_bias: float) -> None:
    """Puts the prefix [P, L, 2, H, D] in front of the keys and values of the encoder's self-attention in `layers`."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    length, _, _, heads, head_dim = prefix.shape

    def forward_of(attention, index: int):
        def forward(hidden_states, *_, **__):
            batch, queries = hidden_states.shape[:2]
            query, key, value = (
                project(hidden_states).unflatten(-1, (heads, head_dim)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            first_key, first_value = (
                part.to(query.dtype).transpose(0, 1).expand(batch, -1, -1, -1) for part in prefix[:, index].unbind(1)
            )
            causal = torch.ones(queries, queries, dtype=torch.bool, device=query.device).triu(1)
            mask = torch.cat([query.new_full((queries, length), logit_bias), query.new_zeros(causal.shape)], dim=1)
            mask[:, length:].masked_fill_(causal, -torch.inf)
            out = scaled_dot_product_attention(
                query, torch.cat([first_key, key], dim=2), torch.cat([first_value, value], dim=2), mask
            )
            return attention.out_proj(out.transpose(1, 2).flatten(2)), None

        return forward

    # transformers 4: model.text_model.encoder.layers; 5: model.encoder.layers
    stack = getattr(text_encoder, "text_model", text_encoder).encoder.layers
    for index, layer in enumerate(layers):
        attention = stack[layer].self_attn
        attention.forward = forward_of(attention, index)


def build(recipe: Recipe, config: Config, configs: dict[str, dict], folder: Path | None, device: str, row):
    """Returns the row without its times, and a warmed-up dispatch of its `steps_per_dispatch` steps."""
    import torch

    on_gpu = device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step = make_step(recipe, config, configs, folder, device, row.concepts * row.batch)

    def dispatch() -> None:
        for _ in range(row.steps_per_dispatch):
            step()
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(2):
        dispatch()
    if on_gpu:
        most = torch.cuda.max_memory_allocated() - before
        row = replace(row, peak_memory_bytes=most, peak_memory_from="device")
    return row, dispatch


def make_step(
    recipe: Recipe, config: Config, configs: dict[str, dict], folder: Path | None, device: str, batch: int
) -> Callable[[], Any]:
    """Returns a function that takes one training step and returns the loss. Images and token ids are random.

    A step is the text encoder with the prefix, the UNet, the backward pass to the prefix, and AdamW.
    """
    import torch
    from torch.nn.functional import mse_loss

    torch.manual_seed(0)
    dtype = getattr(torch, recipe.dtype or config.model.dtype)
    text_encoder, unet = (load_module(name, configs, folder).to(device, dtype) for name in ("text", "unet"))
    if recipe.checkpointing:
        unet.train().enable_gradient_checkpointing()
    depth, width = text_encoder.config.num_hidden_layers, text_encoder.config.hidden_size
    heads = text_encoder.config.num_attention_heads
    layers = resolve_layers(config.adapter.layers, depth)
    shape = (config.adapter.length, len(layers), 2, heads, width // heads)
    prefix = torch.nn.Parameter(config.adapter.init_std * torch.randn(shape, device=device))
    attach(text_encoder, prefix, layers, config.adapter.logit_bias)
    train = config.train
    optimizer = torch.optim.AdamW(
        [prefix], train.learning_rate, (train.b1, train.b2), train.eps, weight_decay=train.weight_decay
    )
    ids = torch.randint(text_encoder.config.vocab_size, (batch, 77), device=device)
    alphas = torch.linspace(0.999, 0.005, 1000, device=device)  # one schedule takes as long as another
    latents_shape = (batch, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    mean = torch.randn(latents_shape, device=device)
    if recipe.encodes:
        vae = load_module("vae", configs, folder).to(device)
        side = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
        images = torch.rand((batch, 3, side, side), device=device) * 2 - 1

    def encoded():
        with torch.no_grad():
            return vae.encode(images).latent_dist.sample() * vae.config.scaling_factor

    def given():
        return mean + 0.1 * torch.randn_like(mean)

    next_latents = encoded if recipe.encodes else given

    def step():
        latents = next_latents()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(1000, (batch,), device=device)
        alpha = alphas[timesteps, None, None, None]
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        states = text_encoder(ids).last_hidden_state
        loss = mse_loss(unet(noisy.to(dtype), timesteps, states).sample.float(), noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step
