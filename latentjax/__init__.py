"""latentjax: pretraining of language models that think in continuous space before every token."""

__version__ = "0.1.0"

from latentjax.interop.pretrained import load_pretrained

__all__ = ["load_pretrained"]
