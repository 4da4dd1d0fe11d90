"""Learning in Python: `learn` one concept from photos, or `learn_many` side by side in one compiled step."""

import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from catversion_jax.api.pipeline import Pipeline
from catversion_jax.config import OF_A_RUN, Config, from_config_dict, load_config, stable_diffusion
from catversion_jax.data.images import MAX_FILE_BYTES
from catversion_jax.data.manifest import parse_line
from catversion_jax.data.photos import given_photos
from catversion_jax.methods.concept_file import Concept
from catversion_jax.training.engine import Ended
from catversion_jax.training.many_concepts import each_trained
from catversion_jax.training.metric_writer import MetricRow
from catversion_jax.training.run import Watch, train
from catversion_jax.training.run_dir import RunDir
from catversion_jax.training.share import Share
from catversion_jax.training.trackers import EachStep
from catversion_jax.utils.errors import Interrupted, UserError
from catversion_jax.utils.files import read_bytes, write_atomically
from catversion_jax.utils.paths import AnyPath, expand, make_folder, whole
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
        outcome = train(config, run, pipe.base, Watch(trackers=[EachStep(on_step)]), own)
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
        lines = "".join(json.dumps(line_of(job, folder)) + "\n" for job in jobs)
        # By its contents: another process may be reading one here, which only the training itself would refuse.
        manifest = folder / f"jobs-{hashlib.sha256(lines.encode()).hexdigest()[:16]}.jsonl"
        write_atomically(manifest, lambda path: path.write_text(lines))
        endings = each_trained(Share.of(config, manifest), pipe.base)
        outcome = yield from endings
    if outcome.interrupted_by:
        raise Interrupted(outcome.interrupted_by)


def line_of(job: Mapping[str, Any], folder: AnyPath) -> dict[str, Any]:
    """Returns the manifest's line of a job; images in memory, and single files, are written to a folder first."""
    if missing := {"id", "photos", "class_word"} - job.keys():
        raise UserError(f"{dict(job)}: no {', '.join(sorted(missing))}; expected id, photos and class_word")
    line = {key: value for key, value in job.items() if key not in ("photos", "masks")}
    parse_line(json.dumps(line | {"dir": "photos"}).encode(), f"job {job['id']}")  # before the id names a folder
    if job.get("masks"):
        line["masks"] = whole(job["masks"])
    photos = job["photos"]
    if isinstance(photos, str | os.PathLike):
        return line | {"dir": whole(photos)}
    data = [bytes_of(photo) for photo in photos]
    # By their contents: other photos under the same id are another concept, which the batch then tells.
    digest = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content, _ in data)).hexdigest()[:16]
    target = folder / "photos" / f"{job['id']}-{digest}"
    make_folder(target)
    for i, (content, ending) in enumerate(data):
        write_atomically(target / f"{i:03}{ending}", partial(write_content, content=content))
    return line | {"dir": whole(target)}


def write_content(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def bytes_of(photo: str | AnyPath | Image.Image) -> tuple[bytes, str]:
    """Returns a file's contents and its ending; of an image in memory those of a PNG file."""
    if not isinstance(photo, Image.Image):
        path = expand(photo)
        return read_bytes(path, MAX_FILE_BYTES, "expected a photo"), path.suffix
    file = io.BytesIO()
    photo.save(file, "PNG")
    return file.getvalue(), ".png"


def config_of(pipe: Pipeline, settings: Mapping[str, Any]) -> Config:
    """Returns the config for a pipeline's model, with some settings changed.

    Raises UserError for an unknown one, and for a pipeline with a LoRA, which a concept could not record.
    """
    if pipe.loras:
        raise UserError(
            f"a pipeline with the LoRA {pipe.loras[0].name}: learn on its base model, and use both together"
        )
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
