"""CatVersion for ComfyUI: a node that puts a learned concept into a CLIP. README.md says how to use it."""

import os
from contextlib import suppress
from numbers import Integral

import folder_paths
import torch

from .catversion_torch import MAX_STRENGTH, Part, check, load

FOLDER = "catversion"
"""Of ComfyUI's models/, where the concepts are."""
ENCODERS = ("clip_l", "clip_h", "clip_g")
"""ComfyUI's names: Stable Diffusion 1.x has clip_l, 2.x clip_h, SDXL clip_l and clip_g."""
OTHERS = ("t5xxl", "llama", "byt5")
"""What a CLIP of another model has beside, such as Stable Diffusion 3's or Flux's."""

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def recorded_strength(files: list[str]) -> float:
    """The strength that the first file records: ComfyUI has one default for all files."""
    with suppress(ValueError, OSError):  # of a damaged file or a broken link, which `apply` tells of
        return load(folder_paths.get_full_path_or_raise(FOLDER, files[0]))[0].strength if files else 1.0
    return 1.0


class ApplyCatVersion:
    """A CLIP and a concept to a CLIP that knows the concept; the one that came in stays as it is."""

    CATEGORY = "conditioning"
    FUNCTION = "apply"
    RETURN_TYPES = ("CLIP",)
    DESCRIPTION = "Puts a concept of models/catversion into a CLIP. Several: one node after the other."

    @classmethod
    def INPUT_TYPES(cls):
        files = folder_paths.get_filename_list(FOLDER)
        strength = {"default": recorded_strength(files), "min": 0.0, "max": MAX_STRENGTH, "step": 0.05}
        return {"required": {"clip": ("CLIP",), "concept": (files,), "strength": ("FLOAT", strength)}}

    @classmethod
    def IS_CHANGED(cls, concept, **inputs):
        return os.stat(folder_paths.get_full_path_or_raise(FOLDER, concept)).st_mtime_ns

    def apply(self, clip, concept, strength):
        """Patches are in the shared model only while the clone is the one that ComfyUI has loaded."""
        concepts = load(folder_paths.get_full_path_or_raise(FOLDER, concept))
        model = clip.cond_stage_model
        names = [name for name in ENCODERS if hasattr(model, name)]
        others = [name for name in OTHERS if hasattr(model, name)]
        if len(names) != len(concepts) or others:
            raise ValueError(
                f"{concept}: for {len(concepts)} text encoder(s) of Stable Diffusion 1.x, 2.x or XL, but this CLIP has "
                f"{', '.join(names + others) or 'none of them'}; use the base model it was learned on"
            )
        clone = clip.clone()
        for name, of_encoder in zip(names, concepts, strict=True):
            part = Part(of_encoder, getattr(clip.tokenizer, name).tokenizer, strength)
            patch(clone.patcher, name, getattr(model, name), part)
        return (clone,)


def patch(patcher, name, encoder, part):
    """Patch one text encoder: its forward, which sees the tokens, and the self-attention of the concept's layers.

    What is patched are the modules' classes, so that each finds its module when it is called: a patcher may be loaded
    into a copy of the model. The class that is there, of a node before, goes on to be called.
    """
    layers = encoder.transformer.text_model.encoder.layers
    check(part.concept, [layer.self_attn for layer in layers])
    path = f"{name}.__class__"
    patcher.add_object_patch(path, looking(patcher.get_model_object(path), part))
    for i in part.concept.layers:
        path = f"{name}.transformer.text_model.encoder.layers.{i}.self_attn.__class__"
        patcher.add_object_patch(path, adding(patcher.get_model_object(path), part, i))


def looking(base: type, part: Part) -> type:
    """A text encoder that shows a concept the tokens; they are the chunks of one prompt."""

    def forward(self, tokens, *rest, **named):
        # A token is an id, or the vector of a textual inversion: that one is no word of the class.
        ids = [[token if isinstance(token, Integral) else -1 for token in row] for row in tokens]
        part.look(torch.tensor(ids), one_prompt=True)
        return base.forward(self, tokens, *rest, **named)

    return type(base.__name__, (base,), {"forward": forward})


def adding(base: type, part: Part, layer: int) -> type:
    """A layer's self-attention that adds what a concept changes."""

    def forward(self, x, mask=None, *rest, **named):
        return part.add(self, layer, x, [mask], base.forward(self, x, mask, *rest, **named))

    return type(base.__name__, (base,), {"forward": forward})


NODE_CLASS_MAPPINGS = {"ApplyCatVersion": ApplyCatVersion}
NODE_DISPLAY_NAME_MAPPINGS = {"ApplyCatVersion": "Apply CatVersion"}
