"""PonderLM-2 on the shape of Pythia-70m: `pile_1b` (see there for paper, data and what to expect), smaller.

python -m latentjax.train --config configs/pile_70m.py
"""

from ml_collections import ConfigDict
from pile_1b import get_config as pile_1b


def get_config() -> ConfigDict:
    """The recipe."""
    config = pile_1b()
    config.model.num_layers = 6
    config.model.hidden_size = 512
    config.model.num_heads = 8
    config.model.intermediate_size = 2048
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.01
    return config
