"""`catversion export`: a learned concept for PyTorch pipelines and ComfyUI."""

import json
import shutil
from functools import partial
from pathlib import Path

from absl import flags
from safetensors.numpy import save_file

from catversion_jax import artifact
from catversion_jax.catversion import CatVersion
from catversion_jax.conditioning import context
from catversion_jax.config import expand
from catversion_jax.errors import UserError
from catversion_jax.files import write_atomically
from catversion_jax.generate import load_model, make_folder, read_prompts
from catversion_jax.pipeline import MINI

FOLDER = Path(__file__).parent / "exported"
"""Files for other programs: data to us, imported nowhere here."""

FILES = {
    "catversion_torch.py": "catversion_torch.py",
    "comfyui_catversion/__init__.py": "comfyui_node.py",
    "comfyui_catversion/README.md": "comfyui_README.md",
    "comfyui_catversion/catversion_torch.py": "catversion_torch.py",
}
"""What is written -> the file in FOLDER it is a copy of."""

CONCEPTS = (artifact.FILE_NAME, f"comfyui_catversion/{artifact.FILE_NAME}")
EMBEDS = "prompt_embeds.safetensors"


def define_flags() -> None:
    flags.DEFINE_string("embedding", None, "A run directory of catversion train, or its concept.safetensors.")
    flags.DEFINE_string("out", None, "The folder to write; files of an earlier export are replaced.")
    flags.DEFINE_multi_string("prompt", [], f"Write its text states to {EMBEDS}; may be given several times.")
    flags.DEFINE_string("prompts_file", None, "A text file with one such prompt a line.")
    flags.DEFINE_string("negative_prompt", "", "Of the prompts' text states; never sees the concept.")
    flags.DEFINE_float("strength", 1.0, "Of the concept in the text states, 0 to 1.", lower_bound=0, upper_bound=1)
    flags.DEFINE_string("model", None, "The base model's folder. Default: the one the concept was learned on.")


def main(arguments: flags.FlagValues) -> int:
    """Write the concept, the files that use it elsewhere and, for prompts, their text states."""
    if not arguments.embedding:
        raise UserError("--embedding: missing; expected a run directory of catversion train")
    if not arguments.out:
        raise UserError("--out: missing; expected the folder to write")
    concept = artifact.load(expand(arguments.embedding))
    if not isinstance(concept.method, CatVersion):
        raise UserError(f"{arguments.embedding}: learned by {concept.method_name}; only catversion's can be exported")
    wanted = arguments.prompt or arguments.prompts_file
    prompts = read_prompts(arguments) if wanted else []
    out = make_folder(expand(arguments.out))
    if prompts:
        write_embeds(out / EMBEDS, arguments, concept, prompts)
    make_folder(out / "comfyui_catversion")
    for name, source in FILES.items():
        write_atomically(out / name, partial(shutil.copyfile, FOLDER / source))
    for name in CONCEPTS:
        artifact.save(out / name, concept)
    print(f"{', '.join([*([EMBEDS] if prompts else []), *FILES, *CONCEPTS])} in {out}")
    return 0


def write_embeds(path: Path, arguments: flags.FlagValues, concept: artifact.Concept, prompts: list[str]) -> None:
    """The text states, named as the arguments of a diffusers pipeline, which wants positive and negative of a shape."""
    pipeline = load_model(arguments, {str(expand(arguments.embedding)): concept}, prompts)
    positive = context(pipeline, prompts, [concept], arguments.strength)
    negative = context(pipeline, [arguments.negative_prompt] * len(prompts))
    tensors = {"prompt_embeds": positive.states, "negative_prompt_embeds": negative.states}
    if positive.pooled is not None:  # SDXL
        tensors |= {"pooled_prompt_embeds": positive.pooled, "negative_pooled_prompt_embeds": negative.pooled}
    metadata = {
        "prompts": prompts,
        "negative_prompt": arguments.negative_prompt,
        "strength": arguments.strength,
        "class_word": concept.class_word,
        "model_path": arguments.model or concept.model_path or str(MINI),
    }
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, texts))
