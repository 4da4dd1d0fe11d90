"""Reads Textual Inversion embeddings of other programs: of diffusers, AUTOMATIC1111's web UI, kohya and ComfyUI.

    diffusers                   {"<cat-toy>": [c] or [n, c]}                        .safetensors, .bin
    AUTOMATIC1111's web UI      {"string_to_param": {"*": [n, c]}, "name": ...}     .pt, .bin
    kohya                       {"emb_params": [n, c]}                              .safetensors, .pt
    of SDXL, by any of them     {"clip_l": [n, c], "clip_g": [n, c']}               .safetensors

Each holds n vectors that stand in the place of a word among the tokens of a prompt. Nothing is unpickled.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from catversion_jax.utils.errors import UserError
from catversion_jax.weights import safetensors, torch_zip
from catversion_jax.weights.tensor import Tensor

ENDINGS = (".pt", ".bin")
"""Of files of torch.save."""
MOST_VECTORS = 75
"""As many as a text encoder takes tokens."""
LISTED_BY = "string_to_param"
SDXL = ("clip_l", "clip_g")
TITLE = "modelspec.title"
"""The metadata with the name that kohya gives an embedding."""
KIND = "a Textual Inversion embedding"
"""As foreign_files names it."""


def read_embedding(path: Path, metadata: Mapping[str, str], name: str) -> tuple[str, dict[str, np.ndarray]]:
    """Returns the word and, for each text encoder, float32 vectors [n, c]: `word` and, of SDXL, `word_2`.

    `metadata` are the texts of a safetensors file. A file that does not say its word has that of its `name`. Raises
    UserError for a file that is no embedding.
    """
    if path.suffix.lower() in ENDINGS:
        contents: Any = torch_zip.read_zip(path).value
    else:
        contents = safetensors.open_safetensors(path)
    given, tensors = word_and_tensors(contents if isinstance(contents, Mapping) else {}, metadata.get(TITLE) or name)
    if not tensors:
        raise UserError(
            f"{path}: no embedding in it; expected vectors by a word, as diffusers or kohya save them; "
            "`catversion convert` reads adapters of the paper's authors"
        )
    word = given.strip() or name
    arrays = {}
    for key, tensor in zip(("word", "word_2"), tensors, strict=False):
        shape = tuple(tensor.shape)
        if not 1 <= len(shape) <= 2 or not 1 <= int(np.prod(shape[:-1])) <= MOST_VECTORS or not 0 < shape[-1] <= 2**16:
            raise UserError(
                f"{path}: an embedding of shape {list(shape)}; expected [n, channels], n up to {MOST_VECTORS}"
            )
        arrays[key] = np.asarray(tensor.read(), np.float32).reshape(-1, shape[-1])
        if not np.isfinite(arrays[key]).all():
            raise UserError(f"{path}: holds NaN or infinity; download it again")
    if len({len(array) for array in arrays.values()}) > 1:
        raise UserError(f"{path}: {[len(x) for x in arrays.values()]} vectors; expected as many for each text encoder")
    return word, arrays


def word_and_tensors(contents: Mapping[str, Any], name: str) -> tuple[str, list[Tensor]]:
    """Returns the word of an embedding and its tensors, for each text encoder; none if these are no embedding."""
    listed = contents.get(LISTED_BY)
    if isinstance(listed, Mapping):
        said = contents.get("name")
        return said if isinstance(said, str) and said else name, tensors_of(list(listed.values())[:1])
    by_encoder = [contents[key] for key in SDXL if key in contents]
    if by_encoder:
        return name, tensors_of(by_encoder)
    given = {key: value for key, value in contents.items() if isinstance(value, Tensor)}
    if len(given) != 1:
        return name, []
    ((key, tensor),) = given.items()
    unnamed = key == "emb_params" or key.startswith(LISTED_BY)
    return name if unnamed else key, [tensor]


def tensors_of(values: list[Any]) -> list[Tensor]:
    return values if all(isinstance(value, Tensor) for value in values) else []
