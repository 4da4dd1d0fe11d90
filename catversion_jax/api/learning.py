"""Learning in Python: `learn` one concept from photos, or `learn_many` side by side in one compiled step."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from PIL import Image

from catversion_jax.api.pipeline import Pipeline
from catversion_jax.config import OF_A_RUN, Config, from_config_dict, load_config, stable_diffusion
from catversion_jax.data.photos import given_photos
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.many_concepts import Ended, Share, each_trained
from catversion_jax.training.metric_writer import MetricRow
from catversion_jax.training.run import Watch, train
from catversion_jax.training.run_dir import RunDir
from catversion_jax.utils.errors import Interrupted, UserError
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath, expand, is_remote, make_folder
from catversion_jax.utils.settings import check_settings, flatten

Photos = str | AnyPath | Sequence[str | AnyPath | Image.Image]
"""A folder of photos, their files, or images in memory."""


def learn(
    pipe: Pipeline,
    photos: Photos,
    class_word: str,
    run_dir: str | AnyPath | None = None,
    on_step: Callable[[MetricRow], object] = lambda _: None,
    **settings: Any,
) -> Concept:
    """Learns a concept from photos, as `catversion train` does, and returns it.

    `settings` are the config's: those of its section `train` by their own names (`steps=500`), those of other sections
    with a double underscore (`sample__strength=0.7`). `config` names the config that they change ("mini",
    "sd15:dreambooth", a file), by default that of the model, and `method` the method. With `run_dir` the run is kept
    there, and the same call goes on where an interrupted one was. `on_step` is called after each step. Raises UserError
    for a mistake, before anything is compiled, and Interrupted after SIGTERM or Ctrl-C.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if run_dir is None else run_dir
        config = config_of(pipe, settings | {"run_dir": str(folder), "concept__class_word": class_word})
        own = None
        if isinstance(photos, str | os.PathLike):
            config = config.replaced({"data.dir": os.fspath(photos)})
        else:
            own = given_photos(photos, pipe.base.networks.resolution)
        check_settings(config, ("data.dir",) if own else ())
        run = RunDir.of(config)
        run.check(config, resume=True)
        outcome = train(config, run, pipe.base, Watch(on_step=on_step), own)
    if outcome.interrupted_by:
        raise Interrupted(outcome.interrupted_by)
    return outcome.concept


def learn_many(
    pipe: Pipeline, jobs: Sequence[Mapping[str, Any]], run_dir: str | AnyPath | None = None, **settings: Any
) -> Iterator[Ended]:
    """Learns many concepts, `slots` of them side by side, as `catversion batch` does; yields each as it ends.

    A job has `id`, `photos` and `class_word`, and optionally `masks`, `article`, `seed` and `steps`. What is yielded
    has `status`, with `id`, `status` ("done" or "failed") and `error`, and `concept`, None if it failed. `settings` and
    `run_dir` are as in `learn`; the number of slots is `batch__slots`.
    """
    with ExitStack() as stack:
        folder = expand(stack.enter_context(tempfile.TemporaryDirectory()) if run_dir is None else run_dir)
        config = config_of(pipe, settings | {"run_dir": str(folder)})
        make_folder(folder)
        manifest = folder / "manifest.jsonl"
        lines = "".join(json.dumps(line_of(job, folder)) + "\n" for job in jobs)
        write_atomically(manifest, lambda path: path.write_text(lines))
        endings = each_trained(Share.of(config, manifest), pipe.base)
        outcome = yield from endings
    if outcome.interrupted_by:
        raise Interrupted(outcome.interrupted_by)


def line_of(job: Mapping[str, Any], folder: AnyPath) -> dict[str, Any]:
    """Returns the manifest's line of a job; images in memory, and single files, are written to a folder first."""
    if missing := {"id", "photos", "class_word"} - job.keys():
        raise UserError(f"{dict(job)}: no {', '.join(sorted(missing))}; expected id, photos and class_word")
    photos = job["photos"]
    if not isinstance(photos, str | os.PathLike):
        target = folder / "photos" / str(job["id"])
        make_folder(target)
        for i, photo in enumerate(photos):
            write_photo(photo, target / f"{i:03}")
        photos = target
    return {key: value for key, value in job.items() if key != "photos"} | {"dir": whole(photos)}


def whole(path: str | AnyPath) -> str:
    """Returns a path that means the same from every folder."""
    expanded = expand(path)
    return os.fspath(expanded if is_remote(expanded) else expanded.absolute())


def write_photo(photo: str | AnyPath | Image.Image, target: AnyPath) -> None:
    """Writes an image in memory as PNG, or copies a file as it is."""
    if isinstance(photo, Image.Image):
        write_atomically(target.with_suffix(".png"), lambda path: photo.save(path, "PNG"))
    else:
        data = expand(photo).read_bytes()
        write_atomically(target.with_suffix(expand(photo).suffix), lambda path: path.write_bytes(data))


def config_of(pipe: Pipeline, settings: Mapping[str, Any]) -> Config:
    """Returns the config for a pipeline's model, with some settings changed. Raises UserError for an unknown one."""
    settings = dict(settings)
    name, method = settings.pop("config", None), settings.pop("method", "catversion")
    if name is not None:
        start = load_config(name)
    elif pipe.model.path:
        start = stable_diffusion(pipe.model.path, pipe.model.variant, method)
    else:
        start = load_config(f"mini:{method}")
    config = replace(from_config_dict(start, OF_A_RUN), model=pipe.model)
    keys = {key for key, _, _ in flatten(config)}
    changes = {}
    for name, value in settings.items():
        key = name.replace("__", ".")
        key = key if key in keys else f"train.{key}"
        if key not in keys:
            raise UserError(f"{name}: no such setting; expected one of `catversion train --help`, as train__steps")
        changes[key] = tuple(value) if isinstance(value, list) else value
    return config.replaced(changes)
