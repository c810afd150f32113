"""Language models that compute several slots or passes for every token, on the backbones of transformers.

Shapes: B batch, T tokens, S slots (S = slots_per_token * T), D width, V vocabulary. The slots of a token follow one
another in the sequence, x1 z1 x2 z2 .., and share its position id; the last of them meets the head.

Without a cache, all tokens are computed at once: `latent` by growing passes and R refinement passes, through all of
which gradients flow. With a cache, decoding is exact: new tokens are refined until their thoughts no longer change,
and a single new token is fed slot by slot.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import GenerationMixin, GPT2Model, GPTNeoXModel, LlamaModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gpt2.modeling_gpt2 import GPT2PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXPreTrainedModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_latentjax import LatentjaxGPT2Config, LatentjaxGPTNeoXConfig, LatentjaxLlamaConfig

# What transformers calls a cache, in arguments and outputs: `past_key_values` in its earlier versions.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class TokenCache(Cache):
    """Keys and values of all slots, which counts tokens where `generate` counts them.

    Attributes:
      passes: one DynamicCache, counting slots, for each pass over the tokens that has keys and values of its own.
      slots_per_token: how many slots a token takes in each.
    """

    layer_class_to_replicate = None
    offloading = False

    def __init__(self, num_passes: int, slots_per_token: int):
        self.passes = [DynamicCache() for _ in range(num_passes)]
        self.slots_per_token = slots_per_token

    @property
    def layers(self) -> list:
        """The layers of all passes: what is done to every layer (to reorder, reset, repeat) is done to each."""
        return [layer for each in self.passes for layer in each.layers]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens seen."""
        return self.passes[0].get_seq_length(layer_idx) // self.slots_per_token

    def crop(self, tokens_to_remove: int) -> None:
        """Removes tokens from the end, with all of their slots; the argument means what it means for DynamicCache."""
        for each in self.passes:
            each.crop(tokens_to_remove * self.slots_per_token)


class RecurrentLanguageModel:
    """What the language models of all architectures share; each names its backbone, its final norm and its head."""

    if TYPE_CHECKING:  # of the classes that this is mixed into
        config: Any
        base_model: Any
        get_input_embeddings: Any
        loss_function: Any
        _head_name: str
        _final_norm_name: str

    _supports_sdpa = True
    # These tell packed sequences apart by position ids that repeat, as those of a token's slots do.
    _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = _supports_attention_backend = False

    def get_output_embeddings(self) -> nn.Module:
        """Returns the head."""
        return getattr(self, self._head_name)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replaces the head."""
        setattr(self, self._head_name, new_embeddings)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_jacobi_iterations: int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Computes logits, and the loss where labels are given.

        Args:
          input_ids: (B, T), the tokens that follow those in the cache.
          attention_mask: (B, tokens in the cache + T), 0 for padding, on either side.
          position_ids: (B or 1, T), of tokens; default: counted over the tokens that are not padding.
          cache, past_key_values: what an earlier call returned, under either name.
          inputs_embeds: (B, T, D), rows of the embedding table, not yet scaled, in place of input_ids.
          labels: (B, T), -100 where no loss is taken; they are shifted here.
          use_cache: decode exactly and return a cache; default: if one is given.
          logits_to_keep: compute logits of so many last tokens, or of the tokens of these indices; 0: of all.
          num_jacobi_iterations: R of `latent` without a cache; default: the config's.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not offered: a token has several passes")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = self._token_cache(cache if cache is not None else past_key_values, use_cache)
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions: give one of (batch, tokens)")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        x_BTD = inputs_embeds * self.config.embedding_scale
        slots = _Slots(self.config.slots_per_token, x_BTD, attention_mask, position_ids, cache)
        rounds = self.config.num_jacobi_iterations if num_jacobi_iterations is None else num_jacobi_iterations
        # Not by the truth of the cache: one without any tokens yet is false.
        caches = [None] * self.config.caches_per_layer if cache is None else cache.passes
        h_BTD = getattr(self, f"_apply_{self.config.method}")(x_BTD, slots, caches, rounds)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.get_output_embeddings()(h_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        named_cache: dict[str, Any] = {_CACHE: cache}
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, **named_cache)

    def _token_cache(self, cache: Cache | None, use_cache: bool | None) -> TokenCache | None:
        """The cache to fill: the one given, or a new one in place of the empty one that `generate` makes."""
        if isinstance(cache, TokenCache) or (cache is None and not use_cache):
            return cache
        if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length() or cache.offloading):
            raise ValueError(
                f"a {type(cache).__name__} made elsewhere cannot hold the slots of this model's tokens: leave "
                "cache_implementation out, and hand on the cache that the model returned"
            )
        return TokenCache(self.config.caches_per_layer, self.config.slots_per_token)

    def _run(
        self, x_BSD: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """One pass of the backbone: (B, S, D) to (B, S, D) after the final norm."""
        if mask is None and cache is None:
            # Without any mask, position ids that repeat would be taken for the starts of packed sequences.
            mask = torch.ones(x_BSD.shape[:2], dtype=torch.bool, device=x_BSD.device)
        outputs = self.base_model(
            inputs_embeds=x_BSD,
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=cache is not None,
            **{_CACHE: cache},
        )
        return outputs.last_hidden_state

    def _apply_vanilla(self, x_BTD: torch.Tensor, slots: "_Slots", caches: list, _: int) -> torch.Tensor:
        return self._run(x_BTD, slots.positions(1), slots.mask(1), caches[0])

    def _apply_pause(self, x_BTD: torch.Tensor, slots: "_Slots", caches: list, _: int) -> torch.Tensor:
        num_pauses = self.config.num_latent_thoughts
        pause_D = self.get_input_embeddings().weight[self.config.pause_token_id] * self.config.embedding_scale
        pauses_BTND = pause_D.to(x_BTD.dtype).expand(*x_BTD.shape[:2], num_pauses, -1)
        return self._pass([x_BTD, pauses_BTND], slots, caches[0])[:, :, -1]

    def _apply_loop(self, x_BTD: torch.Tensor, slots: "_Slots", caches: list, _: int) -> torch.Tensor:
        position_ids, mask = slots.positions(1), slots.mask(1)
        for index in range(self.config.num_latent_thoughts + 1):
            with self._stream_before_final_norm() as stream:
                h_BTD = self._run(x_BTD, position_ids, mask, caches[index])
            x_BTD = self._without_position_embeddings(stream[0], position_ids)
        return h_BTD

    def _apply_ponder(self, x_BTD: torch.Tensor, slots: "_Slots", caches: list, _: int) -> torch.Tensor:
        position_ids, mask, table_VD = slots.positions(1), slots.mask(1), self.get_input_embeddings().weight
        for index in range(self.config.num_latent_thoughts):
            h_BTD = self._run(x_BTD, position_ids, mask, caches[index])
            weights_BTV = self.get_output_embeddings()(h_BTD).float().softmax(-1).to(x_BTD.dtype)
            x_BTD = x_BTD + weights_BTV @ (table_VD * self.config.embedding_scale)
        return self._run(x_BTD, position_ids, mask, caches[-1])

    def _apply_latent(self, x_BTD: torch.Tensor, slots: "_Slots", caches: list, rounds: int) -> torch.Tensor:
        num_thoughts, inner = self.config.num_latent_thoughts, caches[0]
        if inner is not None and x_BTD.shape[1] == 1:
            for index in range(1, num_thoughts + 2):
                x_BTD = self._run(x_BTD, slots.positions(1), slots.mask(index), inner)
            return x_BTD
        z_BTCD = x_BTD[:, :, None][:, :, :0]  # none yet
        for _ in range(num_thoughts):
            z_BTCD = self._pass([x_BTD, z_BTCD], slots, inner, keep=False)
        if inner is None:
            for _ in range(rounds):
                z_BTCD = self._pass([x_BTD, z_BTCD], slots, None)[:, :, :num_thoughts]
        else:
            z_BTCD = self._settle(x_BTD, z_BTCD, slots, inner)
        return self._pass([x_BTD, z_BTCD], slots, inner)[:, :, num_thoughts]

    def _settle(self, x_BTD: torch.Tensor, z_BTCD: torch.Tensor, slots: "_Slots", inner: DynamicCache) -> torch.Tensor:
        """Refines the thoughts of the new tokens until they no longer change."""
        num_thoughts, num_tokens = z_BTCD.shape[2], x_BTD.shape[1]
        eps = torch.finfo(z_BTCD.dtype).eps
        tolerance = self.config.prefill_tolerance
        floor, before = (eps if tolerance is None else tolerance), float("inf")
        # Every pass makes at least one thought more exact, whatever the weights are.
        for _ in range(num_thoughts * (num_tokens - 1)):
            new_BTCD = self._pass([x_BTD, z_BTCD], slots, inner, keep=False)[:, :, :num_thoughts]
            change = slots.relative_change(new_BTCD, z_BTCD)
            z_BTCD = new_BTCD
            # What rounding stirs up does not shrink any more.
            if change <= floor or (tolerance is None and before <= change < 32 * eps):
                break
            before = change
        return z_BTCD

    def _pass(
        self, parts: list[torch.Tensor], slots: "_Slots", inner: DynamicCache | None, keep: bool = True
    ) -> torch.Tensor:
        """One pass over tokens (B, T, D) and what follows each (B, T, N, D); returns (B, T, 1 + N, D).

        Args:
          keep: leave the keys and values in the cache.
        """
        x_BTND = torch.cat([parts[0][:, :, None], parts[1]], dim=2)
        count = x_BTND.shape[2]
        x_BSD = x_BTND.flatten(1, 2)
        h_BSD = self._run(x_BSD, slots.positions(count), slots.mask(count), inner)
        if inner is not None and not keep:
            _shorten(inner.layers, x_BSD.shape[1])
        return h_BSD.unflatten(1, (-1, count))

    @contextlib.contextmanager
    def _stream_before_final_norm(self) -> Iterator[list[torch.Tensor]]:
        """Yields a list into which a pass puts what enters the final norm."""
        stream: list[torch.Tensor] = []
        norm = getattr(self.base_model, self._final_norm_name)
        hook = norm.register_forward_pre_hook(lambda _, inputs: stream.append(inputs[0]))
        try:
            yield stream
        finally:
            hook.remove()

    def _without_position_embeddings(self, x_BTD: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Takes away what the backbone will add to its input."""
        return x_BTD


def _shorten(layers: list, count: int) -> None:
    """Takes the last `count` slots out of the layers of a cache."""
    for layer in layers:
        layer.keys = layer.keys[:, :, :-count]
        layer.values = layer.values[:, :, :-count]


class _Slots:
    """Position ids and masks of the slots of new tokens."""

    def __init__(
        self,
        per_token: int,
        x_BTD: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: TokenCache | None,
    ):
        num_tokens = x_BTD.shape[1]
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask is not None and attention_mask.shape[1] != past + num_tokens:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but there are {past} in the cache and "
                f"{num_tokens} new ones"
            )
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        elif position_ids is None:
            position_ids = torch.arange(past, past + num_tokens, device=x_BTD.device)[None]
        self._position_ids = position_ids[:, -num_tokens:]
        self._mask = None if attention_mask is None or attention_mask.all() else attention_mask.bool()
        self._per_token, self._past = per_token, past
        self._is_new = None if self._mask is None else self._mask[:, past:, None, None]

    def positions(self, count: int) -> torch.Tensor:
        """Position ids of `count` slots a token, (B or 1, count * T)."""
        return self._position_ids.repeat_interleave(count, dim=1)

    def mask(self, count: int) -> torch.Tensor | None:
        """Which slots may be seen, those in the cache and `count` of each new token: bool; None: all."""
        if self._mask is None:
            return None
        before, new = self._mask[:, : self._past], self._mask[:, self._past :]
        return torch.cat([before.repeat_interleave(self._per_token, 1), new.repeat_interleave(count, 1)], dim=1)

    def relative_change(self, new_BTCD: torch.Tensor, old_BTCD: torch.Tensor) -> float:
        """The RMS of the change of the thoughts over their RMS, of the row in which it is largest."""
        new, old = new_BTCD.float(), old_BTCD.float()
        if self._is_new is not None:
            new, old = new.masked_fill(~self._is_new, 0), old.masked_fill(~self._is_new, 0)
        squares = [each.square().sum((1, 2, 3)) for each in (new - old, new)]
        return (squares[0] / squares[1].clamp(min=torch.finfo(torch.float32).tiny)).max().sqrt().item()


class LatentjaxGPTNeoXForCausalLM(RecurrentLanguageModel, GPTNeoXPreTrainedModel, GenerationMixin):
    """GPT-NeoX (Pythia)."""

    config: LatentjaxGPTNeoXConfig
    config_class = LatentjaxGPTNeoXConfig
    _tied_weights_keys = {"embed_out.weight": "gpt_neox.embed_in.weight"}  # noqa: RUF012
    _head_name, _final_norm_name = "embed_out", "final_layer_norm"

    def __init__(self, config: LatentjaxGPTNeoXConfig):
        super().__init__(config)
        config.check_recurrence()
        self.gpt_neox = GPTNeoXModel(config)
        self.embed_out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LatentjaxLlamaForCausalLM(RecurrentLanguageModel, LlamaPreTrainedModel, GenerationMixin):
    """LLaMA."""

    config: LatentjaxLlamaConfig
    config_class = LatentjaxLlamaConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _head_name, _final_norm_name = "lm_head", "norm"

    def __init__(self, config: LatentjaxLlamaConfig):
        super().__init__(config)
        config.check_recurrence()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


class LatentjaxGPT2ForCausalLM(RecurrentLanguageModel, GPT2PreTrainedModel, GenerationMixin):
    """GPT-2."""

    config: LatentjaxGPT2Config
    config_class = LatentjaxGPT2Config
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}  # noqa: RUF012
    _head_name, _final_norm_name = "lm_head", "ln_f"

    def __init__(self, config: LatentjaxGPT2Config):
        super().__init__(config)
        config.check_recurrence()
        self.transformer = GPT2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _without_position_embeddings(self, x_BTD: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return x_BTD - self.transformer.wpe(position_ids)
