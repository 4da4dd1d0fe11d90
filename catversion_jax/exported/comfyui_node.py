"""CatVersion for ComfyUI: a node that puts a learned concept into a CLIP. README.md says how to use it."""

from contextlib import suppress
from numbers import Integral
from pathlib import Path

import torch

from .catversion_torch import MAX_STRENGTH, Handle, check, load

FOLDER = Path(__file__).parent
ENCODERS = ("clip_l", "clip_h", "clip_g")
"""ComfyUI's names: Stable Diffusion 1.x has clip_l, 2.x clip_h, SDXL clip_l and clip_g."""


def recorded_strength(files: list[str]) -> float:
    """The strength that the first file records: ComfyUI has one default for all files, and the export writes one."""
    with suppress(ValueError, OSError):  # of a damaged file or a broken link, which `apply` tells of
        return load(FOLDER / files[0])[0].strength if files else 1.0
    return 1.0


class ApplyCatVersion:
    """A CLIP and a concept of this folder to a CLIP that knows the concept; the one that came in stays as it is."""

    CATEGORY = "conditioning"
    FUNCTION = "apply"
    RETURN_TYPES = ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        files = sorted(path.name for path in FOLDER.glob("*.safetensors"))
        strength = {"default": recorded_strength(files), "min": 0.0, "max": MAX_STRENGTH, "step": 0.05}
        return {"required": {"clip": ("CLIP",), "concept": (files,), "strength": ("FLOAT", strength)}}

    @classmethod
    def IS_CHANGED(cls, concept, **inputs):
        return (FOLDER / concept).stat().st_mtime_ns

    def apply(self, clip, concept, strength):
        """Object patches are in the shared model only while the clone is the one that ComfyUI has loaded."""
        concepts = load(FOLDER / Path(concept).name)
        names = [name for name in ENCODERS if hasattr(clip.cond_stage_model, name)]
        if len(names) != len(concepts):
            raise ValueError(
                f"{concept}: for {len(concepts)} text encoder(s), but this CLIP has {len(names)} "
                f"({', '.join(names) or 'none of CLIP'}); use the base model it was learned on"
            )
        clone = clip.clone()
        for name, part in zip(names, concepts, strict=True):
            encoder = getattr(clip.cond_stage_model, name)
            patch(clone.patcher, name, encoder, Handle(part, getattr(clip.tokenizer, name).tokenizer, strength))
        return (clone,)


def patch(patcher, name, encoder, handle):
    """Patch one text encoder: its forward, which sees the tokens, and the self-attention of the concept's layers."""
    attentions = [layer.self_attn for layer in encoder.transformer.text_model.encoder.layers]
    path = f"{name}.transformer.text_model.encoder.layers.{{}}.self_attn.forward"
    forwards = [patcher.get_model_object(path.format(i)) for i in range(len(attentions))]
    check(handle.concept, attentions, forwards)
    encode = patcher.get_model_object(f"{name}.forward")

    def forward(tokens, *rest, **named):
        # A token is an id, or the vector of a textual inversion: that one is no word of the class.
        ids = [[token if isinstance(token, Integral) else -1 for token in row] for row in tokens]
        handle.look(torch.tensor(ids))
        return encode(tokens, *rest, **named)

    patcher.add_object_patch(f"{name}.forward", forward)
    for i in handle.concept.layers:
        patcher.add_object_patch(path.format(i), handle.forward(attentions[i], i, forwards[i], lambda x: x))


NODE_CLASS_MAPPINGS = {"ApplyCatVersion": ApplyCatVersion}
NODE_DISPLAY_NAME_MAPPINGS = {"ApplyCatVersion": "Apply CatVersion"}
