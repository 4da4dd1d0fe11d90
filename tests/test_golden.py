"""The mini model's numbers against PyTorch's (diffusers 0.42.1, transformers 5.23, float32)."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from catversion_jax.base import pipeline, schedulers
from catversion_jax.base.text_states import lower_layers, upper_layers
from catversion_jax.methods.base import BaseModel
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.models.prefix_attention import Prefix
from catversion_jax.models.sharding import make_mesh, sharding
from catversion_jax.sampling import conditioning, denoising
from catversion_jax.training import step as ts
from catversion_jax.training.state import Frozen
from catversion_jax.weights.source import open_source
from tests.conftest import max_error

LAYERS = (9, 10, 11)
TOLERANCE = 2e-4


def test_token_ids(mini, golden):
    np.testing.assert_array_equal(mini.tokenizer(list(golden["prompts"])), golden["token_ids"])


def test_text_encoder(mini, golden):
    out = jax.jit(mini.networks.text[0].apply)({"params": mini.params["text"][0]}, golden["token_ids"])
    assert len(out["hidden_states"]) == len(golden["text.hidden_states"]) == 13
    assert max_error(np.stack(out["hidden_states"]), golden["text.hidden_states"]) < TOLERANCE
    assert max_error(out["last_hidden_state"], golden["text.last_hidden_state"]) < TOLERANCE
    assert max_error(out["text_embeds"], golden["text.text_embeds"]) < TOLERANCE


@pytest.mark.parametrize(("name", "bias"), [("p1_bias0", 0.0), ("p1_bias1", 1.0), ("p4_bias0", 0.0)])
def test_text_encoder_with_prefix(mini, golden, name, bias):
    token_ids = golden["token_ids"]
    token_mask = jnp.ones((*token_ids.shape, 1), bool)
    prefix = Prefix(jnp.asarray(golden[f"prefix.{name}"]), bias, jnp.float32(1), token_mask, LAYERS)
    learned, method = {"prefix": golden[f"prefix.{name}"]}, CatVersion((LAYERS,), bias)
    tokens = (conditioning.Tokens(token_ids, token_mask),)
    encode = partial(conditioning.encode_prompts, mini.params["text"], tokens, networks=mini.networks)
    whole = encode(learned, 1.0, method=method)
    assert whole.pooled is None
    assert max_error(whole.states, golden[f"text_with_prefix.{name}"]) < TOLERANCE
    (encoder,), (params,) = mini.networks.text, mini.params["text"]
    prompts = lower_layers(encoder, params, token_ids, token_mask, stop=LAYERS[0])
    split = jax.jit(upper_layers, static_argnums=(0, 4))((encoder,), (params,), (prompts,), (prefix,), LAYERS[:1])
    assert max_error(split.states, golden[f"text_with_prefix.{name}"]) < TOLERANCE


def test_unet(mini, golden):
    apply = jax.jit(mini.networks.unet.apply)
    eps = apply({"params": mini.params["unet"]}, golden["unet.sample"], golden["unet.timestep"], golden["unet.context"])
    assert max_error(eps, golden["unet.eps"]) < TOLERANCE


def test_vae(mini, golden):
    vae, params = mini.networks.vae, {"params": mini.params["vae"]}
    apply = jax.jit(vae.apply, static_argnames="method")
    mean, logvar = apply(params, golden["vae.image"], method="encode")
    assert max_error(mean, golden["vae.mean"]) < TOLERANCE
    assert max_error(logvar, golden["vae.logvar"]) < TOLERANCE
    assert max_error(apply(params, golden["vae.mean"], method="decode"), golden["vae.decoded"]) < TOLERANCE


def test_image_encoder(golden):
    module, params = pipeline.load_component(open_source(str(pipeline.MINI)), "image")
    embeds = jax.jit(module.apply)({"params": params}, golden["image.pixel_values"])
    assert max_error(embeds, golden["image.image_embeds"]) < TOLERANCE


def test_noise_schedule(mini, golden):
    schedule = mini.networks.schedule
    assert max_error(schedule.alphas_cumprod, golden["alphas_cumprod"]) < 1e-6
    np.testing.assert_array_equal(schedulers.plan(schedule, "", 30).calls.timestep, golden["ddim.timesteps"])


def test_guided_ddim(mini, golden):
    token_ids = golden["token_ids"]
    token_mask, base = jnp.ones((1, 77, 1), bool), jnp.zeros((1, 77, 1), bool)
    encode = partial(conditioning.encode_prompts, mini.params["text"], networks=mini.networks)
    learned = {"prefix": golden["prefix.p1_bias0"]}
    positive = encode((conditioning.Tokens(token_ids[:1], token_mask),), learned, 1.0, method=CatVersion((LAYERS,)))
    negative = encode((conditioning.Tokens(token_ids[1:2], base),), {}, 0.0, method=BaseModel())
    both = jax.tree.map(lambda *x: jnp.stack(x), negative, positive)
    trajectory = schedulers.plan(mini.networks.schedule, "", 30)
    latents = denoising.denoise(
        mini.params["unet"],
        trajectory.start(jnp.asarray(golden["ddim.x_T"])),
        denoising.Guided(jnp.zeros(1, jnp.uint32), both, jnp.float32(5.0)),
        trajectory,
        networks=mini.networks,
        at_once=1,
    )
    assert max_error(latents, golden["ddim.x_0_guidance5_prefix_p1_bias0"]) < 2e-3


def test_gradient_and_twenty_steps(mini, golden):
    networks = mini.networks
    config = ts.StepConfig(
        networks,
        CatVersion((LAYERS,)),
        ts.OptimizerConfig(),
        batch_size=2,
        mesh=make_mesh(1, 1, devices=jax.devices()[:1]),
    )
    frozen = Frozen(mini.params["unet"], mini.params["text"], jnp.asarray(networks.schedule.alphas_cumprod))
    (encoder,), (params,) = networks.text, mini.params["text"]
    prompts = lower_layers(encoder, params, golden["train.token_ids"], jnp.ones((2, 77, 1), bool), stop=LAYERS[0])
    state = config.init_state([0])
    state = state.replace(learned={"prefix": jnp.asarray(golden["prefix.p1_bias0"])[None]})
    state = jax.device_put(state, sharding(config.mesh, "concept"))

    @jax.jit  # weights that it closes over would be constants, which XLA is slow to compile
    def step(state, frozen, prompts, noise, timesteps):
        batch = ts.Minibatch(jnp.asarray(golden["train.latents"]), noise, timesteps, (prompts,))
        batch = jax.tree.map(lambda x: x[None], batch)
        return ts.update(state, frozen, batch, jnp.asarray([20]), config)

    losses = []
    for i in range(20):
        drawn = golden["train.noise"][i], golden["train.timesteps"][i].astype(np.int32)
        state, metrics = step(state, frozen, prompts, *drawn)
        losses.append(metrics["loss"][0])
        if i == 0:
            # Adam's first moment is now the gradient times 1 - b1, since nothing is clipped.
            moment = optax.tree.get(state.opt_state, "mu")["prefix"][0]
            reference = golden["train.grad_step0"]
            assert max_error(moment / (1 - ts.OptimizerConfig.b1), reference) / np.abs(reference).max() < 1e-3
    assert max_error(losses, golden["train.losses"]) < TOLERANCE
    difference = np.abs(np.asarray(state.learned["prefix"][0]) - golden["train.prefix_after_20_adamw_steps"])
    print(
        f"prefix after 20 steps: mean difference {difference.mean():.1e}, within 2e-3: {(difference < 2e-3).mean():.3f}"
    )
    assert difference.mean() < 2e-4
    assert (difference < 2e-3).mean() >= 0.99


def test_every_golden_array_is_used(golden):
    source = Path(__file__).read_text()
    inputs = {"prompts", "text.hidden_states"}
    for key in golden.keys() - inputs:
        assert f'"{key}"' in source or key.startswith(("prefix.", "text_with_prefix.")), key
