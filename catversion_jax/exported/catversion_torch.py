"""CatVersion concepts in diffusers: needs PyTorch and nothing else.

    import catversion_torch

    handle = catversion_torch.attach(pipe, "teapot.safetensors")
    pipe("a photo of a teapot on the beach", negative_prompt="blurry, ugly")
    handle.strength = 0.5  # 0: the base model; 1: as trained; not set: as the concept's file says
    handle.remove()

`attach` takes a pipeline of Stable Diffusion 1.x, 2.x or XL, and a file, a name on Hugging Face (owner/name) or several
of these. Learned keys and values stand in front of the projected ones in a few self-attention layers of each text
encoder (arXiv 2311.14631). Who sees them is the concept's scope: `all`, every token of every prompt; `trigger`, the
tokens from the class word on, and only in prompts that hold it. What several concepts change in one prompt is added.

The negative prompt never sees a concept: the concepts act while the pipeline encodes its prompt, and nowhere else. For
a program that calls the text encoder by itself there is `with handle.enabled():`. Where no token of a call sees a
concept, the result is the base model's bit for bit.

A concept works with the base model it was learned on; its sizes are checked here, the model's weights are not.
"""

import contextlib
import functools
import json
import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # a concept is kilobytes; what is larger is something else
MAX_STRENGTH = 2.0
SCOPES = ("all", "trigger")
FILE_NAME = "concept.safetensors"
"""Of a concept on Hugging Face."""
ENCODERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
"""The attributes of a pipeline that hold each text encoder and its tokenizer."""
TENSORS = {"prefix": "layers", "prefix_2": "layers_2"}
"""Each text encoder's tensor -> the metadata with its layers."""


@dataclass(frozen=True)
class Concept:
    """What is read of a concept.safetensors for one text encoder."""

    prefix: torch.Tensor  # float32 [P, layers, 2, heads, head_dim], 2 = (key, value)
    class_word: str
    layers: tuple[int, ...]  # of the text encoder
    logit_bias: float  # added to every prefix logit
    scope: str  # one of SCOPES
    strength: float  # that it is meant to be used at


def load(path) -> tuple[Concept, ...]:
    """Read a concept for each text encoder it was learned in. Raises ValueError for any other file."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES >> 20} MiB; expected a concept of a few kilobytes")
    try:
        return parse(path.read_bytes())
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, struct.error) as error:
        raise ValueError(f"{path}: not a readable concept ({error}); export it again") from None


def find(source) -> Path:
    """The file of a path or, if there is none, of a name on Hugging Face, which is downloaded."""
    path = Path(source)
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(source)):
        import huggingface_hub  # diffusers needs it

        return Path(huggingface_hub.hf_hub_download(os.fspath(source), FILE_NAME))
    return path / FILE_NAME if path.is_dir() else path


def parse(data: bytes) -> tuple[Concept, ...]:
    """A safetensors file's bytes: 8 with the header's length, a JSON header, the tensors."""
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    metadata = {name: json.loads(value) for name, value in header["__metadata__"].items()}
    if metadata["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format version {metadata['format_version']}; expected {FORMAT_VERSION}")
    if metadata["scope"] not in SCOPES:
        raise ValueError(f"scope {metadata['scope']!r}; expected one of {', '.join(SCOPES)}")
    concepts = []
    for name in sorted(header.keys() - {"__metadata__"}):
        layers = tuple(metadata[TENSORS[name]])
        prefix = read_tensor(header[name], data[8 + size :], len(layers))
        bias, strength = float(metadata["logit_bias"]), checked(float(metadata.get("strength", 1.0)))
        concepts.append(Concept(prefix, metadata["class_word"], layers, bias, metadata["scope"], strength))
    if not concepts:
        raise ValueError("no tensors; expected a prefix")
    return tuple(concepts)


def read_tensor(entry: dict, data: bytes, layers: int) -> torch.Tensor:
    """A prefix by its entry in the header."""
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != "F32" or len(shape) != 5 or shape[1:3] != [layers, 2] or min(shape) < 1:
        raise ValueError(f"tensor {entry['dtype']} {shape}; expected F32 [P, {layers}, 2, heads, head_dim]")
    if not 0 <= start <= stop <= len(data) or stop - start != 4 * math.prod(shape):
        raise ValueError(f"tensor at {start} to {stop}; expected {4 * math.prod(shape)} bytes inside the file")
    return torch.frombuffer(bytearray(data[start:stop]), dtype=torch.float32).reshape(shape)


def checked(strength: float) -> float:
    """A strength in [0, 2]. Raises ValueError for any other."""
    if not 0 <= strength <= MAX_STRENGTH:
        raise ValueError(f"strength {strength:g}; expected 0 (the base model) to {MAX_STRENGTH:g} (1 is as trained)")
    return strength


class Part:
    """A concept in one text encoder."""

    def __init__(self, concept: Concept, tokenizer, strength: float | None = None):
        self.concept = concept
        self.strength = concept.strength if strength is None else strength
        self.active = True
        self._tokenizer = tokenizer
        self._visible = None  # bool [B, Q]: who sees the prefix in the prompts at hand

    @property
    def strength(self) -> float:
        """In [0, 2]: scales what the prefix changes in each layer's attention; 0 is the base model, 1 as trained."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = checked(float(value))

    def look(self, token_ids: torch.Tensor, one_prompt: bool = False) -> None:
        """Find in token ids [B, Q] who sees the prefix: to be called before the text encoder's layers run.

        The rows are prompts or, of `one_prompt`, its chunks. An empty prompt does not see it.
        """
        rows = token_ids.reshape(-1, token_ids.shape[-1]).tolist()
        inner = [self._inner(row) for row in rows]
        groups = [range(len(rows))] if one_prompt else [[i] for i in range(len(rows))]
        ends = {end for group in groups for end in self._ends(group, inner)}
        visible = torch.zeros(len(rows), len(rows[0]), dtype=torch.bool)
        for i, text in enumerate(inner):
            of_row = [place for row, place in ends if row == i]
            if self.concept.scope == "all":
                visible[i] = len(text) > 0
            elif of_row:
                visible[i, min(of_row) :] = True
        self._visible = visible

    def _ends(self, group, inner: list[list[int]]) -> list[tuple[int, int]]:
        """Row and position of each last token of the class word, as a whole word, in rows that go on in each other."""
        word = self._ids(self.concept.class_word)
        if not word or self._tokenizer.unk_token_id in word:
            return []
        text = [(token, (row, 1 + place)) for row in group for place, token in enumerate(inner[row])]
        ids = [token for token, _ in text]
        starts = range(len(ids) - len(word) + 1)
        whole = (i for i in starts if ids[i : i + len(word)] == word and (i == 0 or self._ends_word(ids[i - 1])))
        return [text[i + len(word) - 1][1] for i in whole]

    def _ends_word(self, token_id: int) -> bool:
        # CLIP marks the tokens at the ends of words; below 0 are vectors that a program put among the tokens.
        if token_id < 0 or token_id in self._tokenizer.all_special_ids:
            return True
        return self._tokenizer.convert_ids_to_tokens(token_id).endswith("</w>")

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _inner(self, row: list[int]) -> list[int]:
        """What stands between the start token and the first end token."""
        inner = row[1:]
        return inner[: inner.index(self._tokenizer.eos_token_id)] if self._tokenizer.eos_token_id in inner else inner

    def add(
        self, attention: torch.nn.Module, layer: int, x: torch.Tensor, masks: list, out: torch.Tensor
    ) -> torch.Tensor:
        """What a layer's self-attention gives for `x`, `out`, and what the prefix changes in it:

        strength (softmax(Q [dK ; K]^T / sqrt(d) + mask) [dV ; V] - Attn(Q, K, V)), with logits and softmax in float32.
        """
        if not (self.active and self.strength > 0 and self._visible is not None and self._visible.any()):
            return out
        length, _, _, heads, head_dim = self.concept.prefix.shape
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (p(x).unflatten(-1, (heads, head_dim)).transpose(1, 2) for p in projections)  # [B, H, Q, D]
        prefix = self.concept.prefix[:, self.concept.layers.index(layer)].to(value)
        prefix_key, prefix_value = prefix.permute(1, 2, 0, 3)  # [H, P, D]
        query = (query * head_dim**-0.5).float()
        scores = query @ key.float().transpose(-1, -2)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        for mask in (mask for mask in masks if isinstance(mask, torch.Tensor)):
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        prefix_scores = query @ prefix_key.float().transpose(-1, -2) + self.concept.logit_bias
        unseen = ~self._visible[:, None, :, None].to(x.device)
        prefix_scores = prefix_scores.masked_fill(unseen, -math.inf)
        of_prefix = torch.cat([prefix_scores, scores], -1).softmax(-1)[..., :length]
        tokens = scores.softmax(-1) @ value.float()
        change = of_prefix @ prefix_value.float() - of_prefix.sum(-1, keepdim=True) * tokens
        change = (self.strength * change).to(value.dtype).transpose(1, 2).flatten(2)
        # Less the projection of nothing, which is its bias, wherever a program keeps that.
        return out + attention.out_proj(change) - attention.out_proj(torch.zeros_like(change[:, :1]))


class Handle:
    """Concepts at work in a pipeline: what `attach` returns."""

    def __init__(self, concepts: list[list[Part]]):
        self._concepts = concepts  # the parts of each, in the text encoders
        self._undo = []
        self._enable(False)

    @property
    def strength(self) -> float | tuple[float, ...]:
        """In [0, 2]: 0 is the base model, 1 as trained; of several concepts, of each. One number sets them all."""
        values = tuple(parts[0].strength for parts in self._concepts)
        return values[0] if len(values) == 1 else values

    @strength.setter
    def strength(self, value) -> None:
        values = list(value) if isinstance(value, tuple | list) else [value] * len(self._concepts)
        if len(values) != len(self._concepts):
            raise ValueError(
                f"{len(values)} strengths; expected one, or one for each of {len(self._concepts)} concepts"
            )
        for parts, of_concept in zip(self._concepts, values, strict=True):
            for part in parts:
                part.strength = of_concept

    @contextlib.contextmanager
    def enabled(self):
        """The concepts in whatever the text encoders encode inside a `with` block."""
        self._enable(True)
        try:
            yield
        finally:
            self._enable(False)

    def remove(self) -> None:
        """Give the pipeline back as it was."""
        while self._undo:
            self._undo.pop()()

    def _enable(self, active: bool) -> None:
        for part in (part for parts in self._concepts for part in parts):
            part.active = active


def check(concept: Concept, attentions: list[torch.nn.Module]) -> None:
    """Raise ValueError where a text encoder is not of the concept's sizes."""
    heads, head_dim = concept.prefix.shape[3:]
    width = attentions[0].q_proj.out_features
    if not set(concept.layers) <= set(range(len(attentions))) or width != heads * head_dim:
        raise ValueError(
            f"the concept has {heads} heads of {head_dim} in layers {concept.layers}, the text encoder "
            f"{len(attentions)} layers of width {width}; use the base model it was learned on"
        )


def attach(pipe, concepts, strength=None) -> Handle:
    """Put one or several concepts into a diffusers pipeline, in place: files, or names on Hugging Face.

    `strength` is one number, or one for each concept; without it, as their files say.
    """
    encoders = encoders_of(pipe)
    sources = list(concepts) if isinstance(concepts, list | tuple) else [concepts]
    parts = []
    for source in sources:
        loaded = load(find(source))
        if len(loaded) != len(encoders):
            raise ValueError(
                f"{source}: for {len(loaded)} text encoder(s), but this pipeline has {len(encoders)}; use the base "
                "model it was learned on"
            )
        parts.append([Part(concept, tokenizer) for concept, (_, tokenizer) in zip(loaded, encoders, strict=True)])
        for part, (encoder, _) in zip(parts[-1], encoders, strict=True):
            check(part.concept, [layer.self_attn for layer in owner_of(encoder).encoder.layers])
    handle = Handle(parts)
    if strength is not None:
        handle.strength = strength
    for part, (encoder, _) in ((p, e) for of_concept in parts for p, e in zip(of_concept, encoders, strict=True)):
        handle._undo += hook(part, owner_of(encoder))
    handle._undo.append(only_for_the_prompt(pipe, handle))
    return handle


def encoders_of(pipe) -> list[tuple]:
    """The text encoders of a pipeline with their tokenizers. Raises ValueError for another model's pipeline."""
    found = [tuple(getattr(pipe, name, None) for name in names) for names in ENCODERS]
    found = [pair for pair in found if None not in pair]
    if not found or not hasattr(pipe, "encode_prompt") or not hasattr(pipe, "unet"):
        raise ValueError(f"{type(pipe).__name__}: expected a pipeline of Stable Diffusion 1.x, 2.x or XL")
    return found


def owner_of(text_encoder: torch.nn.Module) -> torch.nn.Module:
    """The module that has `encoder.layers`. Raises ValueError for a model without."""
    # transformers 4.57: model.text_model.encoder.layers; 5: model.encoder.layers.
    owners = [module for module in text_encoder.modules() if hasattr(getattr(module, "encoder", None), "layers")]
    if not owners:
        raise ValueError(f"{type(text_encoder).__name__}: no encoder.layers; expected a transformers CLIPTextModel")
    return owners[0]


def hook(part: Part, owner: torch.nn.Module) -> list:
    """Hook a concept into a text encoder; returns what undoes it."""

    def look(module, args, kwargs):
        if part.active:
            part.look(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    def changed(layer, attention, args, kwargs, out):
        hidden, *rest = [*args, *kwargs.values()] if args else [kwargs["hidden_states"], *kwargs.values()]
        masks = [value for value in rest if isinstance(value, torch.Tensor) and value is not hidden]
        return (part.add(attention, layer, hidden, masks, out[0]), *out[1:])

    handles = [owner.register_forward_pre_hook(look, with_kwargs=True)]
    for layer in part.concept.layers:
        attention = owner.encoder.layers[layer].self_attn
        handles.append(attention.register_forward_hook(functools.partial(changed, layer), with_kwargs=True))
    return [handle.remove for handle in handles]


def only_for_the_prompt(pipe, handle: Handle):
    """Make a pipeline encode its prompt with the concepts and its negative prompt without; returns what undoes it."""
    before = vars(pipe).get("encode_prompt")
    original = pipe.encode_prompt

    @functools.wraps(original)
    def encode_prompt(*args, **kwargs):
        # The prompt, the negative one and, in SDXL, the pooled embeddings of both. Two runs, as nothing else tells
        # which text is which; a text encoder takes milliseconds.
        base = original(*args, **kwargs)
        with handle.enabled():
            moved = original(*args, **kwargs)
        return tuple(base[i] if i % 2 else moved[i] for i in range(len(base)))

    pipe.encode_prompt = encode_prompt

    def undo():
        # A pipeline that another handle has covered since stays covered; then this handle has nothing to enable.
        if vars(pipe).get("encode_prompt") is encode_prompt:
            del pipe.encode_prompt
            if before is not None:
                pipe.encode_prompt = before

    return undo
