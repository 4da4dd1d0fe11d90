"""`catversion train`: learn a concept from a folder of photos. The loop; all of its mathematics is in train_step."""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from catversion_jax import artifact, sampling, schedulers
from catversion_jax import config as config_lib
from catversion_jax.checkpoint import Checkpoints, explained
from catversion_jax.data import dataset
from catversion_jax.data.photos import Photo, read_photos
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.grid import grid
from catversion_jax.journal import Journal
from catversion_jax.models.unet import UNet2DConditionModel
from catversion_jax.pipeline import Networks, Pipeline, load
from catversion_jax.preparation import check_masks, prepare
from catversion_jax.run_dir import RunDir, plain
from catversion_jax.sharding import Rules, places, sharding
from catversion_jax.state import ConceptData, Frozen, TrainState, init_state
from catversion_jax.train_step import StepConfig, StopConfig, compile_chunk, compile_evaluate, finished

VALIDATION_PROMPTS = 4  # of config.sample.prompts, drawn every config.sample.every steps
ACCELERATOR_STEPS_PER_DISPATCH = 10  # hides the host's work behind the device's


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "A file of configs/; --config.KEY=VALUE changes any key.")
    flags.DEFINE_bool("resume", False, "Continue the run in config.run_dir from its last checkpoint.")


def main(arguments: flags.FlagValues) -> int:
    return train(given_config(arguments), resume=arguments.resume)


def given_config(arguments: flags.FlagValues) -> ConfigDict:
    if arguments.config is None:
        raise UserError("--config: missing; expected a config file, such as --config=configs/mini.py")
    return arguments.config


def load_model(config: ConfigDict, concepts: int = 1) -> Pipeline:
    """The base model that the config names, on the devices of its training step."""
    return load(**config.model, mesh=config_lib.mesh(config, concepts), rules=config.mesh.rules)


def train(config: ConfigDict, resume: bool = False) -> int:
    """Run, or continue, the training that `config` describes, and draw its sample grid. Returns the exit status: 0,
    or 128 + the number of the signal that interrupted it. Raises UserError for a user's mistake, before anything is
    compiled."""
    config_lib.check(config)
    run = RunDir(config_lib.expand(config.run_dir))
    run.check(config, resume)
    if run.finished:
        print(f"{run.path}: finished already; nothing to do")
        return 0
    pipeline = load_model(config)
    concept, photos, interrupted_by = learn(config, run, pipeline)
    if interrupted_by:
        print(f"{run.path}: stopped at step {concept.steps} of {config.train.steps}; continue with --resume")
        return 128 + interrupted_by
    base = paint_prompts(config, pipeline, concept, strength=0.0)
    image = sample_grid(photos, base, paint_prompts(config, pipeline, concept), config)
    write_atomically(run.samples, image.save)
    print(f"concept:  {run.artifact}\npictures: {run.samples}")
    print(f"curves:   tensorboard --logdir {run.events}")
    return 0


def learn(
    config: ConfigDict, run: RunDir, pipeline: Pipeline
) -> tuple[artifact.Concept, list[Photo], signal.Signals | None]:
    """From photos to `concept.safetensors`: the concept, the photos and, where a signal ended the training early, that
    signal; then there is no file yet."""
    photos = stored_or_read(run, config, pipeline.networks.resolution)
    step_config = make_step_config(config, pipeline.networks)
    schedulers.plan(pipeline.networks.schedule, config.sample.scheduler, config.sample.steps)  # refuses before training
    check_masks(photos, config.train.background_weight)
    run.claim(config)
    with explained(f"{run.data}: could not store the photos"):
        dataset.write(run.data, photos)
    data = prepare(config, step_config.method, pipeline, photos, kept=run.class_latents)
    checkpoints = Checkpoints(run.checkpoints, config.checkpoint.keep)
    try:
        state, interrupted_by = loop(config, step_config, pipeline, data, run, checkpoints)
    finally:
        checkpoints.close()
    concept = to_concept(config, step_config, pipeline, state)
    if interrupted_by is None:
        with explained(f"{run.artifact}: could not write the concept"):
            artifact.save(run.artifact, concept)
    return concept, photos, interrupted_by


def learn_once(config: ConfigDict, pipeline: Pipeline) -> artifact.Concept:
    """The concept of config.run_dir, learned unless it is there. Raises KeyboardInterrupt where a signal ended that."""
    run = RunDir(config_lib.expand(config.run_dir))
    run.check(config, resume=True)
    if run.artifact.is_file():
        return artifact.load(run.artifact)
    concept, _, interrupted_by = learn(config, run, pipeline)
    if interrupted_by:
        raise KeyboardInterrupt
    return concept


def stored_or_read(run: RunDir, config: ConfigDict, resolution: int) -> list[Photo]:
    """A run that is resumed reads the photos it stored: the folder may have changed or gone."""
    if run.config.is_file() and run.data.is_dir():
        with contextlib.suppress(UserError):
            return dataset.read(run.data)
    return read_photos(config.data.dir, resolution, config.data.masks_dir)


def make_step_config(config: ConfigDict, networks: Networks, concepts: int = 1) -> StepConfig:
    """Raises UserError where so many concepts cannot share a step."""
    method = config_lib.method(config, networks)
    if method.changes_unet and concepts > 1:
        raise UserError(
            f"config.method={config.method!r}: changes the UNet, which the {concepts} concepts of a step share; "
            "learn one at a time, with catversion train"
        )
    unet = UNet2DConditionModel(replace(networks.unet.config, remat=config.train.remat))
    return StepConfig(
        networks=replace(networks, unet=unet),
        method=method,
        optimizer=config_lib.optimizer_config(config),
        batch_size=config.train.batch_size,
        mesh=config_lib.mesh(config, concepts),
        stop=StopConfig(**config.stop),
    )


def fresh_state(step_config: StepConfig, seeds: Sequence[int]) -> TrainState:
    """The state before the first step of a concept for each seed."""
    optimizer = step_config.optimizer.transformation()
    return init_state(seeds, step_config.method, step_config.networks, optimizer)


def loop(
    config: ConfigDict,
    step_config: StepConfig,
    pipeline: Pipeline,
    data: ConceptData,
    run: RunDir,
    checkpoints: Checkpoints,
) -> tuple[TrainState, signal.Signals | None]:
    """Train from the last checkpoint, or from the start, to the last step. Returns the state and, where a signal
    ended it early, the signal. Raises UserError at a loss that is not finite, the last good state saved."""
    mesh = step_config.mesh
    on_concepts = sharding(mesh, "concept")
    state = jax.device_put(fresh_state(step_config, [config.seed]), on_concepts)
    if checkpoints.latest is not None:
        state = checkpoints.restore(state)
    frozen, data = freeze(pipeline, mesh, config.mesh.rules), jax.device_put(data, on_concepts)

    total, stop, step = config.train.steps, step_config.stop, int(state.step[0])
    events = [
        n for n in (total, config.checkpoint.every, config.sample.every, stop.every) if n
    ]  # a dispatch ends there
    journal = Journal(run.metrics, run.events, step)

    def done() -> bool:
        return bool(finished(state, data.steps, stop)[0])

    def save() -> None:
        checkpoints.save(step, state, plain(config))

    try:
        with signals() as received, tqdm(total=total, initial=step, unit=" steps", desc="compiling") as bar:
            while not done() and not received:
                length = min(steps_per_dispatch(config), *(until(step, n) for n in events))
                state, metrics = compile_chunk(step_config, length)(state, frozen, data)
                start, step = step, int(state.step[0])
                if bar.desc.startswith("compiling"):
                    bar.unpause()  # the rate and the time left are those of the steps alone
                    bar.set_description("training", refresh=False)
                record(journal, bar, start, step, jax.device_get(metrics))
                if step < start + length:
                    save()
                    raise UserError(not_finite(run, step, config))
                if stop.every and step % stop.every == 0:
                    state, loss = compile_evaluate(step_config)(state, frozen, data)
                    journal.scalars(step, {"evaluation_loss": float(loss[0])})
                if step % config.checkpoint.every == 0:
                    save()
                if config.sample.every and step % config.sample.every == 0:
                    concept = to_concept(config, step_config, pipeline, state)
                    images = paint_prompts(config, pipeline, concept, count=VALIDATION_PROMPTS)
                    journal.picture(step, "validation", np.concatenate(images, axis=1))
            save()
    finally:
        journal.close()
    return state, received[0] if received and not done() else None


def freeze(pipeline: Pipeline, mesh: Mesh, rules: Rules) -> Frozen:
    """The base model's share in the step, on the step's mesh: moved only where it does not lie so already."""

    def put(params):
        return jax.device_put(params, places(params, mesh, rules))

    alphas = jax.device_put(pipeline.networks.schedule.alphas_cumprod, sharding(mesh, "frozen"))
    return Frozen(put(pipeline.params["unet"]), tuple(map(put, pipeline.params["text"])), alphas)


def steps_per_dispatch(config: ConfigDict) -> int:
    on_cpu = jax.default_backend() == "cpu"
    return config.train.steps_per_dispatch or (1 if on_cpu else ACCELERATOR_STEPS_PER_DISPATCH)


def until(step: int, multiple: int) -> int:
    """Steps from `step` to the next multiple."""
    return multiple - step % multiple


def record(journal: Journal, bar: tqdm, start: int, step: int, metrics: dict[str, np.ndarray]) -> None:
    """Write the good steps start+1..step."""
    for i in range(step - start):
        names = ("loss", "learning_rate", "grad_norm")
        journal.scalars(start + 1 + i, {name: float(metrics[name][i, 0]) for name in names})
    if step > start:
        bar.set_postfix(loss=f"{metrics['loss'][: step - start, 0].mean():.4f}", refresh=False)
    bar.update(step - start)


def not_finite(run: RunDir, step: int, config: ConfigDict) -> str:
    return (
        f"{run.path}: loss or gradient not finite after step {step}; "
        f"the last good state is in {run.checkpoints / str(step)}; "
        f"lower train.learning_rate ({config.train.learning_rate}) or set train.clip_norm, in a new run_dir"
    )


@contextlib.contextmanager
def signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT, so that the step under way ends and is saved; a second Ctrl-C acts at once. A second
    SIGTERM does not: at a machine's shutdown it comes from its parent and from the system."""
    received: list[signal.Signals] = []
    previous = {}

    def receive(number, frame):
        received.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def to_concept(config: ConfigDict, step_config: StepConfig, pipeline: Pipeline, state: TrainState) -> artifact.Concept:
    """What was learned, with its metadata."""
    return artifact.Concept(
        learned=jax.tree.map(lambda x: np.asarray(x[0]), state.learned),
        method=step_config.method,
        class_word=config.concept.class_word,
        templates=tuple(config.concept.templates),
        fingerprint=pipeline.fingerprint,
        **{f"model_{key}": config.model[key] for key in ("path", "revision", "variant", "prediction_type")},
        steps=int(state.step[0]),
        learning_rate=config.train.learning_rate,
        seed=config.seed,
    )


def paint_prompts(
    config: ConfigDict, pipeline: Pipeline, concept: artifact.Concept, strength: float = 1.0, count: int | None = None
) -> list[np.ndarray]:
    """The pictures of the first `count` (None: all) of the config's prompts, with the config's seed."""
    prompts = config_lib.prompts(config.sample.prompts, config)[:count]
    seeds = [config.seed] * len(prompts)
    return list(sampling.paint(pipeline, prompts, seeds, config_lib.sampler_config(config), [concept], strength))


def sample_grid(photos: list[Photo], base: list[np.ndarray], personalized: list[np.ndarray], config: ConfigDict):
    """What was learned at a glance: the photos, the base model's answers, the personalized ones."""
    rows = [[photo.image for photo in photos[: len(base)]], base, personalized]
    labels = ["your photos", "base model", f"your {config.concept.class_word}"]
    return grid(rows, labels, config_lib.prompts(config.sample.prompts, config), captions_above=1)
