"""The paper's comparison: one model, and eight things to do with it for every token.

Paper: "Pretraining LLM with Latent Thoughts in Continuous Space", arXiv 2509.23184 (PonderLM-2): LLaMA-1.4B trained
from scratch by each method on the same tokens of the Pile. Its claim is about equal cost in decoding: `latent` ends
lower than `vanilla_2x`, and than the other methods that take a token through as many layers as it does; `latent2` and
`latent3` end lower still.

    python -m latentjax.train --config configs/compare.py:latent
    python -m latentjax.report --cost configs/compare.py:{vanilla,vanilla_2x,latent,latent2,latent3,loop,pause,ponder}

The argument is a method, with a size before it where it is not the paper's 1.4B: `latent`, `410m-latent`, `small-loop`.

| method | every token | layers in decoding |
| --- | --- | --- |
| `vanilla` | once through N layers | N |
| `vanilla_2x` | once through 2 N layers | 2 N |
| `latent`, `latent2`, `latent3` | with 1, 2, 3 latent thoughts | 2 N, 3 N, 4 N |
| `loop` | twice through the same N layers | 2 N |
| `pause` | with a pause token behind it | 2 N |
| `ponder` | read again with the mean embedding of its prediction added | 2 N |

| size | layers, width, MLP, heads | batch | steps | learning rate |
| --- | --- | --- | --- | --- |
| (none) | 24, 2048, 5504, 32: LLaMA-1.4B | 256 x 2048 | 50,000 | 2e-4 |
| `410m` | 24, 1024, 2752, 16: its blocks at the width of Pythia-410M | 256 x 2048 | 50,000 | 3e-4 |
| `small` | 4, 64, 170, 2 | 8 x 128 | 1,000 | 3e-3 |

Alike for all methods of a size: initialisation (what is written to the residual stream starts smaller by sqrt(2 N), and
so in `vanilla_2x`, whose N is twice as large), the order of the data, the optimizer, the decay of the learning rate and
the tokens; R is drawn from {2, 3}, and is 3 in evaluation; weights decay by 0.1. What differs in training is the work:
docs/methods.md has the tables.

Data of the two large sizes: the Pile, tokenised once with GPT-NeoX's tokenizer (the command is in pile_1b.py). The
pause is the last of 50,304 rows, which that tokenizer leaves free.

The small size is for a table that two CPU cores can make: Python's own standard library, byte by byte, as in
quickstart.py; a million tokens in 1,000 steps. Warm-up, peak and decay are the same for all; of 3e-3, 6e-3 and 1.2e-2
the peak is the one that `vanilla` ends lowest with.

None of the large runs has been made with this code, so no loss is promised here.
"""

from ml_collections import ConfigDict
from pile_1b import get_config as pile_1b
from quickstart import get_config as quickstart

from latentjax.errors import UserError

# Method, C or what stands for it, and how many times the layers.
METHODS = {
    "vanilla": ("vanilla", 0, 1),
    "vanilla_2x": ("vanilla", 0, 2),
    "latent": ("latent", 1, 1),
    "latent2": ("latent", 2, 1),
    "latent3": ("latent", 3, 1),
    "loop": ("loop", 1, 1),
    "pause": ("pause", 1, 1),
    "ponder": ("ponder", 1, 1),
}


def get_config(argument: str = "latent") -> ConfigDict:
    """The recipe, for METHOD or SIZE-METHOD."""
    size, _, name = argument.rpartition("-")
    if size not in SIZES or name not in METHODS:
        sizes = " or ".join(f"{each}-" for each in SIZES if each)
        raise UserError(
            f"configs/compare.py takes {', '.join(METHODS)}, alone or with {sizes} before it, not {argument!r}"
        )
    config = SIZES[size]()
    method, number, depth = METHODS[name]
    config.recurrence.method = method
    config.recurrence.num_latent_thoughts = number
    config.recurrence.num_jacobi_iterations = 3
    config.recurrence.train_jacobi_iterations = (2, 3)
    config.recurrence.ponder_chunk_tokens = config.train.loss_chunk_tokens
    config.model.num_layers *= depth
    return config


def _llama_1b() -> ConfigDict:
    config = pile_1b()
    config.model.architecture = "llama"
    config.model.rotary_fraction = 1.0
    config.model.num_layers = 24
    config.model.hidden_size = 2048
    config.model.intermediate_size = 5504
    config.model.num_heads = 32
    config.data.batch_size = 256
    config.optimizer.learning_rate = 2e-4
    config.optimizer.weight_decay = 0.1
    config.train.num_steps = 50_000
    return config


def _llama_410m() -> ConfigDict:
    config = _llama_1b()
    config.model.hidden_size = 1024
    config.model.intermediate_size = 2752
    config.model.num_heads = 16
    config.optimizer.learning_rate = 3e-4
    return config


def _small() -> ConfigDict:
    config = quickstart()
    config.model.vocab_size = 258  # the bytes, an end-of-document token, and the pause
    config.optimizer.learning_rate = 3e-3
    config.train.num_steps = 1000
    config.train.eval_every_steps = 125
    config.train.eval_batches = 32
    config.train.sample_every_steps = 1000
    config.checkpoint.every_steps = 500
    return config


SIZES = {"": _llama_1b, "410m": _llama_410m, "small": _small}
