"""One training step, pure: draw photos, noise and timesteps, predict the noise, move the prefix alone.

`train_step` is what runs, `chunk` is several of them in one dispatch, `compile_chunk` puts it on a mesh.
"""

from dataclasses import dataclass
from functools import cache, partial

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from catversion_jax import diffusion, text
from catversion_jax.adapter import AdapterConfig, Prefix
from catversion_jax.models.unet import Context
from catversion_jax.pipeline import Networks
from catversion_jax.sharding import sharding
from catversion_jax.state import ConceptData, Frozen, TrainState
from catversion_jax.types import Array, Bool, Float, Int, Key, Params

DECAYS = {
    "constant": lambda progress: jnp.ones_like(progress),
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
}
"""Schedules of the learning rate by the progress in [0, 1] after the warm-up."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW on the prefix."""

    learning_rate: float = 1e-2  # the peak, and the rate that is really used: nothing multiplies it
    decay: str = "constant"  # a key of DECAYS
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = None  # of each concept's gradient; None: not clipped

    def transformation(self) -> optax.GradientTransformation:
        """AdamW at rate 1: `learning_rate_at` scales its updates, since each concept has a schedule of its own."""
        clip = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return optax.chain(clip, optax.adamw(1.0, self.b1, self.b2, self.eps, weight_decay=self.weight_decay))

    def learning_rate_at(self, step: Int[Array, "C"], steps: Int[Array, "C"]) -> Float[Array, "C"]:
        """The rate of update `step` (from 0) in a schedule of `steps` updates."""
        warmup = jnp.minimum(1.0, (step + 1) / max(1, self.warmup_steps))
        progress = jnp.clip((step - self.warmup_steps) / jnp.maximum(1, steps - self.warmup_steps), 0, 1)
        return self.learning_rate * warmup * DECAYS[self.decay](progress)


@dataclass(frozen=True)
class StopConfig:
    """When a concept has learned enough: its evaluation loss has not fallen any more."""

    every: int = 0  # steps from one evaluation to the next; 0: none, every concept takes all of its steps
    patience: int = 2  # evaluations without a lower loss after which a concept stops
    margin: float = 0.0  # share of the lowest loss by which a lower one must be lower to count


@dataclass(frozen=True)
class StepConfig:
    """All that is static in the step."""

    networks: Networks
    adapter: AdapterConfig
    optimizer: OptimizerConfig
    batch_size: int
    mesh: Mesh
    stop: StopConfig = StopConfig()


class Batch(flax.struct.PyTreeNode):
    """What one concept's step looks at."""

    latents: Float[Array, "B h w c"]
    noise: Float[Array, "B h w c"]
    timesteps: Int[Array, "B"]
    prompts: tuple[text.Prompts, ...]  # for each text encoder


def draw(state: TrainState, data: ConceptData, config: StepConfig) -> Batch:
    """One concept's batch (no concept axis): photos, mirror images, prompts and timesteps uniformly, a fresh sample
    of each posterior. A function of seed and step alone, so a resumed run draws what an unbroken one does.

    The timesteps of a batch are evenly spaced from a random start (Kingma et al. 2021, appendix I.1): each is uniform
    by itself, and the loss, which depends on the timestep most of all, varies less from batch to batch.
    """
    batch = (config.batch_size,)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(state.seed), state.step), 6)
    photo = jax.random.randint(keys[0], batch, 0, data.photos)
    flip = jax.random.randint(keys[1], batch, 0, data.mean.shape[1])
    prompt = jax.random.randint(keys[2], batch, 0, data.prompt_count)
    mean, std = data.mean[photo, flip], data.std[photo, flip]
    return Batch(
        latents=mean + std * jax.random.normal(keys[3], mean.shape),
        noise=jax.random.normal(keys[4], mean.shape),
        timesteps=spaced_timesteps(keys[5], config.batch_size, config.networks.schedule.num_train_timesteps),
        prompts=jax.tree.map(lambda x: x[prompt], data.prompts),
    )


def spaced_timesteps(key: Key[Array, ""], batch_size: int, total: int) -> Int[Array, "B"]:
    """Uniform timesteps in [0, total), one in each of `batch_size` equal parts of the circle."""
    places = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
    return jnp.minimum((places * total).astype(jnp.int32), total - 1)


def condition(
    prefix: tuple[Float[Array, "P L 2 H D"], ...],
    prompts: tuple[text.Prompts, ...],
    text_params: tuple[Params, ...],
    adapter: AdapterConfig,
    networks: Networks,
) -> Context:
    """What the UNet is conditioned on, with the prefix, from the states below it."""
    bias = jnp.float32(adapter.logit_bias)
    hooks = [
        Prefix(embeddings, bias, of_encoder.visible[..., None], layers)
        for embeddings, of_encoder, layers in zip(prefix, prompts, adapter.layers, strict=True)
    ]
    return text.upper(networks.text, text_params, prompts, hooks, [layers[0] for layers in adapter.layers])


def denoising_loss(
    prefix: tuple[Float[Array, "C P L 2 H D"], ...], frozen: Frozen, batch: Batch, config: StepConfig
) -> Float[Array, "C"]:
    """Each concept's mean squared error of the UNet's prediction, float32. `batch` has the concept axis in front."""
    net = config.networks

    def encode(prefix, prompts):
        return condition(prefix, prompts, frozen.text, config.adapter, net)

    context = jax.vmap(encode)(prefix, batch.prompts)
    concepts, size = batch.timesteps.shape
    split = partial(jax.lax.with_sharding_constraint, shardings=sharding(config.mesh, "batch"))

    def flat(x: Float[Array, "C B *rest"]) -> Float[Array, "C*B *rest"]:
        return split(x.reshape(concepts * size, *x.shape[2:]))

    latents, noise, timesteps, context = jax.tree.map(flat, (batch.latents, batch.noise, batch.timesteps, context))
    with jax.sharding.use_abstract_mesh(config.mesh.abstract_mesh):  # for attention kernels, which XLA cannot split
        errors = prediction_error(frozen, latents, noise, timesteps, context, net)
    return errors.reshape(concepts, size).mean(axis=1)


def prediction_error(
    frozen: Frozen,
    latents: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    timesteps: Int[Array, "B"],
    context: Context,
    networks: Networks,
) -> Float[Array, "B"]:
    """Mean squared error of the UNet's prediction for each noisy picture, float32."""
    alpha = frozen.alphas_cumprod[timesteps]
    noisy = diffusion.add_noise(latents, noise, alpha)
    prediction = networks.unet.apply({"params": frozen.unet}, noisy, timesteps, *context).astype(jnp.float32)
    target = diffusion.TARGETS[networks.schedule.prediction_type](latents, noise, alpha)
    return jnp.square(prediction - target).mean(axis=(1, 2, 3))


def finished(state: TrainState, steps: Int[Array, "C"], stop: StopConfig) -> Bool[Array, "C"]:
    """Which concepts have taken their last step. Of arrays of JAX or numpy."""
    return (state.step >= steps) | ((stop.every > 0) & (state.stale >= stop.patience))


def update(
    state: TrainState, frozen: Frozen, batch: Batch, steps: Int[Array, "C"], config: StepConfig
) -> tuple[TrainState, dict[str, Float[Array, "C"]]]:
    """Move each concept's prefix by its own loss's gradient. A concept that is finished stays as it is; so does one
    whose loss or gradient is not finite: its `step` does not advance."""

    def total(prefix):
        losses = denoising_loss(prefix, frozen, batch, config)
        return losses.sum(), losses  # concepts share nothing, so the sum's gradient is each one's own

    grads, losses = jax.grad(total, has_aux=True)(state.prefix)
    learning_rate = config.optimizer.learning_rate_at(state.step, steps)

    def one(state: TrainState, grad, loss, learning_rate, done) -> tuple[TrainState, Float[Array, ""]]:
        norm = optax.tree.norm(grad)
        updates, opt_state = config.optimizer.transformation().update(grad, state.opt_state, state.prefix)
        prefix = jax.tree.map(lambda x, update: x + learning_rate * update, state.prefix, updates)
        moved = state.replace(step=state.step + 1, prefix=prefix, opt_state=opt_state)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & ~done
        return jax.tree.map(lambda new, old: jnp.where(good, new, old), moved, state), norm

    done = finished(state, steps, config.stop)
    moved, norms = jax.vmap(one)(state, grads, losses, learning_rate, done)
    return moved, {"loss": losses, "grad_norm": norms, "learning_rate": learning_rate}


def train_step(
    state: TrainState, frozen: Frozen, data: ConceptData, *, config: StepConfig
) -> tuple[TrainState, dict[str, Float[Array, "C"]]]:
    """One update of every concept. Metrics per concept: loss, grad_norm and learning_rate."""
    batch = jax.vmap(lambda state, data: draw(state, data, config))(state, data)
    return update(state, frozen, batch, data.steps, config)


def chunk(
    state: TrainState, frozen: Frozen, data: ConceptData, *, config: StepConfig, length: int
) -> tuple[TrainState, dict[str, Float[Array, "length C"]]]:
    """`length` steps in one dispatch. A single step is unrolled: XLA's CPU convolutions are 3 to 28 times slower in
    a loop body."""
    return jax.lax.scan(
        lambda state, _: train_step(state, frozen, data, config=config), state, length=length, unroll=length == 1
    )


EVALUATED = 8  # noisy photos per concept in an evaluation


def fixed_batch(data: ConceptData, config: StepConfig) -> Batch:
    """One concept's batch for evaluations (no concept axis): always the same photos, in turn, without the posterior's
    spread, the same noise, and timesteps in the middle of equal parts."""
    index = jnp.arange(EVALUATED)
    latents = data.mean[index % jnp.maximum(1, data.photos), 0]
    total = config.networks.schedule.num_train_timesteps
    return Batch(
        latents=latents,
        noise=jax.random.normal(jax.random.key(0), latents.shape),
        timesteps=((index + 0.5) * total / EVALUATED).astype(jnp.int32),
        prompts=jax.tree.map(lambda x: x[index % jnp.maximum(1, data.prompt_count)], data.prompts),
    )


def evaluate(
    state: TrainState, frozen: Frozen, data: ConceptData, *, config: StepConfig
) -> tuple[TrainState, Float[Array, "C"]]:
    """The evaluation loss of every concept, noted in the state of those that are due: whose step is a multiple of
    `stop.every` and who are not finished."""
    batch = jax.vmap(lambda data: fixed_batch(data, config))(data)
    losses = denoising_loss(state.prefix, frozen, batch, config)
    stop = config.stop
    due = (state.step > 0) & (state.step % stop.every == 0) & ~finished(state, data.steps, stop)
    better = losses < state.best * (1 - stop.margin)
    stale = jnp.where(better, 0, state.stale + 1)
    noted = state.replace(
        best=jnp.where(due, jnp.minimum(state.best, losses), state.best), stale=jnp.where(due, stale, state.stale)
    )
    return noted, losses


@cache
def compile_evaluate(config: StepConfig):
    """`evaluate(state, frozen, data)` jitted over the config's mesh; the state's buffers are donated."""
    concept = sharding(config.mesh, "concept")
    return jax.jit(
        partial(evaluate, config=config),
        in_shardings=(concept, None, concept),
        out_shardings=(concept, None),
        donate_argnums=0,
    )


@cache
def compile_chunk(config: StepConfig, length: int):
    """`chunk(state, frozen, data)` jitted over the config's mesh; the state's buffers are donated."""
    concept = sharding(config.mesh, "concept")
    return jax.jit(
        partial(chunk, config=config, length=length),
        in_shardings=(concept, None, concept),  # None: the base model as it lies
        out_shardings=(concept, None),
        donate_argnums=0,
    )
