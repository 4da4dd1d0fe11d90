"""A CatVersion concept in a transformers CLIPTextModel: needs PyTorch and nothing else.

    import catversion_torch

    handle = catversion_torch.attach(pipe.text_encoder, "concept.safetensors", tokenizer=pipe.tokenizer)
    pipe("a photo of a teapot on the beach")
    handle.strength = 0.5  # 0: the base model; 1: as trained; not set: as the concept's file says
    handle.remove()

Learned keys and values stand in front of the projected ones in a few self-attention layers (arXiv 2311.14631). Who
sees them is the concept's scope: `all`, every token of every prompt; `trigger`, the tokens from the class word on, and
only in prompts that hold it.

With classifier-free guidance the unconditional branch must not see the concept, and a pipeline encodes it with the same
text encoder. So the prompts in `handle.negatives` are encoded as the base model does. The empty prompt is in it from
the start: a call without a negative prompt is right as it is. With one, say so before:

    handle.negatives.add("blurry, ugly")
    pipe("a photo of a teapot on the beach", negative_prompt="blurry, ugly")

or make `negative_prompt_embeds` yourself inside `with handle.disabled():`, where the base model is at work. Where no
token of a call sees the concept, the model's own attention runs: the result is the base model's bit for bit.

The concept works with the base model it was learned on; its sizes are checked here, the model's weights are not. One
learned on SDXL holds a part for each text encoder; attach both:

    catversion_torch.attach(pipe.text_encoder, "concept.safetensors", tokenizer=pipe.tokenizer)
    catversion_torch.attach(pipe.text_encoder_2, "concept.safetensors", tokenizer=pipe.tokenizer_2, encoder=2)
"""

import contextlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

FORMAT_VERSION = 1
MAX_BYTES = 64 * 2**20  # a concept is kilobytes; what is larger is something else
MAX_STRENGTH = 2.0
SCOPES = ("all", "trigger")
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


class Handle:
    """A concept at work in one text encoder: what `attach` returns."""

    def __init__(self, concept: Concept, tokenizer, strength: float | None = None):
        self.concept = concept
        self.strength = concept.strength if strength is None else strength
        self.negatives = {""}
        self._tokenizer = tokenizer
        self._enabled = True
        self._visible = None  # bool [B, Q]: who sees the prefix in the prompts at hand
        self._undo = []

    @property
    def strength(self) -> float:
        """In [0, 2]: scales what the prefix changes in each layer's attention; 0 is the base model, 1 as trained."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._strength = checked(float(value))

    @contextlib.contextmanager
    def disabled(self):
        """The base model inside a `with` block."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def remove(self) -> None:
        """Give the text encoder back as it was."""
        while self._undo:
            self._undo.pop()()

    def look(self, token_ids: torch.Tensor) -> None:
        """Find in token ids [B, Q] who sees the prefix: to be called before the text encoder's layers run."""
        token_ids = token_ids.reshape(-1, token_ids.shape[-1])
        length = token_ids.shape[1]
        visible = torch.ones_like(token_ids, dtype=torch.bool)
        if self.concept.scope == "trigger":
            last = torch.tensor([self._find(row) for row in token_ids.tolist()], device=token_ids.device)[:, None]
            visible = (last >= 0) & (torch.arange(length, device=last.device) >= last)
        negatives = [self._ids(prompt)[: length - 2] for prompt in self.negatives]
        negative = [self._inner(row) in negatives for row in token_ids.tolist()]
        self._visible = visible & ~torch.tensor(negative, device=visible.device)[:, None]

    def _find(self, row: list[int]) -> int:
        """The last token of the class word's first occurrence as a whole word, -1 without one."""
        word = self._ids(self.concept.class_word)
        if word and self._tokenizer.unk_token_id not in word:
            for start in range(len(row) - len(word) + 1):
                if row[start : start + len(word)] == word and (start == 0 or self._ends_word(row[start - 1])):
                    return start + len(word) - 1
        return -1

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

    def forward(self, attention: torch.nn.Module, layer: int, original, result):
        """A forward of one layer's self-attention that sees the prefix, for its `original` one; `result` makes what it
        returns of a tensor."""

        def forward(hidden_states, *rest, **named):
            if not (self._enabled and self.strength > 0 and self._visible.any()):
                return original(hidden_states, *rest, **named)
            masks = [mask for mask in (*rest, *named.values()) if isinstance(mask, torch.Tensor)]
            return result(self._attend(attention, layer, hidden_states, masks))

        forward.catversion = self
        return forward

    def _attend(self, attention, layer: int, x: torch.Tensor, masks: list[torch.Tensor]) -> torch.Tensor:
        """Attn(Q, K, V) + strength (softmax(Q [dK ; K]^T / sqrt(d) + mask) [dV ; V] - Attn(Q, K, V)).

        Logits and softmax are in float32.
        """
        length, _, _, heads, head_dim = self.concept.prefix.shape
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        query, key, value = (p(x).unflatten(-1, (heads, head_dim)).transpose(1, 2) for p in projections)  # [B, H, Q, D]
        prefix = self.concept.prefix[:, self.concept.layers.index(layer)].to(value)
        prefix_key, prefix_value = prefix.permute(1, 2, 0, 3)  # [H, P, D]
        query = (query * head_dim**-0.5).float()
        scores = query @ key.float().transpose(-1, -2)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        for mask in masks:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        prefix_scores = query @ prefix_key.float().transpose(-1, -2) + self.concept.logit_bias
        unseen = ~self._visible[:, None, :, None].to(x.device)
        prefix_scores = prefix_scores.masked_fill(unseen, -math.inf)
        weights = torch.cat([prefix_scores, scores], -1).softmax(-1)
        # The strength takes a part of the prefix's weight; the tokens get it back as they would share it without one.
        of_prefix, of_tokens = weights[..., :length], weights[..., length:]
        given_back = (1 - self.strength) * of_prefix.sum(-1, keepdim=True) * scores.softmax(-1)
        of_prefix, of_tokens = self.strength * of_prefix, of_tokens + given_back
        out = of_prefix.to(value.dtype) @ prefix_value + of_tokens.to(value.dtype) @ value
        return attention.out_proj(out.transpose(1, 2).flatten(2))


def check(concept: Concept, attentions: list[torch.nn.Module], forwards) -> None:
    """Raise ValueError where a text encoder is not of the concept's sizes, or its forwards hold a concept already."""
    heads, head_dim = concept.prefix.shape[3:]
    width = attentions[0].q_proj.out_features
    if not set(concept.layers) <= set(range(len(attentions))) or width != heads * head_dim:
        raise ValueError(
            f"the concept has {heads} heads of {head_dim} in layers {concept.layers}, the text encoder "
            f"{len(attentions)} layers of width {width}; use the base model it was learned on"
        )
    if any(hasattr(forward, "catversion") for forward in forwards):
        raise ValueError("the text encoder holds a concept already; take that one out first")


def attach(text_encoder: torch.nn.Module, path, tokenizer, strength: float | None = None, encoder: int = 1) -> Handle:
    """Put the concept of a file into a CLIPTextModel(WithProjection), in place; `encoder` is 2 for SDXL's second.

    `strength` is the one that the file records, unless it is given.
    """
    concepts = load(path)
    if not 1 <= encoder <= len(concepts):
        raise ValueError(f"{path}: for {len(concepts)} text encoder(s); expected one for encoder {encoder}")
    concept = concepts[encoder - 1]
    # transformers 4.57: model.text_model.encoder.layers; 5: model.encoder.layers.
    owners = [module for module in text_encoder.modules() if hasattr(getattr(module, "encoder", None), "layers")]
    if not owners:
        raise ValueError(f"{type(text_encoder).__name__}: no encoder.layers; expected a transformers CLIPTextModel")
    owner = owners[0]
    attentions = [layer.self_attn for layer in owner.encoder.layers]
    check(concept, attentions, [attention.forward for attention in attentions])
    handle = Handle(concept, tokenizer, strength)

    def look(module, args, kwargs):
        handle.look(kwargs["input_ids"] if "input_ids" in kwargs else args[0])

    handle._undo.append(owner.register_forward_pre_hook(look, with_kwargs=True).remove)
    for layer in concept.layers:
        attention = attentions[layer]
        handle._undo.append(restore(attention))
        attention.forward = handle.forward(attention, layer, attention.forward, lambda x: (x, None))
    return handle


def restore(attention: torch.nn.Module):
    """What undoes a later assignment to `attention.forward`."""
    before = {name: value for name, value in vars(attention).items() if name == "forward"}

    def undo():
        del attention.forward
        vars(attention).update(before)

    return undo
