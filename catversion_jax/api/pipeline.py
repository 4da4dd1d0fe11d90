"""A base model in Python: `Pipeline.from_pretrained(...)` loads it, and calling it samples images."""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from catversion_jax.base.lora import MOST_SCALE, merge_lora, read_lora
from catversion_jax.base.pipeline import BasePipeline, ModelConfig, drawing_dtype, load_pipeline
from catversion_jax.methods.composition import check_composition
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.concept_model import load_for_concepts, recorded_sampler, warnings
from catversion_jax.sampling.picture_input import DENOISE, PictureInput, read_input
from catversion_jax.sampling.picture_record import PictureRecord, UsedLora, as_text, records_of, texts_of
from catversion_jax.sampling.sampler import SampleRequest, sample_each, sample_images
from catversion_jax.utils import cache
from catversion_jax.utils.errors import UserError
from catversion_jax.utils.log import warn
from catversion_jax.utils.paths import AnyPath, expand, local_copy
from catversion_jax.utils.settings import SettingsT, broken
from catversion_jax.utils.types import UInt8

MODEL = ("revision", "variant", "prediction_type", "dtype")
SAMPLER = ("scheduler", "steps", "guidance", "batch_size")
"""The settings that a call may change: of config.model, and of config.sample."""
START = {"image", "mask", "denoise"}


@functools.cache
def keep_compiled() -> None:
    """Keeps compiled programs between processes. Once a process: each call would count the cache's hits again."""
    cache.enable()


class Pipeline:
    """A base model that samples images, with any concepts that were learned on it."""

    def __init__(self, model: ModelConfig, base: BasePipeline, loras: tuple[UsedLora, ...] = ()):
        self.model, self.base, self.loras = model, base, loras

    @classmethod
    def from_pretrained(cls, name: str | AnyPath = "", **how: Any) -> "Pipeline":
        """Loads the base model `name`: a folder, a single file or a name on Hugging Face; "" is the mini model.

        `how` are the other settings of `config.model`: `revision`, `variant`, `prediction_type`, and `dtype`, which is
        "float32" (by default on a CPU) or "bfloat16" (by default elsewhere). Raises UserError for another setting or
        value, and if there is no such model.
        """
        model = with_values(ModelConfig(os.fspath(name)), MODEL, {"dtype": drawing_dtype()} | how)
        keep_compiled()
        return cls(model, load_pipeline(model))

    @classmethod
    def for_concepts(cls, concepts: Mapping[str, Concept], model: ModelConfig) -> "Pipeline":
        """Loads a base model for concepts, given by their sources, which must have been learned on it."""
        pipe = cls(model, load_pipeline(model))
        pipe.check(concepts)
        return pipe

    def with_lora(self, path: str | AnyPath, scale: float = 1.0) -> "Pipeline":
        """Returns the pipeline with a LoRA of kohya or diffusers merged into it; this one stays as it is.

        Concepts that were learned on the base model are used on top of it. Raises UserError for a file of another model
        or kind, and for a scale that is not finite or beyond 10.
        """
        if not abs(scale) <= MOST_SCALE:
            raise UserError(f"{path}: scale {scale}: expected a number up to {MOST_SCALE:g}")
        file = expand(path)
        if not file.is_file():
            raise UserError(f"{file}: not found; expected a LoRA of kohya or diffusers")
        with local_copy(file) as local:
            lora = read_lora(local)
            base = merge_lora(self.base, lora, scale)
        used = UsedLora(as_text(file.name), float(scale), lora.digest)
        return Pipeline(self.model, base, (*self.loras, used))

    def __call__(
        self,
        prompts: str | Sequence[str],
        concepts: Concept | Sequence[Concept] = (),
        num: int = 1,
        seed: int = 0,
        negative_prompt: str = "",
        **how: Any,
    ) -> list[Image.Image]:
        """Returns `num` images of each prompt, ordered by prompt, with the seeds from `seed` on.

        A prompt shows a concept if it has its class word. `how` are `width` and `height` (pixels; by default the
        model's own), `image`, a picture to draw anew, with `mask`, where it is, and `denoise`, by what
        share, and the settings of `config.sample`: `scheduler`, `steps`, `guidance` and `batch_size`; those not given
        are as the concepts record them. Raises UserError for a concept of another base model and for values that are
        out of range; likely mistakes are warnings.
        """
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        given = [concepts] if isinstance(concepts, Concept) else list(concepts)
        self.check({f"the concept of {concept.class_word!r}": concept for concept in given})
        seeds = [(int(seed) + i) % 2**32 for i in range(num)]
        recorded = recorded_sampler({concept.class_word: concept for concept in given})
        size = (how.pop("width", None) or 0, how.pop("height", None) or 0)
        start = self.start({name: how.pop(name) for name in START & how.keys()}, size)
        sampler = with_values(recorded, SAMPLER, how)
        request = SampleRequest.every(several, seeds, sampler, negative_prompt, *size, start)
        pairs = zip(self.sample(request, given), self.records(request, [given] * len(request.prompts)), strict=True)
        return [with_texts(Image.fromarray(image), texts_of(picture)) for image, picture in pairs]

    def start(self, given: Mapping[str, Any], size: tuple[int, int]) -> PictureInput | None:
        """Returns the picture that a call's `image`, `mask` and `denoise` describe; None without one.

        Raises UserError if it is no picture, or if there is a mask without one.
        """
        given = {name: value for name, value in given.items() if value is not None}
        if "image" not in given:
            if given:
                raise UserError(f"{', '.join(sorted(given))}: of image, which is missing; give a picture to draw anew")
            return None
        image, mask = opened(given["image"]), opened(given["mask"]) if "mask" in given else None
        return read_input(image, mask, given.get("denoise", DENOISE), self.base.networks, size)

    def records(self, request: SampleRequest, of_each: Sequence[Sequence[Concept]]) -> Iterator[PictureRecord]:
        """Yields how each of the request's images is made, given the concepts of each."""
        return records_of(request, self.base, self.model, of_each, self.loras)

    def check(self, concepts: Mapping[str, Concept]) -> None:
        """Raises UserError for a concept, given by its source, that was learned on another base model."""
        _, unsure = load_for_concepts(concepts, self.model, lambda _: self.base)
        for warning in unsure:
            warn(warning)

    def sample(self, request: SampleRequest, concepts: Sequence[Concept]) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        """Yields the request's images as they are sampled, uint8 RGB; warns of likely mistakes first."""
        check_composition(concepts)
        prompts = list(dict.fromkeys(request.prompts))
        for warning in warnings(self.base, prompts, concepts) if concepts else ():
            warn(warning)
        return sample_images(self.base, request, concepts)

    def sample_each(
        self, request: SampleRequest, of_each: Sequence[Sequence[Concept]]
    ) -> Iterator[tuple[int, UInt8[np.ndarray, "H W 3"]]]:
        """Yields the request's images, each with concepts of its own, and their indices.

        They come in the order in which most of them can share a batch. The base model is the same for all, and it is
        compiled once: a concept is kilobytes.
        """
        return sample_each(self.base, request, of_each)


def opened(source: str | AnyPath | Image.Image) -> AnyPath | Image.Image:
    """Returns the path of a file, or an image in memory as it is. Raises UserError for anything else."""
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, str | os.PathLike):
        raise UserError(f"a {type(source).__name__} as a picture; expected a file's path or an image of Pillow")
    return expand(source)


def with_texts(image: Image.Image, texts: Mapping[str, str]) -> Image.Image:
    """Returns the image with texts in its `info`, from where `png_info(image.info)` takes them to a file."""
    image.info.update(texts)
    return image


def with_values(settings: SettingsT, names: Sequence[str], given: Mapping[str, Any]) -> SettingsT:
    """Returns settings with some of the values of `names`. Raises UserError for another name, and for a bad value."""
    if given.keys() - set(names):
        raise UserError(f"{', '.join(given)}: expected some of {', '.join(names[:-1])} and {names[-1]}")
    changed = replace(settings, **given)
    for key, value, expected in broken(changed):
        raise UserError(f"{key}={value!r}: expected {expected}")
    return changed
