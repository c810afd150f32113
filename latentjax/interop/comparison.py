"""Whether transformers computes from a folder what our model computes: the largest difference of the logits."""

import contextlib
import dataclasses
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from latentjax.errors import UserError, brief
from latentjax.recurrence.language_model import LanguageModel

# Of logits, between two ways to compute the same in float32. What we see is some 1e-6 times the largest logit, and a
# mistake in a layer, a mask or a position is more than 0.1.
TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Difference:
    """What a comparison found.

    Attributes:
      largest: the largest difference of a logit, both computed in float32 from the numbers in the folder.
      from_rounding: by how much rounding to these numbers has moved our logits, at most; 0 where nothing was rounded.
      num_tokens: how many tokens' logits were compared.
    """

    largest: float
    from_rounding: float
    num_tokens: int

    @property
    def is_within_tolerance(self) -> bool:
        """False also where a logit is not finite."""
        return self.largest <= TOLERANCE


def check_peer_is_installed() -> None:
    """Raises UserError if there is nothing to compare with."""
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"{' and '.join(absent)} not installed, with which an export is compared: pip install 'latentjax[peer]', "
            "or export unchecked with --no_check"
        )


def our_logits(model: LanguageModel, params: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """Logits (B, T, V) float32 by our model with its own R, a row at a time; no matmul in less than float32."""
    apply = jax.jit(lambda params, row_1T: model.apply({"params": params}, row_1T))
    with jax.default_matmul_precision("highest"):
        return np.concatenate([np.asarray(apply(params, row[None])) for row in tokens_BT])


def round_params(params: Any, dtype: str) -> Any:
    """Rounds float32 parameters to what a dtype holds, in their own place: what was given is there no more."""
    round_leaf = jax.jit(lambda leaf: leaf.astype(jnp.dtype(dtype)).astype(jnp.float32), donate_argnums=0)
    return jax.tree.map(round_leaf, params)


def compare(folder: Path, expected_BTV: np.ndarray, tokens_BT: np.ndarray) -> float:
    """Loads a folder with transformers, on the CPU and in float32, and returns the largest difference of a logit.

    Raises:
      UserError: transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
            )
            model, report = cast(Any, loaded)  # transformers does not say that these are two then
    except Exception as error:  # whatever a library says of a file that it cannot use
        raise UserError(f"transformers cannot load what was exported: {brief(error, 300)}") from error
    amiss = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if amiss:
        raise UserError(f"transformers does not load all that was exported: {brief(sorted(map(str, amiss)))}")
    largest = 0.0
    with torch.inference_mode():
        for row, expected_TV in zip(tokens_BT, expected_BTV, strict=True):
            logits_TV = model.eval()(torch.from_numpy(row[None].astype(np.int64))).logits[0].float().numpy()
            # Not max(): that would lose a NaN.
            largest = float(np.maximum(largest, np.abs(logits_TV - expected_TV).max()))
    return largest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from reporting on stderr what is reported here."""
    from transformers.utils import logging

    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()
