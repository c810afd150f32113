"""What a figure means nothing without: machine, versions, model."""

from typing import Any

import jax
from ml_collections import ConfigDict

from latentjax.training.run_directory import package_versions


def circumstances(config: ConfigDict) -> dict[str, Any]:
    """What a figure means nothing without."""
    devices = jax.devices()
    return {
        "platform": devices[0].platform,
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "versions": package_versions(),
        "config": config.to_dict(),
    }


def circumstance_lines(config: ConfigDict) -> list[str]:
    """The same in words."""
    found = circumstances(config)
    model, data = config.model, config.data
    return [
        f"{found['devices']} ({found['platform']}); {', '.join(map(' '.join, found['versions'].items()))}",
        f"{model.architecture}, N={model.num_layers} D={model.hidden_size} V={model.vocab_size} {model.dtype}, "
        f"attention {model.attention}, remat {model.remat}; {data.batch_size} x {data.sequence_length} tokens, "
        f"documents {'masked' if data.mask_documents else 'not masked'}",
    ]
