"""A tensor in a file: its shape and dtype are known, its values are read on demand."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from catversion_jax.utils.errors import UserError


@runtime_checkable
class Tensor(Protocol):
    """The interface of a tensor in a file, whichever reader opened the file."""

    @property
    def path(self) -> Path: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self) -> np.ndarray:
        """Returns the values in a new array, which keeps nothing else of the file in memory."""


@dataclass(frozen=True)
class FileTensor:
    """A tensor whose values a file holds contiguously, in C order."""

    path: Path
    offset: int  # bytes from the start of the file
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        count = math.prod(self.shape)
        numbers = np.fromfile(self.path, self.dtype, count, offset=self.offset)
        if len(numbers) < count:
            raise UserError(f"{self.path}: became shorter while it was read; copy or download it again")
        return numbers.reshape(self.shape)

    def mapped(self) -> np.ndarray:
        """Returns a memory map of the values, for tensors that do not all fit in memory."""
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
