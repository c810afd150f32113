"""Whether a program loops over layers and refinement passes, or has them written out one after another.

A loop is traced and compiled once for all its turns, whatever the depth. On the CPU it also costs time: XLA moves what
a turn keeps for the backward pass in and out of one large array on a single core, and fuses nothing across turns.

Decoding has a third form, for one device whose matrix products follow how matrices lie, the CPU: layers written out,
and each with parameters and cache of its own, matrices by output (`models/separation.py`). A token reads every weight
once, so to cut a layer out of a stack, or to lay it out anew, would cost more than to compute with it.
"""

LOOPS = ("auto", "rolled", "unrolled")
SEPARATE = "separate"

# Deeper models would take too long to compile written out.
_MOST_UNROLLED_LAYERS = 12


def choose_loops(name: str, platform: str, num_layers: int) -> str:
    """Resolves `model.loops`, one of LOOPS, for jax's name of a platform: rolled or unrolled."""
    if name != "auto":
        return name
    return "unrolled" if platform == "cpu" and num_layers <= _MOST_UNROLLED_LAYERS else "rolled"
