"""How a picture was made: what its PNG file says in text, so that people and programs can read it and make it again.

Two text chunks have it: `parameters` in the form that AUTOMATIC1111's web UI writes, which many programs read, and
`catversion` as JSON, which is complete.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import msgspec
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from catversion_jax import __version__
from catversion_jax.base import schedulers
from catversion_jax.base.lora import MOST_SCALE
from catversion_jax.base.pipeline import DTYPES, BasePipeline, ModelConfig
from catversion_jax.base.prompt_tokens import read_prompt
from catversion_jax.base.sampler_config import MAX_STRENGTH, SamplerConfig
from catversion_jax.methods.concept_file import Concept
from catversion_jax.methods.model_names import public_name
from catversion_jax.sampling.sampler import SampleRequest
from catversion_jax.utils import records
from catversion_jax.utils.errors import UserError, short
from catversion_jax.utils.paths import AnyPath, local_copy, whole
from catversion_jax.utils.settings import broken, is_text

PARAMETERS, CHUNK = "parameters", "catversion"
"""Keywords of the two text chunks."""


class UsedConcept(msgspec.Struct, frozen=True):
    """A concept that was sampled with."""

    class_word: str
    method: str
    strength: float
    digest: str  # Concept.digest


class UsedLora(msgspec.Struct, frozen=True):
    """A LoRA that was merged into the base model."""

    name: str  # of its file
    scale: float
    digest: str


class PictureRecord(msgspec.Struct, frozen=True):
    """How one picture was made."""

    prompt: str
    negative_prompt: str
    seed: int
    scheduler: str  # "": the model's own
    steps: int
    guidance: float
    batch_size: int  # other sizes round the last bits otherwise
    width: int
    height: int
    concepts: tuple[UsedConcept, ...]
    model: str  # a name on Hugging Face, or the last part of a path; "": the mini model
    fingerprint: str  # of its text encoders
    dtype: str
    version: str  # of this program
    start: str = ""  # digest of the picture that it began as, and of its mask; "": of none
    denoise: float = 0.0
    loras: tuple[UsedLora, ...] = ()
    reading: int = 0  # 1: its prompts have weights or several chunks, which are read since there is this field
    model_id: str = ""  # of a local model: a digest of its path, as others may have its name

    @property
    def sampler(self) -> SamplerConfig:
        return SamplerConfig(self.steps, self.guidance, self.batch_size, self.scheduler)

    @property
    def key(self) -> str:
        """Eight digits that tell prompts, settings and concepts apart: a hash of all but the seed and the version."""
        values = msgspec.structs.asdict(msgspec.structs.replace(self, seed=0, version=""))
        values["concepts"] = [msgspec.structs.asdict(used) for used in self.concepts]
        values["loras"] = [msgspec.structs.asdict(used) for used in self.loras]
        # As the names of pictures were before there were these.
        values = {name: value for name, value in values.items() if value or name not in ("loras", "reading")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


def records_of(
    request: SampleRequest,
    pipeline: BasePipeline,
    model: ModelConfig,
    of_each: Sequence[Sequence[Concept]],
    loras: Sequence[UsedLora] = (),
) -> Iterator[PictureRecord]:
    """Yields the record of each of a request's images, given the concepts of each."""
    sampler, start = request.sampler, request.start
    width, height = request.size(pipeline.networks)
    # What all of them share is made once: the digests are of whole pictures and concepts.
    shared = PictureRecord(
        prompt="",
        negative_prompt=request.negative_prompt,
        seed=0,
        scheduler=sampler.scheduler,
        steps=int(sampler.steps),
        guidance=float(sampler.guidance),
        batch_size=int(sampler.batch_size),
        width=int(width),
        height=int(height),
        concepts=(),
        model=as_text(public_name(model.path)),
        model_id=model_id(model.path),
        loras=tuple(loras),
        fingerprint=pipeline.fingerprint,
        dtype=model.dtype,
        version=__version__,
        start=start.digest if start else "",
        denoise=float(start.denoise) if start else 0.0,
    )
    reading_by_prompt = lru_cache(1024)(partial(reading_of, pipeline))
    used_by_id: dict[int, UsedConcept] = {}
    for prompt, seed, concepts in zip(request.prompts, request.seeds, of_each, strict=True):
        for c in concepts:
            if id(c) not in used_by_id:
                used_by_id[id(c)] = UsedConcept(c.class_word, c.method_name, float(c.strength), c.digest)
        used = tuple(used_by_id[id(c)] for c in concepts)
        reading = max(map(reading_by_prompt, (prompt, request.negative_prompt)))
        yield msgspec.structs.replace(shared, prompt=prompt, seed=int(seed), concepts=used, reading=reading)


def reading_of(pipeline: BasePipeline, prompt: str) -> int:
    """Returns `reading` for one prompt."""
    tokens = read_prompt(pipeline.tokenizer, prompt)
    plain = pipeline.tokenizer([prompt])
    return int(not np.array_equal(tokens.ids, plain) or bool((tokens.weights != 1).any()))


def model_id(path: str) -> str:
    """Returns eight digits that tell local models of one name apart; "" for one of Hugging Face, and the mini model."""
    if not path or public_name(path) == path:
        return ""
    return hashlib.sha256(os.fsencode(whole(path))).hexdigest()[:8]


def as_text(name: str) -> str:
    """Returns a file's name as UTF-8 has it; bytes that are none are escaped."""
    return os.fsencode(name).decode(errors="backslashreplace")


def parameters(record: PictureRecord) -> str:
    """Returns the text that AUTOMATIC1111's web UI writes for such a picture: prompts, and a line of settings."""
    name, kind = schedulers.webui_name(record.scheduler)
    settings = {
        "Steps": record.steps,
        "Sampler": name,
        **({"Schedule type": kind} if kind else {}),
        "CFG scale": f"{record.guidance:g}",
        "Seed": record.seed,
        "Size": f"{record.width}x{record.height}",
        **({"Denoising strength": f"{record.denoise:g}"} if record.start else {}),
        "Model": record.model or "mini",
        **{f"Concept {i}": describe_used(used) for i, used in enumerate(record.concepts, 1)},
        **{f"Lora {i}": f"{used.name} {used.scale:g} {used.digest}" for i, used in enumerate(record.loras, 1)},
        "Version": f"catversion-jax {record.version}",
    }
    negative = [f"Negative prompt: {record.negative_prompt}"] if record.negative_prompt else []
    return "\n".join([record.prompt, *negative, ", ".join(f"{key}: {quoted(x)}" for key, x in settings.items())])


def describe_used(used: UsedConcept) -> str:
    return f"{used.class_word or 'unnamed'} {used.strength:g} {used.digest}"


def quoted(value: object) -> str:
    """Returns a value of the line of settings; one with a sign that separates them is quoted, as the web UI does."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:"\n') else text


def texts_of(record: PictureRecord) -> dict[str, str]:
    """Returns the texts of a picture by their keywords."""
    return {PARAMETERS: parameters(record), CHUNK: records.encode(record)}


def png_info(texts: Mapping[Any, Any]) -> PngInfo:
    """Returns how a picture was made as the chunks of a PNG file: `image.save("a.png", pnginfo=png_info(image.info))`.

    `texts` are those of `texts_of`, which the images of a Pipeline have in their `info`; other keys are left out.
    """
    info = PngInfo()
    for keyword in (PARAMETERS, CHUNK):
        text = texts.get(keyword, "")
        # Programs look for the plain kind, which takes Latin-1 alone.
        is_latin = all(ord(c) < 256 for c in text)
        (info.add_text if is_latin else info.add_itxt)(keyword, text)
    return info


def read_picture(path: AnyPath) -> PictureRecord:
    """Reads how a picture was made. Raises UserError, naming the file, if it is none of `catversion generate`."""
    expected = f"{path}: does not say how it was made; expected a PNG file of catversion generate"
    if not path.is_file():
        what = "not a regular file" if path.exists() else "not found"
        raise UserError(f"{path}: {what}; expected a picture of catversion generate")
    with local_copy(path) as local:
        try:
            with Image.open(local, formats=("PNG",)) as image:
                text = image.info.get(CHUNK)
            data = text.encode() if isinstance(text, str) else b""
        # Pillow's parser of chunks raises whatever it stumbles over.
        except Exception as error:
            raise UserError(f"{expected} ({short(error)})") from error
    if not data:
        raise UserError(expected)
    record = records.decode(data, PictureRecord, str(path), "expected a picture of catversion generate")
    check_record(record, str(path))
    return record


def check_record(record: PictureRecord, where: str) -> None:
    """Raises UserError for values that no picture has."""
    for key, value, expected in broken(record.sampler):
        raise UserError(f"{where}: {key}={value!r}; expected {expected}")
    if record.dtype not in DTYPES:
        raise UserError(f"{where}: dtype {record.dtype!r}; expected one of {', '.join(DTYPES)}")
    if not 0 <= record.seed < 2**32:
        raise UserError(f"{where}: seed {record.seed}; expected one below {2**32}")
    if any(not 0 <= used.strength <= MAX_STRENGTH for used in record.concepts):
        raise UserError(f"{where}: a strength that no concept has; expected at most {MAX_STRENGTH:g}")
    if any(not abs(used.scale) <= MOST_SCALE for used in record.loras):
        raise UserError(f"{where}: a scale that no LoRA has; expected at most {MOST_SCALE:g}")
    if not (is_text(record.prompt) and is_text(record.negative_prompt)):
        raise UserError(f"{where}: a prompt with a NUL or half of a character; expected text")
