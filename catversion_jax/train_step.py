"""One training step, pure: draw photos, noise and timesteps, predict the noise, move what is learned alone.

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
from catversion_jax.method import Method
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
    """AdamW on what is learned."""

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
    method: Method
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
    weight: Float[Array, "B h w 1"] | None = None  # of each place in the loss; None: all alike


def draw(state: TrainState, data: ConceptData, config: StepConfig) -> Batch:
    """One concept's batch (no concept axis): photos, mirror images, prompts and timesteps uniformly, a fresh sample
    of each posterior. A function of seed and step alone, so a resumed run draws what an unbroken one does.

    The timesteps of a batch are evenly spaced from a random start (Kingma et al. 2021, appendix I.1): each is uniform
    by itself, and the loss, which depends on the timestep most of all, varies less from batch to batch.

    A method that preserves a prior gets as many of the class's pictures besides.
    """
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    batch = draw_from(data, key, config)
    if data.prior is None:
        return batch
    return jax.tree.map(lambda *x: jnp.concatenate(x), batch, draw_from(data.prior, jax.random.fold_in(key, 1), config))


def draw_from(data: ConceptData, key: Key[Array, ""], config: StepConfig) -> Batch:
    batch = (config.batch_size,)
    keys = jax.random.split(key, 6)
    photo = jax.random.randint(keys[0], batch, 0, data.photos)
    flip = jax.random.randint(keys[1], batch, 0, data.mean.shape[1])
    prompt = jax.random.randint(keys[2], batch, 0, data.prompt_count)
    mean, std = data.mean[photo, flip], data.std[photo, flip]
    return Batch(
        latents=mean + std * jax.random.normal(keys[3], mean.shape),
        noise=jax.random.normal(keys[4], mean.shape),
        timesteps=spaced_timesteps(keys[5], config.batch_size, config.networks.schedule.num_train_timesteps),
        prompts=jax.tree.map(lambda x: x[prompt], data.prompts),
        weight=None if data.weight is None else data.weight[photo, flip],
    )


def spaced_timesteps(key: Key[Array, ""], batch_size: int, total: int) -> Int[Array, "B"]:
    """Uniform timesteps in [0, total), one in each of `batch_size` equal parts of the circle."""
    places = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
    return jnp.minimum((places * total).astype(jnp.int32), total - 1)


def denoising_loss(learned: Params, frozen: Frozen, batch: Batch, config: StepConfig) -> Float[Array, "C"]:
    """Each concept's mean squared error of the UNet's prediction, float32. `learned` and `batch` have the concept axis
    in front; it is 1 where the method changes the UNet."""
    net, method = config.networks, config.method
    context = jax.vmap(lambda learned, prompts: method.condition(learned, prompts, frozen.text, net))(
        learned, batch.prompts
    )
    unet = method.unet(jax.tree.map(lambda x: x[0], learned), frozen.unet)
    concepts, size = batch.timesteps.shape
    split = partial(jax.lax.with_sharding_constraint, shardings=sharding(config.mesh, "batch"))

    def flat(x: Float[Array, "C B *rest"]) -> Float[Array, "C*B *rest"]:
        return split(x.reshape(concepts * size, *x.shape[2:]))

    asked = (batch.latents, batch.noise, batch.timesteps, context, batch.weight)
    with jax.sharding.use_abstract_mesh(config.mesh.abstract_mesh):  # for attention kernels, which XLA cannot split
        errors = prediction_error(frozen.replace(unet=unet), *jax.tree.map(flat, asked), networks=net)
    return errors.reshape(concepts, size).mean(axis=1)


def prediction_error(
    frozen: Frozen,
    latents: Float[Array, "B h w c"],
    noise: Float[Array, "B h w c"],
    timesteps: Int[Array, "B"],
    context: Context,
    weight: Float[Array, "B h w 1"] | None = None,
    *,
    networks: Networks,
) -> Float[Array, "B"]:
    """Mean squared error, of places of a `weight`, of the UNet's prediction for each noisy picture, float32."""
    alpha = frozen.alphas_cumprod[timesteps]
    noisy = diffusion.add_noise(latents, noise, alpha)
    prediction = networks.unet.apply({"params": frozen.unet}, noisy, timesteps, *context).astype(jnp.float32)
    target = diffusion.TARGETS[networks.schedule.prediction_type](latents, noise, alpha)
    errors = jnp.square(prediction - target)
    return (errors if weight is None else weight * errors).mean(axis=(1, 2, 3))


def finished(state: TrainState, steps: Int[Array, "C"], stop: StopConfig) -> Bool[Array, "C"]:
    """Which concepts have taken their last step. Of arrays of JAX or numpy."""
    return (state.step >= steps) | ((stop.every > 0) & (state.stale >= stop.patience))


def update(
    state: TrainState, frozen: Frozen, batch: Batch, steps: Int[Array, "C"], config: StepConfig
) -> tuple[TrainState, dict[str, Float[Array, "C"]]]:
    """Move what each concept learns by its own loss's gradient. A concept that is finished stays as it is; so does one
    whose loss or gradient is not finite: its `step` does not advance."""

    def total(learned):
        losses = denoising_loss(learned, frozen, batch, config)
        return losses.sum(), losses  # concepts share nothing, so the sum's gradient is each one's own

    grads, losses = jax.grad(total, has_aux=True)(state.learned)
    learning_rate = config.optimizer.learning_rate_at(state.step, steps)

    def one(state: TrainState, grad, loss, learning_rate, done) -> tuple[TrainState, Float[Array, ""]]:
        norm = optax.tree.norm(grad)
        updates, opt_state = config.optimizer.transformation().update(grad, state.opt_state, state.learned)
        learned = jax.tree.map(lambda x, update: x + learning_rate * update, state.learned, updates)
        moved = state.replace(step=state.step + 1, learned=learned, opt_state=opt_state)
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
    """`length` steps in one dispatch. A single one is no loop, not even one that is unrolled: XLA's CPU convolutions
    are 1.3 to 28 times slower in a loop's body (docs/performance.md)."""
    one = partial(train_step, frozen=frozen, data=data, config=config)
    if length == 1:
        state, metrics = one(state)
        return state, jax.tree.map(lambda x: x[None], metrics)
    return jax.lax.scan(lambda state, _: one(state), state, length=length)


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
        weight=None if data.weight is None else data.weight[index % jnp.maximum(1, data.photos), 0],
    )


def evaluate(
    state: TrainState, frozen: Frozen, data: ConceptData, *, config: StepConfig
) -> tuple[TrainState, Float[Array, "C"]]:
    """The evaluation loss of every concept, noted in the state of those that are due: whose step is a multiple of
    `stop.every` and who are not finished."""
    batch = jax.vmap(lambda data: fixed_batch(data, config))(data)
    losses = denoising_loss(state.learned, frozen, batch, config)
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
