"""A tensor in a file: its shape and type are known, its numbers are read when they are asked for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from catversion_jax.utils.errors import UserError


class Tensor(Protocol):
    """What every reader of weights gives for a name."""

    @property
    def path(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray:
        """The numbers, in an array of their own: nothing of the file stays in memory."""


@dataclass(frozen=True)
class FileTensor:
    """Numbers that lie in a file as they are in memory, in C order."""

    path: Path
    offset: int  # bytes from the file's beginning
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        count = math.prod(self.shape)
        numbers = np.fromfile(self.path, self.dtype, count, offset=self.offset)
        if len(numbers) < count:
            raise UserError(f"{self.path}: became shorter while it was read; copy or download it again")
        return numbers.reshape(self.shape)

    def mapped(self) -> np.ndarray:
        """The numbers, read where and when they are used: for what is too large to keep beside others of its kind."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
