"""Read safetensors weights: one file, or shards with their index. Nothing is unpickled."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from catversion_jax.errors import UserError

STEMS = ("model", "diffusion_pytorch_model")
"""What transformers and diffusers call their weights."""


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one or several safetensors files by name, each read when it is asked for."""

    def __init__(self, paths: list[Path]):
        self._files = {}
        for path in paths:
            try:
                file = safe_open(path, framework="numpy")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: not a readable safetensors file ({error}); copy or download it again"
                ) from None
            for name in set(file.keys()):
                if name in self._files:
                    raise UserError(f"{path}: tensor {name} is also in another shard; expected each tensor once")
                self._files[name] = file

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_tensors(folder: Path, variant: str | None = None) -> Tensors:
    """The weights in a model's sub-folder: `STEM[.variant].safetensors`, or the shards its `.index.json` lists."""
    suffix = f".{variant}" if variant else ""
    for stem in STEMS:
        single = folder / f"{stem}{suffix}.safetensors"
        index = folder / f"{stem}.safetensors.index{suffix}.json"
        if single.is_file():
            return Tensors([single])
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
            if missing:
                raise UserError(
                    f"{index}: lists shards that are not beside it: {', '.join(missing)}; download them again"
                )
            return Tensors([folder / shard for shard in shards])
    raise UserError(f"{folder}: no weights; expected {' or '.join(f'{stem}{suffix}.safetensors' for stem in STEMS)}")
