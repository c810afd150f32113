"""PonderLM-2 on the shape of Pythia-410m: `pile_1b` (see there for paper, data and what to expect), smaller.

python -m latentjax.train --config configs/pile_410m.py
"""

from ml_collections import ConfigDict
from pile_1b import get_config as pile_1b


def get_config() -> ConfigDict:
    """The recipe."""
    config = pile_1b()
    config.model.num_layers = 24
    config.model.hidden_size = 1024
    config.model.num_heads = 16
    config.model.intermediate_size = 4096
    config.optimizer.learning_rate = 3e-4
    config.optimizer.weight_decay = 0.1
    return config
