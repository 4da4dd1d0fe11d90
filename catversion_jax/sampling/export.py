"""Exports a concept: with the code that uses it in PyTorch and ComfyUI, or as text states for any pipeline."""

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from catversion_jax.base.pipeline import BasePipeline
from catversion_jax.methods import concept_file, model_names
from catversion_jax.methods.catversion import CatVersion
from catversion_jax.methods.concept_file import Concept
from catversion_jax.sampling.conditioning import context
from catversion_jax.sampling.image_names import slug
from catversion_jax.sampling.sampler import SampleRequest, check_finite
from catversion_jax.utils.errors import UserError, listed
from catversion_jax.utils.files import write_atomically
from catversion_jax.utils.paths import AnyPath
from catversion_jax.weights import safetensors

FOLDER = Path(__file__).parents[1] / "exported"
"""Code for other programs, which is copied as data and never imported here."""

NODE, MODELS = "ComfyUI/custom_nodes/catversion", "ComfyUI/models/catversion"
"""Where ComfyUI has nodes, and the node its concepts."""
FILES = {
    "catversion_torch.py": "catversion_torch.py",
    f"{NODE}/__init__.py": "comfyui_node.py",
    f"{NODE}/README.md": "comfyui_README.md",
    f"{NODE}/catversion_torch.py": "catversion_torch.py",
    f"{NODE}/example_workflows/catversion.json": "comfyui_workflow.json",
    f"{NODE}/pyproject.toml": "comfyui_pyproject.toml",
}
"""Name of the written file -> name of the file in FOLDER that it is a copy of."""
FOLDERS = (NODE, f"{NODE}/example_workflows", MODELS)

EMBEDS = "prompt_embeds.safetensors"


def check_exportable(concept: Concept, source: str) -> None:
    """Raises UserError for a concept that other programs cannot use."""
    if not isinstance(concept.method, CatVersion):
        raise UserError(f"{source}: learned by {concept.method_name}; only catversion's can be exported")


def concept_names(concepts: Sequence[Concept]) -> list[str]:
    """Returns a file name for each concept: its class word and, if others have that too, its digest."""
    words = [slug(concept.class_word or "concept") for concept in concepts]
    return [
        f"{word}.safetensors" if words.count(word) == 1 else f"{word}-{concept.digest[:8]}.safetensors"
        for word, concept in zip(words, concepts, strict=True)
    ]


def write_concepts(out: AnyPath, concepts: Sequence[Concept]) -> list[str]:
    """Writes concepts, and the code that uses them, into `out` and its FOLDERS; returns the concepts' file names."""
    for name, source in FILES.items():
        write_atomically(out / name, partial(shutil.copyfile, FOLDER / source))
    names = concept_names(concepts)
    if len(set(names)) < len(names):
        raise UserError(f"{listed(names)}: the same concept twice; export it once")
    for name, concept in zip(names, concepts, strict=True):
        for path in (out / name, out / MODELS / name):
            concept_file.save(path, concept)
    return names


def write_embeds(
    path: AnyPath, pipeline: BasePipeline, request: SampleRequest, concept: Concept, model_path: str
) -> None:
    """Writes the text states of the request's prompts, named like the arguments of a diffusers pipeline.

    There are as many negative as positive ones, since diffusers expects both in one shape.
    """
    positive = context(pipeline, request.prompts, concept)
    negative = context(pipeline, [request.negative_prompt] * len(request.prompts))
    arrays = {
        "prompt_embeds": positive.states,
        "negative_prompt_embeds": negative.states,
        "pooled_prompt_embeds": positive.pooled,  # SDXL
        "negative_pooled_prompt_embeds": negative.pooled,
    }
    tensors = {name: np.asarray(array) for name, array in arrays.items() if array is not None}
    check_finite(all(np.isfinite(array).all() for array in tensors.values()), "text encoder")
    metadata = {
        "prompts": list(request.prompts),
        "negative_prompt": request.negative_prompt,
        "strength": concept.strength,
        "class_word": concept.class_word,
        "model_path": model_names.public_name(model_path) or "mini",
    }
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    safetensors.write_file(path, tensors, texts)
