"""Name tables: which Hugging Face tensor is which parameter, and how the two are laid out.

One entry per tensor, so that tensors can be read and written one at a time. In names, `{layer}` stands for the index of
a layer; parameters of all layers but the last are stacked on axis 0, so layer i of a tensor is row i of its parameter,
and the last layer has a parameter of its own.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from latentjax.models.spec import ModelSpec

Transform = Callable[[Any, ModelSpec], Any]  # of an array, of numpy or traced by jax


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor.

    Attributes:
      tensor: Hugging Face name.
      parameter: path in the params tree, joined by "/".
      read, write: from the tensor's layout to the parameter's (of one layer), and back.
    """

    tensor: str
    parameter: str
    read: Transform = lambda array, spec: array
    write: Transform = lambda array, spec: array

    def places(self, spec: ModelSpec) -> Iterator[tuple[str, str, int | None]]:
        """Yields, for each tensor of the entry, its name, its parameter and its row there, None: the whole of it."""
        if "{layer}" not in self.tensor:
            yield self.tensor, self.parameter, None
            return
        for layer in range(spec.num_layers - 1):
            yield self.tensor.format(layer=layer), self.parameter, layer
        last = self.parameter.replace("backbone/layers/", "backbone/last_layer/")
        yield self.tensor.format(layer=spec.num_layers - 1), last, None


def _matrix(tensor: str, parameter: str, inputs: str, outputs: str) -> Entry:
    """A torch Linear weight (out, in) to a kernel (inputs..., outputs...); axes are letters D, F, V, H, G, K."""

    def read(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
        return array.T.reshape([_sizes(spec)[axis] for axis in inputs + outputs])

    def write(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
        rows = int(np.prod(array.shape[: len(inputs)]))
        return array.reshape(rows, -1).T

    return Entry(tensor, parameter, read, write)


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {
        "D": spec.hidden_size,
        "F": spec.intermediate_size,
        "V": spec.vocab_size,
        "H": spec.num_heads,
        "G": spec.kv_heads,
        "K": spec.head_dim,
    }


# GPT-NeoX fuses query, key and value with heads outermost, (H, 3, K); ours has (3, H, K).
def _read_fused_kernel(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
    return array.T.reshape(spec.hidden_size, spec.num_heads, 3, spec.head_dim).transpose(0, 2, 1, 3)


def _write_fused_kernel(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
    return array.transpose(0, 2, 1, 3).reshape(spec.hidden_size, -1).T


def _read_fused_bias(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
    return array.reshape(spec.num_heads, 3, spec.head_dim).transpose(1, 0, 2)


def _write_fused_bias(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
    return array.transpose(1, 0, 2).reshape(-1)


_NEOX_LAYER = "gpt_neox.layers.{layer}."
GPT_NEOX = (
    Entry("gpt_neox.embed_in.weight", "embedding/embedding"),
    Entry(_NEOX_LAYER + "input_layernorm.weight", "backbone/layers/input_norm/scale"),
    Entry(_NEOX_LAYER + "input_layernorm.bias", "backbone/layers/input_norm/bias"),
    Entry(
        _NEOX_LAYER + "attention.query_key_value.weight",
        "backbone/layers/query_key_value/kernel",
        _read_fused_kernel,
        _write_fused_kernel,
    ),
    Entry(
        _NEOX_LAYER + "attention.query_key_value.bias",
        "backbone/layers/query_key_value/bias",
        _read_fused_bias,
        _write_fused_bias,
    ),
    _matrix(_NEOX_LAYER + "attention.dense.weight", "backbone/layers/attention_out/kernel", "HK", "D"),
    Entry(_NEOX_LAYER + "attention.dense.bias", "backbone/layers/attention_out/bias"),
    Entry(_NEOX_LAYER + "post_attention_layernorm.weight", "backbone/layers/mlp_norm/scale"),
    Entry(_NEOX_LAYER + "post_attention_layernorm.bias", "backbone/layers/mlp_norm/bias"),
    _matrix(_NEOX_LAYER + "mlp.dense_h_to_4h.weight", "backbone/layers/mlp_in/kernel", "D", "F"),
    Entry(_NEOX_LAYER + "mlp.dense_h_to_4h.bias", "backbone/layers/mlp_in/bias"),
    _matrix(_NEOX_LAYER + "mlp.dense_4h_to_h.weight", "backbone/layers/mlp_out/kernel", "F", "D"),
    Entry(_NEOX_LAYER + "mlp.dense_4h_to_h.bias", "backbone/layers/mlp_out/bias"),
    Entry("gpt_neox.final_layer_norm.weight", "backbone/final_norm/scale"),
    Entry("gpt_neox.final_layer_norm.bias", "backbone/final_norm/bias"),
    _matrix("embed_out.weight", "head/kernel", "D", "V"),
)

_LLAMA_LAYER = "model.layers.{layer}."
LLAMA = (
    Entry("model.embed_tokens.weight", "embedding/embedding"),
    Entry(_LLAMA_LAYER + "input_layernorm.weight", "backbone/layers/input_norm/scale"),
    _matrix(_LLAMA_LAYER + "self_attn.q_proj.weight", "backbone/layers/query/kernel", "D", "HK"),
    _matrix(_LLAMA_LAYER + "self_attn.k_proj.weight", "backbone/layers/key/kernel", "D", "GK"),
    _matrix(_LLAMA_LAYER + "self_attn.v_proj.weight", "backbone/layers/value/kernel", "D", "GK"),
    _matrix(_LLAMA_LAYER + "self_attn.o_proj.weight", "backbone/layers/attention_out/kernel", "HK", "D"),
    Entry(_LLAMA_LAYER + "post_attention_layernorm.weight", "backbone/layers/mlp_norm/scale"),
    _matrix(_LLAMA_LAYER + "mlp.gate_proj.weight", "backbone/layers/mlp_gate/kernel", "D", "F"),
    _matrix(_LLAMA_LAYER + "mlp.up_proj.weight", "backbone/layers/mlp_up/kernel", "D", "F"),
    _matrix(_LLAMA_LAYER + "mlp.down_proj.weight", "backbone/layers/mlp_out/kernel", "F", "D"),
    Entry("model.norm.weight", "backbone/final_norm/scale"),
    _matrix("lm_head.weight", "head/kernel", "D", "V"),
)


def _conv1d(tensor: str, parameter: str, axes: str) -> Entry:
    """GPT-2 keeps its matrices as (in, out), which is how ours lie; `axes` are those of the kernel, 3 among them."""

    def read(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
        return array.reshape([3 if axis == "3" else _sizes(spec)[axis] for axis in axes])

    def write(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
        rows = array.shape[0] * array.shape[1] if axes.startswith("HK") else array.shape[0]
        return array.reshape(rows, -1)

    return Entry(tensor, parameter, read, write)


def _read_bias_of_three(array: np.ndarray, spec: ModelSpec) -> np.ndarray:
    return array.reshape(3, spec.num_heads, spec.head_dim)


_GPT2_LAYER = "transformer.h.{layer}."
GPT2 = (
    Entry("transformer.wte.weight", "embedding/embedding"),
    Entry("transformer.wpe.weight", "backbone/position_embedding/embedding"),
    Entry(_GPT2_LAYER + "ln_1.weight", "backbone/layers/input_norm/scale"),
    Entry(_GPT2_LAYER + "ln_1.bias", "backbone/layers/input_norm/bias"),
    _conv1d(_GPT2_LAYER + "attn.c_attn.weight", "backbone/layers/query_key_value/kernel", "D3HK"),
    Entry(
        _GPT2_LAYER + "attn.c_attn.bias",
        "backbone/layers/query_key_value/bias",
        _read_bias_of_three,
        lambda array, spec: array.reshape(-1),
    ),
    _conv1d(_GPT2_LAYER + "attn.c_proj.weight", "backbone/layers/attention_out/kernel", "HKD"),
    Entry(_GPT2_LAYER + "attn.c_proj.bias", "backbone/layers/attention_out/bias"),
    Entry(_GPT2_LAYER + "ln_2.weight", "backbone/layers/mlp_norm/scale"),
    Entry(_GPT2_LAYER + "ln_2.bias", "backbone/layers/mlp_norm/bias"),
    _conv1d(_GPT2_LAYER + "mlp.c_fc.weight", "backbone/layers/mlp_in/kernel", "DF"),
    Entry(_GPT2_LAYER + "mlp.c_fc.bias", "backbone/layers/mlp_in/bias"),
    _conv1d(_GPT2_LAYER + "mlp.c_proj.weight", "backbone/layers/mlp_out/kernel", "FD"),
    Entry(_GPT2_LAYER + "mlp.c_proj.bias", "backbone/layers/mlp_out/bias"),
    Entry("transformer.ln_f.weight", "backbone/final_norm/scale"),
    Entry("transformer.ln_f.bias", "backbone/final_norm/bias"),
    _matrix("lm_head.weight", "head/kernel", "D", "V"),
)

_HEADS = ("embed_out.weight", "lm_head.weight")
TABLES = {"gpt_neox": GPT_NEOX, "llama": LLAMA, "gpt2": GPT2}


def with_prefix(names: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Returns {name: anything} under the names of the table, which the bare stack's own (as GPT-2's) lack the front of.

    They are taken for such where none begins as the table's do.
    """
    prefix = TABLES[spec.architecture][0].tensor.partition(".")[0] + "."
    if any(name.startswith(prefix) for name in names):
        return dict(names)
    return {name if name in _HEADS else prefix + name: value for name, value in names.items()}


def name_table(spec: ModelSpec) -> tuple[Entry, ...]:
    """The entries of a model's architecture; a tied model has no head of its own."""
    return tuple(
        entry
        for entry in TABLES[spec.architecture]
        if not (spec.tie_embeddings and entry.parameter.startswith("head/"))
    )
