"""PonderLM-2 on the shape of Pythia-160m: `pile_1b` (see there for paper, data and what to expect), smaller.

python -m latentjax.train --config configs/pile_160m.py
"""

from ml_collections import ConfigDict
from pile_1b import get_config as pile_1b


def get_config() -> ConfigDict:
    """The recipe."""
    config = pile_1b()
    config.model.num_layers = 12
    config.model.hidden_size = 768
    config.model.num_heads = 12
    config.model.intermediate_size = 3072
    config.optimizer.learning_rate = 6e-4
    config.optimizer.weight_decay = 0.01
    return config
