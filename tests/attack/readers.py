"""Every reader of files that people give or that we read back: a good input for each, and how it is read."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from safetensors.numpy import save_file

from catversion_jax.base.pipeline import MINI, ModelConfig, load_pipeline
from catversion_jax.base.tokenizer import Tokenizer
from catversion_jax.cli.flags import given_prompts
from catversion_jax.config import Config
from catversion_jax.data import dataset, manifest
from catversion_jax.data.concept_sets import ConceptFolder
from catversion_jax.data.photos import Photo, read_photos
from catversion_jax.evaluation import benchmarks
from catversion_jax.evaluation.encoders import load_clip, load_dino
from catversion_jax.methods import concept_file, official
from catversion_jax.study.rows import CandidateRow
from catversion_jax.study.study import once
from catversion_jax.study.sweep import Score, known_scores
from catversion_jax.training.checkpoints import LocalCheckpoints, read_newest
from catversion_jax.training.class_images import latents_to_npy, read_latents
from catversion_jax.training.metric_writer import MetricRow, MetricWriter
from catversion_jax.training.state import TrainState
from catversion_jax.training.status import read_status
from catversion_jax.utils import cache, cache_entries, identity, records
from catversion_jax.weights import msgpack, safetensors, torch_zip
from catversion_jax.weights.source import open_source
from catversion_jax.weights.weight_files import open_weights
from tests import ldm_files, tiny
from tests.attack.mutations import Mutation, change_line

TEAPOT = MINI.parent / "concepts" / "teapot"


@dataclass(frozen=True)
class Reader:
    """A reader: `write` makes a good input in an empty folder, `read` reads it and returns something comparable.

    A sealed one must notice every change of the files that it uses: what it accepts is what was written.
    """

    write: Callable[[Path], Any]
    read: Callable[[Path], Any]
    files: str = "**/*"
    sealed: bool = False
    mutation: Mutation | None = None  # None: by the files' names


def hash_tree(arrays: Any) -> str:
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        hashed.update(f"{leaf.shape}{leaf.dtype}".encode() + np.asarray(leaf).tobytes())
    return hashed.hexdigest()


# ---- base models


def read_model(folder: Path) -> str:
    return load_pipeline(ModelConfig(str(folder))).fingerprint


def read_source(path: Path) -> str:
    """The tensors of a base model whose networks would be large to make."""
    opened = open_source(str(path))
    return hash_tree([[t.read() for _, t in sorted(opened.tensors(name).items())] for name in opened.components])


def write_original(folder: Path) -> None:
    tensors = ldm_files.to_ldm(ldm_files.to_diffusers(ldm_files.random_params("sd2")), "sd2")
    save_file(tensors, folder / "a.safetensors", {"modelspec.prediction_type": "epsilon"})


def write_shards(folder: Path) -> None:
    save_file({"a": np.zeros(4, np.float32)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))


def write_msgpack(folder: Path) -> None:
    tree = {"a": {"kernel": np.ones((4, 4), np.float32)}, "b": np.zeros(3, np.float16)}
    (folder / "a.msgpack").write_bytes(flax.serialization.to_bytes(tree))


def copy_new_tokenizer(folder: Path) -> None:
    """As transformers 5 saves it."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MINI / "tokenizer" / name, folder / name)


def copy_tokenizer(folder: Path) -> None:
    shutil.copytree(MINI / "tokenizer", folder, dirs_exist_ok=True)


def write_torch_zip(folder: Path) -> None:
    official.write_adapter(folder / "a.bin", authors_concept(), folder)


def read_tensors(opened: Any) -> str:
    return hash_tree([tensor.read() for _, tensor in sorted(opened.items())])


# ---- concepts


def small_concept() -> concept_file.Concept:
    prefix = np.random.default_rng(0).normal(size=(2, 3, 2, 2, 16)).astype(np.float32)
    return tiny.concept(prefix, "0123456789abcdef")


def authors_concept() -> concept_file.Concept:
    prefix = np.random.default_rng(0).normal(size=(1, *official.SHAPE)).astype(np.float32)
    return concept_file.Concept({"prefix": prefix}, official.FIXED, "", (), "", "", 0, 0.0, 0)


def read_concept(folder: Path) -> str:
    concept = concept_file.load(folder)
    return hash_tree(concept.learned) + records.encode(concept.metadata())


# ---- what a run or a study keeps


SCORE = Score("", "teapot", 0.5, 0.4, None, 1.0, 0.1, 0.2, 400)
CANDIDATE = {"group": "a", "name": "b", "seconds": 1.5, "numbers": 96, "fitness": 0.5}


def write_json(name: str, value: Any) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(json.dumps(value, indent=1))


def write_lines(name: str, values: list[Any]) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text("".join(json.dumps(value) + "\n" for value in values))


def write_scores(folder: Path) -> None:
    for _ in range(3):
        records.append_line(folder / "scores.jsonl", SCORE)


def write_cache(folder: Path) -> None:
    for name in "abc":
        (folder / f"{name}-cache").write_bytes(zlib.compress(name.encode() * 200))
    cache_entries.check(folder)
    (folder / cache.COUNTS).write_text(records.encode(cache.Counts({"hits": 1}, {"hits": 2})))


def read_cache(folder: Path) -> Any:
    cache_entries.check(folder)
    return cache.read_counts(folder)


LATENTS = np.random.default_rng(0).normal(size=(2, 4, 4, 4)).astype(np.float32)


def read_class_latents(folder: Path) -> str:
    """None, for which a run samples them again, counts as those that were written."""
    found = read_latents(folder / "class_latents.npy", LATENTS.shape)
    return hash_tree(LATENTS if found is None else found)


def train_state() -> TrainState:
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(1, 2, 3, 2, 2, 8)), jnp.float32) for _ in range(3)]
    numbers = [jnp.asarray([value]) for value in (8, 0)]
    learned, first, second = ({"prefix": array} for array in arrays)
    return TrainState(numbers[0], numbers[1], learned, (first, second), jnp.ones(1), jnp.zeros(1, jnp.int32))


def write_checkpoint(folder: Path) -> None:
    checkpoints = LocalCheckpoints(folder / "checkpoints", 3)
    checkpoints.save(8, train_state(), {"seed": 0})
    checkpoints.close()


def read_checkpoint(folder: Path) -> str | None:
    saved = read_newest(folder / "checkpoints", lambda _: train_state())
    return saved and f"{saved.step}{hash_tree(saved.state)}{sorted(saved.note.items())}"


def read_concept_status(folder: Path) -> Any:
    return read_status(folder / "status.json")


def read_metrics(folder: Path) -> str:
    writer = MetricWriter(folder / "metrics.jsonl", folder / "events", 2)
    writer.row(MetricRow(3, 0.5))
    writer.close()
    return (folder / "metrics.jsonl").read_text()


# ---- photos, prompts, benchmarks, manifests


def write_photos(folder: Path) -> None:
    rng = np.random.default_rng(0)
    (folder / "masks").mkdir()
    for index, (mode, ending) in enumerate((("RGB", "jpg"), ("RGBA", "png"), ("RGB", "webp"), ("L", "png"))):
        shape = (24, 32, len(mode)) if len(mode) > 1 else (24, 32)
        image = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(folder / f"{index}.{ending}", exif=exif)
        Image.fromarray(rng.integers(0, 2, (32, 24), np.uint8) * 255).save(folder / "masks" / f"{index}.png")


def photos() -> list[Photo]:
    rng = np.random.default_rng(0)
    return [Photo(f"{i}", rng.integers(0, 256, (16, 16, 3), np.uint8), rng.random((16, 16)) < 0.5) for i in range(3)]


def hash_photos(found: list[Photo]) -> str:
    return hash_tree([[photo.image, photo.mask] for photo in found])


def read_prompts_file(folder: Path) -> list[str]:
    return given_prompts(SimpleNamespace(prompt=[], prompts_file=str(folder / "prompts.txt")))


def write_dreambench(folder: Path) -> None:
    table = "subject_name,class\nbackpack,backpack\ndog,dog\n"
    lists = "prompt_list = [\n'a {0} {1} in the jungle'.format(a, b),\n]\n" * 2
    (folder / "prompts_and_classes.txt").write_text(f"Classes\n{table}\nPrompts\n{lists}")


def write_customconcept(folder: Path) -> None:
    (folder / "prompts").mkdir()
    (folder / "prompts" / "toy.txt").write_text("a {} on the beach\n{} in snow\n")
    entry = {
        "instance_data_dir": "benchmark_dataset/toy",
        "class_prompt": "toy",
        "prompt_filename": "prompts/toy.txt",
    }
    (folder / "dataset.json").write_text(json.dumps([entry]))


LINE = {"id": "a", "dir": "photos", "class_word": "mug", "masks": "m", "article": "a", "seed": 1, "steps": 5}

READERS = {
    "tokenizer": Reader(copy_tokenizer, lambda folder: Tokenizer(folder)(["a photo of a teapot"]).tobytes()),
    "tokenizer.json": Reader(copy_new_tokenizer, lambda folder: Tokenizer(folder)(["a photo of a teapot"]).tobytes()),
    "single file": Reader(write_original, lambda folder: read_source(folder / "a.safetensors")),
    "shards": Reader(write_shards, lambda folder: read_tensors(open_weights(folder)[1]), "*.json"),
    "msgpack": Reader(write_msgpack, lambda folder: read_tensors(msgpack.open_msgpack(folder / "a.msgpack"))),
    "clip": Reader(
        lambda folder: tiny.write_clip(folder / "m"), lambda folder: load_clip(str(folder / "m")), "m/config.json"
    ),
    "dino": Reader(
        lambda folder: tiny.write_dino(folder / "m"), lambda folder: load_dino(str(folder / "m")), "m/config.json"
    ),
    "model configs": Reader(tiny.write, read_model, "**/*.json"),
    "model weights": Reader(tiny.write, read_model, "**/*.safetensors"),
    "safetensors": Reader(
        lambda folder: concept_file.save(folder / "a.safetensors", small_concept()),
        lambda folder: read_tensors(safetensors.open_safetensors(folder / "a.safetensors")),
    ),
    "torch zip": Reader(write_torch_zip, lambda folder: read_tensors(torch_zip.open_checkpoint(folder / "a.bin"))),
    "authors' adapter": Reader(
        write_torch_zip, lambda folder: hash_tree(official.read_adapter(folder / "a.bin", "mug").learned)
    ),
    "concept": Reader(
        lambda folder: concept_file.save(folder / "concept.safetensors", small_concept()), read_concept, sealed=True
    ),
    "run config": Reader(
        write_json("config.json", Config().identity()),
        lambda folder: identity.refuse_another(folder / "config.json", Config().identity(), Config().identity()),
    ),
    "sweep scores": Reader(
        write_scores, lambda folder: known_scores(folder / "scores.jsonl", []), mutation=change_line
    ),
    "study row": Reader(
        write_json("row.json", CANDIDATE), lambda folder: once(folder / "row.json", CandidateRow, lambda: {})
    ),
    "compilation cache": Reader(write_cache, read_cache),
    "class latents": Reader(
        lambda folder: (folder / "class_latents.npy").write_bytes(latents_to_npy(LATENTS)),
        read_class_latents,
        sealed=True,
    ),
    "checkpoint": Reader(write_checkpoint, read_checkpoint, sealed=True),
    "status": Reader(write_json("status.json", {"id": "a", "status": "done", "loss": 0.5}), read_concept_status),
    "metrics": Reader(
        write_lines("metrics.jsonl", [{"step": step, "loss": 0.5} for step in (1, 2, 3)]),
        read_metrics,
        mutation=change_line,
    ),
    "stored photos": Reader(
        lambda folder: dataset.write_dataset(folder, photos()),
        lambda folder: hash_photos(dataset.read_dataset(folder)),
        sealed=True,
    ),
    "photos": Reader(write_photos, lambda folder: hash_photos(read_photos(folder, 16))),
    "concept.json": Reader(
        write_json("concept.json", {"class_word": "mug", "article": "a"}),
        lambda folder: ConceptFolder(folder).description,
    ),
    "prompts": Reader(lambda folder: (folder / "prompts.txt").write_text("a mug\na red mug\n"), read_prompts_file),
    "dreambench": Reader(write_dreambench, benchmarks.dreambench),
    "customconcept101": Reader(write_customconcept, benchmarks.customconcept101),
    "manifest": Reader(
        write_lines("list.jsonl", [LINE | {"id": f"{i}"} for i in range(3)]),
        lambda folder: [line.changes(folder) for line in manifest.read_manifest(folder / "list.jsonl")],
        mutation=change_line,
    ),
}
"""By name."""
