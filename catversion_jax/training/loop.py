"""The training loop of one concept; all of its mathematics is in training/step.py."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.config import Config
from catversion_jax.models.sharding import sharding
from catversion_jax.training.checkpoints import Checkpoints
from catversion_jax.training.metric_writer import MetricRow, MetricWriter
from catversion_jax.training.previews import sample_prompts
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.state import ConceptData, Frozen, TrainState
from catversion_jax.training.step import StepConfig, compile_chunk, compile_evaluate, finished, steps_per_dispatch
from catversion_jax.training.trackers import Tracker
from catversion_jax.training.trained_concept import to_concept
from catversion_jax.utils.errors import UserError, is_out_of_memory, short
from catversion_jax.utils.log import warn

VALIDATION_PROMPTS = 4  # of config.sample.prompts, sampled every config.sample.every steps


class Outputs(NamedTuple):
    """Where a training goes: its folder, its checkpoints, and who else is told of it."""

    run: RunDir
    checkpoints: Checkpoints
    trackers: Sequence[Tracker] = ()
    check: Callable[[], None] = lambda: None  # raises StorageError if another process has taken the folder over


def loop(
    config: Config, step_config: StepConfig, pipeline: BasePipeline, data: ConceptData, outputs: Outputs
) -> tuple[TrainState, signal.Signals | None]:
    """Trains to the last step, from the last checkpoint if there is one.

    Returns the state and, if a signal ended the training early, the signal. Raises UserError if a loss or gradient is
    not finite, after saving the last good state.
    """
    run, checkpoints = outputs.run, outputs.checkpoints
    on_concepts = sharding(step_config.mesh, "concept")
    state = jax.device_put(step_config.init_state([config.seed]), on_concepts)
    state = checkpoints.restore(state) or state
    frozen = Frozen.of(pipeline, step_config.mesh, config.mesh.rules, step_config.method)
    data = jax.device_put(data, on_concepts)

    stop, step, moved = step_config.stop, int(state.step[0]), False
    writer = MetricWriter(run.metrics, run.events, step)
    trackers: tuple[Tracker, ...] = (writer, *outputs.trackers)

    def done() -> bool:
        return bool(finished(state, data.steps, stop)[0])

    def save() -> None:
        outputs.check()
        writer.flush()
        checkpoints.save(step, state, config.identity())

    try:
        with signals() as received, training_bar(config.train.steps, step) as bar:
            while not done() and not received:
                length = next_length(config, step)
                state, metrics = compile_chunk(step_config, length)(state, frozen, data)
                start, step, metrics = step, int(state.step[0]), jax.device_get(metrics)
                started(bar)
                record(trackers, bar, start, metrics, step - start)
                moved = moved or bool(metrics["grad_norm"].any())
                # A step whose loss or gradient is not finite does not count: `update` keeps the last good state.
                if step < start + length:
                    save()
                    where = f"{run.path}: {not_finite(step, config)}"
                    raise UserError(f"{where}; the last good state is in {run.checkpoints / str(step)}")
                if is_due(step, stop.every):
                    state, loss = compile_evaluate(step_config)(state, frozen, data)
                    tell(trackers, MetricRow(step, evaluation_loss=float(loss[0])))
                if is_due(step, config.checkpoint.every):
                    save()
                if is_due(step, config.sample.every):
                    concept = to_concept(config, step_config.method, pipeline.fingerprint, state)
                    images = sample_prompts(config, pipeline, [concept], VALIDATION_PROMPTS)
                    for tracker in trackers:
                        tracker.image(step, "validation", np.concatenate(images, axis=1))
            save()
            if bar.n > bar.initial and not moved:
                what = "the gradient was zero in every step, so nothing was learned"
                warn(f"{run.path}: {what}; check adapter.logit_bias")
    finally:
        writer.close()
    return state, received[0] if received and not done() else None


def is_due(step: int, every: int) -> bool:
    """Returns whether something that happens every `every` steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def next_length(config: Config, step: int) -> int:
    """Returns the length of the next dispatch, which ends no later than a step after which something is due."""
    every = (config.train.steps, config.checkpoint.every, config.sample.every, config.stop.every)
    return min(steps_per_dispatch(config.train), *(n - step % n for n in every if n))


def training_bar(total: int, step: int) -> tqdm:
    """Returns a progress bar of steps, labelled as compiling until the first dispatch is done."""
    return tqdm(total=total, initial=step, unit=" steps", desc="compiling")


def started(bar: tqdm) -> None:
    """Relabels the bar after the first dispatch; its rate and time left then exclude the compilation."""
    if bar.desc.startswith("compiling"):
        bar.unpause()
        bar.set_description("training", refresh=False)


def tell(trackers: Sequence[Tracker], row: MetricRow) -> None:
    for tracker in trackers:
        tracker.row(row)


def record(trackers: Sequence[Tracker], bar: tqdm, start: int, metrics: dict[str, np.ndarray], good: int) -> None:
    """Tells of the metrics of the `good` steps after `start`."""
    names = ("loss", "learning_rate", "grad_norm")
    for i in range(good):
        tell(trackers, MetricRow(start + 1 + i, **{name: float(metrics[name][i, 0]) for name in names}))
    if good:
        bar.set_postfix(loss=f"{metrics['loss'][:good, 0].mean():.4f}", refresh=False)
    bar.update(good)


def not_finite(step: int, config: Config) -> str:
    """Says that a loss or gradient was not finite, and what to do about it."""
    what = f"loss or gradient not finite after step {step}"
    if step == 0:  # nothing was learned yet, so the learning rate had no part in it
        return f"{what}; check the photos, the base model's weights and model.dtype ({config.model.dtype})"
    rate = config.train.learning_rate
    return f"{what}; lower train.learning_rate ({rate}) or set train.clip_norm, in a new run_dir"


def fewer_slots(config: Config) -> str:
    """Says what to do where the slots of a batch take too much memory."""
    return f"lower batch.slots ({config.batch.slots}) or train.batch_size ({config.train.batch_size})"


@contextlib.contextmanager
def enough_memory(todo: str) -> Iterator[None]:
    """Raises UserError, which says what to do, if the memory of the machine or of a device is too small."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory ({short(error)}); {todo}") from error


@contextlib.contextmanager
def signals() -> Iterator[list[signal.Signals]]:
    """Collects SIGTERM and SIGINT, so that the current step is finished and saved; a second Ctrl-C acts at once."""
    received: list[signal.Signals] = []
    stopping = "stopping after this step, whose state is then saved; a second Ctrl-C stops at once, without saving"
    previous: dict[signal.Signals, Any] = {}

    # The handler only takes a note: an exception raised from it could interrupt a dispatch or a save.
    def receive(number, frame):
        received.append(signal.Signals(number))
        # In a thread: the signal may have come while this one was writing to the same stream.
        threading.Thread(target=warn, args=(stopping,)).start()
        # Not for SIGTERM: at a machine's shutdown it comes twice, from the parent process and from the system.
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    # Only the main thread may set handlers; in another one, whoever started it deals with signals.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    for number in numbers:
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
