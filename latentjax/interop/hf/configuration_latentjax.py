"""Configurations of language models that compute several slots or passes for every token.

They are transformers' own for the architecture, with the keys of `RecurrenceKeys` beside them in config.json.
"""

from typing import TYPE_CHECKING

from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig

METHODS = ("vanilla", "latent", "pause", "loop", "ponder")


class RecurrenceKeys:
    """The keys of config.json that say what is done for every token.

    Attributes:
      method: one of METHODS.
        vanilla: one pass, as the architecture is.
        latent: C latent thoughts follow every token; a thought is the last hidden state at the slot before it
          (arXiv 2509.23184).
        pause: N pause tokens follow every token (arXiv 2310.02226).
        loop: the stack of layers is run N + 1 times.
        ponder: N times, the embedding that the prediction stands for is added to the input (arXiv 2505.20674).
      num_latent_thoughts: C or N.
      num_jacobi_iterations: R, refinement passes of `latent` where all tokens are computed at once without a cache.
      scale_embeds: whether token embeddings are multiplied by `embedding_scale`; `loop` always does.
      pause_token_id: the token of `pause`.
      prefill_tolerance: with a cache, the thoughts of a prompt are refined until the relative change of them in a pass
        is no larger, in every row; null: until it is lost in the rounding of the dtype.
    """

    if TYPE_CHECKING:  # keys of the architecture
        hidden_size: int
        vocab_size: int

    method = "latent"
    num_latent_thoughts = 1
    num_jacobi_iterations = 3
    scale_embeds = True
    pause_token_id = None
    prefill_tolerance = None

    @property
    def slots_per_token(self) -> int:
        """How many positions of the sequence a token takes."""
        return self.num_latent_thoughts + 1 if self.method in ("latent", "pause") else 1

    @property
    def caches_per_layer(self) -> int:
        """How many passes over the tokens have keys and values of their own."""
        return self.num_latent_thoughts + 1 if self.method in ("loop", "ponder") else 1

    @property
    def embedding_scale(self) -> float:
        """What token embeddings are multiplied by before the first layer."""
        if self.method == "vanilla" or not (self.scale_embeds or self.method == "loop"):
            return 1.0
        return ((2.5 if self.method in ("latent", "loop") else 1.0) * self.hidden_size) ** 0.5

    def check_recurrence(self) -> None:
        """Raises ValueError for a key that means nothing."""
        if self.method not in METHODS:
            raise ValueError(f"config.json: method={self.method!r} is none of {', '.join(METHODS)}")
        for key in ("num_latent_thoughts", "num_jacobi_iterations"):
            value = getattr(self, key)
            if type(value) is not int or value < 0:
                raise ValueError(f"config.json: {key}={value!r} is not a whole number of at least 0")
        pause = self.pause_token_id
        if self.method == "pause" and not (type(pause) is int and 0 <= pause < self.vocab_size):
            raise ValueError(f"config.json: pause_token_id={pause!r} is no token of the {self.vocab_size} there are")


class LatentjaxGPTNeoXConfig(RecurrenceKeys, GPTNeoXConfig):
    """GPT-NeoX."""


class LatentjaxLlamaConfig(RecurrenceKeys, LlamaConfig):
    """LLaMA."""


class LatentjaxGPT2Config(RecurrenceKeys, GPT2Config):
    """GPT-2."""
