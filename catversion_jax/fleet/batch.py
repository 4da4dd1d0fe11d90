"""`catversion batch --ray`: the lines of a manifest through the workers of a Ray cluster."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from tqdm import tqdm

from catversion_jax.fleet import cluster
from catversion_jax.fleet.driver import Fleet, RayOptions
from catversion_jax.fleet.run_home import RunDesk, RunHome
from catversion_jax.fleet.work_queue import WorkQueue
from catversion_jax.fleet.worker import Setup, with_whole_paths
from catversion_jax.training.engine import ConceptJob
from catversion_jax.training.interrupted import noted_ids
from catversion_jax.training.loop import signals, started
from catversion_jax.training.many_concepts import BatchOutcome
from catversion_jax.training.run_dir import OF_RAY, RunDir
from catversion_jax.training.share import Share, take_stock
from catversion_jax.training.status import AT_ONCE, FAILED, ConceptStatus
from catversion_jax.utils.errors import ReportedError, UserError
from catversion_jax.utils.id_set import IdSet
from catversion_jax.utils.paths import expand, remove_folder, whole


def train_on_ray(share: Share, options: RayOptions) -> BatchOutcome:
    """Trains the concepts of a manifest on a Ray cluster. Raises UserError for a user's mistake."""
    # Workers have a working directory of their own.
    share = replace(share, manifest=expand(whole(share.manifest)))
    config, run = share.config, RunDir.of(share.config)
    run.check(config, resume=True)
    cluster.import_ray()
    room = share.room
    with run.held(config) as check:
        stock = take_stock(share, run)
        if not stock.left:
            return BatchOutcome(run.path, stock.concepts, 0, 0, None)
        saved = saved_concepts(run, stock.done)
        refused: list[ConceptStatus] = []
        setup = Setup(with_whole_paths(config), room, RunHome(run.config.read_text()))
        queue = WorkQueue(jobs_of(share, stock.done, refused), config.batch.slots, saved)
        with (
            cluster.connected(options.address) as ray,
            tqdm(total=stock.concepts, initial=len(stock.done), unit=" concepts", desc="compiling") as bar,
        ):
            fleet = Fleet(ray, setup, queue, options, RunDesk(run.path, check))
            failed, received = learn_all(fleet, bar, refused)
        if received is None:
            check()
            for folder in run.of_processes:
                if folder.name.endswith(OF_RAY):
                    remove_folder(folder)
    return BatchOutcome(run.path, stock.concepts, stock.left, failed, received)


def jobs_of(share: Share, done: IdSet, refused: list[ConceptStatus]) -> Iterator[ConceptJob]:
    """Yields the concepts that are not done; those with a path that is none are added to `refused`."""
    for line in share.lines():
        if line.id in done:
            continue
        try:
            yield ConceptJob(line.id, line.digest, share.config_of(line))
        except UserError as error:
            refused.append(ConceptStatus(line.id, FAILED, str(error), digest=line.digest))


def saved_concepts(run: RunDir, done: IdSet) -> dict[str, tuple[str, ...]]:
    """Returns the folders of checkpoints that have each concept that was interrupted, by id."""
    saved: dict[str, tuple[str, ...]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        folders = run.of_processes
        for folder, ids in zip(folders, pool.map(noted_ids, folders), strict=True):
            for concept_id in ids:
                if concept_id not in done:
                    saved[concept_id] = (*saved.get(concept_id, ()), folder.name)
    return saved


def learn_all(fleet: Fleet, bar: tqdm, refused: list[ConceptStatus]) -> tuple[int, signal.Signals | None]:
    """Learns what the queue has; returns how many failed, and the signal that ended it early, if one did."""
    failed = 0

    def note(ended: list[ConceptStatus]) -> None:
        nonlocal failed
        while refused:
            fleet.desk.fail(refused[-1])
            ended.append(refused.pop())
        failed += sum(status.status == FAILED for status in ended)
        bar.update(len(ended))
        show(bar, fleet)

    with signals() as received:
        try:
            while not received and not fleet.queue.is_over:
                note(fleet.work())
        except ReportedError:  # the states of those that still learn are saved
            fleet.leave()
            raise
        note(fleet.leave())
    return failed, received[0] if received and not fleet.queue.is_over else None


def show(bar: tqdm, fleet: Fleet) -> None:
    """Shows how many workers learn, and how many concepts end an hour."""
    if fleet.learning:
        started(bar)
    shown, rate = f"{fleet.learning} workers", bar.format_dict["rate"]
    if rate:
        shown += f", {3600 * rate:.0f} concepts/h"
    has_changed = bar.postfix is None or bar.postfix.split()[0] != shown.split()[0]
    bar.set_postfix_str(shown, refresh=has_changed)
