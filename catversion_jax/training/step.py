"""One training step as a pure function: draws photos, noise and timesteps, and updates only what the method learns.

`train_step` is one step, `chunk` is several of them in one dispatch, and `compile_chunk` compiles that for a mesh.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from catversion_jax.base import noise_schedule
from catversion_jax.base.pipeline import Networks
from catversion_jax.base.text_states import PromptStates, upper_layers
from catversion_jax.config import Config
from catversion_jax.config.optimizer import OptimizerConfig
from catversion_jax.config.sections import StopConfig, TrainConfig
from catversion_jax.methods.base import Method
from catversion_jax.models.convolution import TURNED
from catversion_jax.models.sharding import sharding
from catversion_jax.models.unet import Context, UNet2DConditionModel
from catversion_jax.training.state import ConceptData, Frozen, TrainState, compile_init
from catversion_jax.utils.compiler import compiler_options
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn
from catversion_jax.utils.types import AnyArray, Array, Bool, Float, Int, Key, Params, Shaped


@dataclass(frozen=True)
class StepConfig:
    """Everything that is static in the step."""

    networks: Networks
    method: Method
    optimizer: OptimizerConfig
    batch_size: int
    mesh: Mesh
    stop: StopConfig = StopConfig()
    timesteps: tuple[float, float] = TrainConfig.timesteps  # the part of the noise schedule that is trained on
    text_penalty: float = TrainConfig.text_penalty

    @classmethod
    def of(cls, config: Config, networks: Networks, concepts: int = 1, mesh: Mesh | None = None) -> "StepConfig":
        """Returns the step for `concepts` concepts. Raises UserError if they cannot share one.

        `mesh` is that of the devices which it is compiled for; None: this process's.
        """
        method = config.make_method(networks)
        if method.changes_unet and concepts > 1:
            raise UserError(
                f"config.method={config.method!r}: changes the UNet, which the {concepts} concepts of a step share; "
                "learn one at a time, with catversion train"
            )
        unet = UNet2DConditionModel(replace(networks.unet.config, remat=config.train.remat))
        return cls(
            networks=replace(networks, unet=unet),
            method=method,
            optimizer=config.train.optimizer,
            batch_size=config.train.batch_size,
            timesteps=config.train.timesteps,
            text_penalty=config.train.text_penalty,
            mesh=config.make_mesh(concepts) if mesh is None else mesh,
            stop=config.stop,
        )

    @property
    def timestep_range(self) -> range:
        """The timesteps that are trained on."""
        total = self.networks.schedule.num_train_timesteps
        start, stop = (round(share * total) for share in self.timesteps)
        start = min(start, total - 1)
        return range(start, max(stop, start + 1))

    def init_state(self, seeds: Sequence[int]) -> TrainState:
        """Returns the state before the first step, with one concept for each seed."""
        return self._init(jnp.asarray(seeds, jnp.uint32))

    @cached_property
    def _init(self):
        # Once, and not anew for each concept that enters a slot.
        return compile_init(self.method, self.networks, self.optimizer, keeps_best=self.stop.every > 0)


def warn_of_idle_devices(config: Config, mesh: Mesh, slots: int | None = None) -> None:
    """Warns if a step of `slots` concepts (None: of a run) divides over a part of this process's devices alone."""
    count = jax.local_device_count()
    if mesh.size == count:
        return
    copies = count // (config.mesh.fsdp * config.mesh.tensor)
    todo = f"make batch.slots a multiple of {copies}"
    if slots is None:
        todo = f"make it a multiple of {copies}, or train several concepts at once with catversion batch"
    what = f"train.batch_size={config.train.batch_size}"
    if slots is not None:
        what = f"batch.slots={slots} with {what}"
    warn(f"{what} divides over {mesh.size} of the {count} devices, and {count - mesh.size} are idle; {todo}")


ACCELERATOR_STEPS_PER_DISPATCH = 10  # enough to hide the host's work behind the device's


def steps_per_dispatch(train: TrainConfig) -> int:
    """Returns how many steps the host dispatches at a time."""
    on_cpu = jax.default_backend() == "cpu"
    return train.steps_per_dispatch or (1 if on_cpu else ACCELERATOR_STEPS_PER_DISPATCH)


class Minibatch(flax.struct.PyTreeNode):
    """The examples of one concept's step."""

    latents: Float[AnyArray, "*C B h w c"]
    noise: Float[AnyArray, "*C B h w c"]
    timesteps: Int[AnyArray, "*C B"]
    prompts: tuple[PromptStates, ...]  # for each text encoder
    weight: Float[AnyArray, "*C B h w 1"] | None = None  # of each latent position in the loss; None: all equal


def draw_minibatch(state: TrainState, data: ConceptData, config: StepConfig) -> Minibatch:
    """Draws one concept's batch (no concept axis), as a function of its seed and step alone.

    Photos, mirror images, a photo's prompts and timesteps are uniform; latents are a fresh sample of the photos'
    posteriors. If the method preserves a prior, as many images of the class follow the photos.
    """
    # Folding the step into one base key leaves no random state to save: a resumed run draws what an unbroken one draws.
    key = jax.random.fold_in(jax.random.key(state.seed), state.step)
    batch = draw_examples(data, key, config)
    if data.prior is None:
        return batch
    return jax.tree.map(
        lambda *x: jnp.concatenate(x), batch, draw_examples(data.prior, jax.random.fold_in(key, 1), config)
    )


def draw_examples(data: ConceptData, key: Key[Array, ""], config: StepConfig) -> Minibatch:
    batch = (config.batch_size,)
    keys = jax.random.split(key, 6)
    photo = jax.random.randint(keys[0], batch, 0, data.photos)
    flip = jax.random.randint(keys[1], batch, 0, data.mean.shape[1])
    prompt = data.first_prompt[photo] + jax.random.randint(keys[2], batch, 0, data.prompt_count[photo])
    mean, std = data.mean[photo, flip], data.std[photo, flip]
    return Minibatch(
        latents=mean + std * jax.random.normal(keys[3], mean.shape),
        noise=jax.random.normal(keys[4], mean.shape),
        timesteps=spaced_timesteps(keys[5], config.batch_size, config.timestep_range),
        prompts=jax.tree.map(lambda x: x[prompt], data.prompts),
        weight=None if data.weight is None else data.weight[photo, flip],
    )


def spaced_timesteps(key: Key[Array, ""], batch_size: int, within: range) -> Int[Array, "B"]:
    """Returns timesteps of a range, evenly spaced on a circle from a random start."""
    # Each timestep is uniform by itself, so the loss stays unbiased. It depends on the timestep most of all, and varies
    # less from batch to batch this way (Kingma et al. 2021, appendix I.1; measured in docs/performance.md).
    phases = (jax.random.uniform(key) + jnp.arange(batch_size) / batch_size) % 1.0
    # A phase just below 1 may round up to the end of the range.
    return jnp.minimum(within.start + (phases * len(within)).astype(jnp.int32), within[-1])


def denoising_loss(learned: Params, frozen: Frozen, batch: Minibatch, config: StepConfig) -> Float[Array, "C"]:
    """Returns each concept's mean squared error of the UNet's prediction, with the text penalty, float32.

    `learned` and `batch` have a leading concept axis, of size 1 if the method changes the UNet.
    """
    net, method = config.networks, config.method
    context = jax.vmap(lambda learned, prompts: method.condition(learned, prompts, frozen.text, net))(
        learned, batch.prompts
    )
    unet = method.unet(jax.tree.map(lambda x: x[0], learned), frozen.unet)
    concepts, size = batch.timesteps.shape
    # All concepts go through the UNet as one batch, since they share its weights; the constraint splits it by device.
    split = partial(jax.lax.with_sharding_constraint, shardings=sharding(config.mesh, "batch"))

    def flat(x: Shaped[Array, "C B *rest"]) -> Shaped[Array, "C*B *rest"]:
        return split(x.reshape(concepts * size, *x.shape[2:]))

    asked = (batch.replace(prompts=()), context)
    # XLA cannot split attention kernels, so models.sharding.on_each_device does, over the mesh that is set here.
    with jax.sharding.use_abstract_mesh(config.mesh.abstract_mesh):
        errors = prediction_error(frozen.replace(unet=unet), *jax.tree.map(flat, asked), networks=net)
    losses = errors.reshape(concepts, size).mean(axis=1)
    if not config.text_penalty:
        return losses
    base = jax.vmap(lambda prompts: unchanged_context(prompts, frozen, config))(batch.prompts)
    change, whole = (
        jnp.square(x.astype(jnp.float32)).mean((1, 2, 3)) for x in (context.states - base.states, base.states)
    )
    return losses + config.text_penalty * change / whole


def unchanged_context(prompts: tuple[PromptStates, ...], frozen: Frozen, config: StepConfig) -> Context:
    """Returns the base model's text conditioning, from the states below the method's first layers."""
    net = config.networks
    return upper_layers(net.text, frozen.text, prompts, (None,) * len(prompts), config.method.first_layers(net))


def prediction_error(frozen: Frozen, batch: Minibatch, context: Context, *, networks: Networks) -> Float[Array, "B"]:
    """Returns the mean squared error of the UNet's prediction for each image, weighted by latent position, float32."""
    alpha = frozen.alphas_cumprod[batch.timesteps]
    noisy = noise_schedule.add_noise(batch.latents, batch.noise, alpha)
    variables = {"params": frozen.unet} | ({} if frozen.turned is None else {TURNED: frozen.turned})
    prediction: Any = networks.unet.apply(variables, noisy, batch.timesteps, *context)
    target = noise_schedule.TARGETS[networks.schedule.prediction_type](batch.latents, batch.noise, alpha)
    errors = jnp.square(prediction.astype(jnp.float32) - target)
    return (errors if batch.weight is None else batch.weight * errors).mean(axis=(1, 2, 3))


def finished(state: TrainState, steps: Int[AnyArray, "C"], stop: StopConfig) -> Bool[AnyArray, "C"]:
    """Returns which concepts have taken their last step. Takes arrays of JAX or numpy."""
    return (state.step >= steps) | ((stop.every > 0) & (state.stale >= stop.patience))


def update(
    state: TrainState, frozen: Frozen, batch: Minibatch, steps: Int[AnyArray, "C"], config: StepConfig
) -> tuple[TrainState, dict[str, Float[Array, "C"]]]:
    """Updates what each concept learns by the gradient of its own loss.

    A finished concept stays as it is. So does one whose loss or gradient is not finite: its `step` does not advance.
    """

    # A concept's loss depends on no other concept's parameters, so the gradient of the sum with respect to each
    # concept's parameters is that of its own loss: one backward pass serves all.
    def total(learned):
        losses = denoising_loss(learned, frozen, batch, config)
        return losses.sum(), losses

    grads, losses = jax.grad(total, has_aux=True)(state.learned)
    learning_rate = config.optimizer.learning_rate_at(state.step, steps)

    def one(state: TrainState, grad, loss, learning_rate, done) -> tuple[TrainState, Float[Array, ""]]:
        norm = optax.tree.norm(grad)
        updates, opt_state = config.optimizer.transformation().update(grad, state.opt_state, state.learned)
        # AdamW runs at rate 1 and its update is scaled here, since concepts have schedules of different lengths. The
        # numbers are the same: the whole update, weight decay included, is proportional to the rate.
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
    """Updates every concept once. Returns the state and the metrics of each concept: loss, grad_norm, learning_rate."""
    batch = jax.vmap(lambda state, data: draw_minibatch(state, data, config))(state, data)
    return update(state, frozen, batch, data.steps, config)


def chunk(
    state: TrainState, frozen: Frozen, data: ConceptData, *, config: StepConfig, length: int
) -> tuple[TrainState, dict[str, Float[Array, "length C"]]]:
    """Runs `length` steps in one dispatch."""
    one = partial(train_step, frozen=frozen, data=data, config=config)
    # XLA's CPU convolutions are 1.3 to 28 times slower in a loop's body; a scan of one step, even unrolled, does not
    # avoid that (docs/performance.md).
    if length == 1:
        state, metrics = one(state)
        return state, jax.tree.map(lambda x: x[None], metrics)
    return jax.lax.scan(lambda state, _: one(state), state, length=length)


EVALUATED = 8  # noisy photos per concept in an evaluation


def fixed_batch(data: ConceptData, config: StepConfig) -> Minibatch:
    """Returns one concept's batch for evaluations (no concept axis).

    It holds the photos in turn, with the means of their posteriors, fixed noise, and the timesteps in the middle of
    equal parts of the schedule.
    """
    # Always the same batch: the losses of two evaluations differ by what was learned, not by the draw. The maxima below
    # are for empty slots, which have neither photos nor prompts.
    index = jnp.arange(EVALUATED)
    photo = index % jnp.maximum(1, data.photos)
    prompt = data.first_prompt[photo] + index % jnp.maximum(1, data.prompt_count[photo])
    latents = data.mean[photo, 0]
    within = config.timestep_range
    return Minibatch(
        latents=latents,
        noise=jax.random.normal(jax.random.key(0), latents.shape),
        timesteps=within.start + ((index + 0.5) * len(within) / EVALUATED).astype(jnp.int32),
        prompts=jax.tree.map(lambda x: x[prompt], data.prompts),
        weight=None if data.weight is None else data.weight[photo, 0],
    )


def evaluate_loss(
    state: TrainState, frozen: Frozen, data: ConceptData, *, config: StepConfig
) -> tuple[TrainState, Float[Array, "C"]]:
    """Returns the state, with the evaluation noted for the concepts that are due, and the loss of every concept.

    A concept is due if its step is a multiple of `stop.every` and it is not finished.
    """
    batch = jax.vmap(lambda data: fixed_batch(data, config))(data)
    losses = denoising_loss(state.learned, frozen, batch, config)
    stop = config.stop
    due = (state.step > 0) & (state.step % stop.every == 0) & ~finished(state, data.steps, stop)
    return noted(state, losses, due, stop.margin), losses


def noted(state: TrainState, losses: Float[AnyArray, "C"], due: Bool[AnyArray, "C"], margin: float) -> TrainState:
    """Notes the evaluation of the concepts that are due: their lowest loss, and what was learned by then."""
    lowest = due & (losses < state.best)
    stale = jnp.where(losses < state.best * (1 - margin), 0, state.stale + 1)

    def keep(new: Shaped[AnyArray, "C *rest"], old: Shaped[AnyArray, "C *rest"]) -> Shaped[AnyArray, "C *rest"]:
        return jnp.where(lowest.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return state.replace(
        best=jnp.where(lowest, losses, state.best),
        stale=jnp.where(due, stale, state.stale),
        kept=None if state.kept is None else jax.tree.map(keep, state.learned, state.kept),
    )


@cache
def compile_evaluate(config: StepConfig):
    """Returns `evaluate_loss(state, frozen, data)`, jitted over the config's mesh; the state's buffers are donated."""
    concept = sharding(config.mesh, "concept")
    return jax.jit(
        partial(evaluate_loss, config=config),
        in_shardings=(concept, None, concept),
        out_shardings=(concept, None),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )


@cache
def compile_chunk(config: StepConfig, length: int):
    """Returns `chunk(state, frozen, data)`, jitted over the config's mesh; the state's buffers are donated."""
    concept = sharding(config.mesh, "concept")
    return jax.jit(
        partial(chunk, config=config, length=length),
        in_shardings=(concept, None, concept),  # None: the base model keeps its own sharding
        out_shardings=(concept, None),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )
