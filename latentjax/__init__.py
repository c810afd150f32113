"""latentjax: pretraining of language models that think in continuous space before every token."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentjax.opening import load_pretrained

__all__ = ["__version__", "load_pretrained"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: processes that tokenise or read data have no use for jax, which is slow to start.
    if name == "load_pretrained":
        from latentjax.opening import load_pretrained

        return load_pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
