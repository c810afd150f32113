"""A model's parameters in the form that decoding on a CPU wants: see SEPARATE in `models/loops.py`."""

from typing import Any

import flax.linen as nn
import jax

_LAYER = "layer_"


def separate_params(params: Any, separate_shapes: Any) -> Any:
    """Cuts stacked layers apart and lays matrices out by output; to be jitted, or traced for its shapes.

    Args:
      params: of a model whose layers are stacked on axis 0.
      separate_shapes: the parameters' shapes of the same model where `ModelSpec.separates`.

    Returns:
      The parameters of that model, in the dtypes of `params`.
    """

    def find(path: tuple, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        leaf, index = params, None
        for name in (entry.key for entry in path):
            if name.startswith(_LAYER):
                name, index = "layers", int(name.removeprefix(_LAYER))
            leaf = leaf[name]
        leaf = leaf if index is None else leaf[index]
        if path[-1].key != "kernel":
            return leaf
        outputs, inputs = wanted.shape
        return leaf.reshape(inputs, outputs).T

    return jax.tree_util.tree_map_with_path(find, nn.meta.unbox(separate_shapes))
