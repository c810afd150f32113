"""The safetensors files of a folder: what is in them, told by their headers, and the tensors one at a time."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from latentjax.errors import UserError, brief, shown
from latentjax.interop.hub import INDEX, WEIGHTS, weight_files

# What safetensors call the dtypes that are read.
DTYPES = ("F32", "F16", "BF16")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a header says of a tensor: its shape, and its dtype by safetensors' name."""

    shape: tuple[int, ...]
    dtype: str


class TensorFolder:
    """All tensors of a folder.

    Attributes:
      kinds: {name: Kind}, with which nothing has been read but headers.
    """

    def __init__(self, folder: Path):
        """Reads the headers.

        Raises:
          UserError: a file is missing or damaged, a tensor is in two of them, or the weights are pickled.
        """
        self._folder = folder
        self._files: dict[str, str] = {}  # of each tensor
        self.kinds: dict[str, Kind] = {}
        for file in weight_files(folder):
            with _opened(folder / file) as content:
                for name in content.offset_keys():
                    if name in self._files:
                        raise UserError(
                            f"{folder}: tensor {shown(name)} is in both {self._files[name]} and {file}: it can mean "
                            "either, so one has to go"
                        )
                    header = content.get_slice(name)
                    self._files[name] = file
                    self.kinds[name] = Kind(tuple(header.get_shape()), str(header.get_dtype()))

    def read(self, names: set[str]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of these names as they are stored, each once, in the order of the files.

        Only the one last yielded is held.

        Raises:
          UserError: a file cannot be read.
        """
        for file in sorted(set(self._files.values())):
            with _opened(self._folder / file) as content:
                for name in content.offset_keys():
                    if name in names:
                        yield name, content.get_tensor(name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Opens a file; what is wrong with it while it is open is a `UserError`."""
    if not path.is_file():
        pickles = sorted(pickle.name for pattern in _PICKLES for pickle in path.parent.glob(pattern))
        reason = "a model folder holds config.json and safetensors"
        if path.name != WEIGHTS:
            reason = f"{INDEX} says that tensors are in it; fetch or copy the folder again, as a whole"
        if pickles:
            reason = (
                f"the weights are in {pickles[0]}, a pickle, and those are not read, since reading one can run any "
                "code: save the model again as safetensors, with transformers' save_pretrained"
            )
        raise UserError(f"{path} is missing: {reason}")
    try:
        # Read and not mapped: pages of a mapped file would stay in this process's memory.
        with safe_open(path, framework="np", backend="pread") as content:
            yield content
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError, OverflowError) as error:
        # All but the first: tensors of a dtype that NumPy has no name for, or of more items than it can count.
        raise UserError(f"{path} is not a whole safetensors file: {brief(error)}") from error
