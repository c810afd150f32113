"""The same training step in PyTorch, on the stock GPT-NeoX model of Hugging Face transformers, to time ours against.

The model is driven through `inputs_embeds`; the latent thoughts are solved for by the same passes as in
`recurrence.latent`, written out again here so that a mistake in one is not a mistake in both.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np

from latentjax.errors import UserError
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec

_METHODS = ("vanilla", "latent")
_ATTENTION = "latentjax_peer"
_IGNORED = -100  # a target that torch's cross-entropy leaves out


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way of running the same step.

    Attributes:
      precision: float32; autocast (float32 weights, cast at every use); bfloat16 (weights kept in bfloat16, with
        float32 masters that the optimizer updates).
      compiled: by torch.compile.
    """

    precision: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.precision}, {'torch.compile' if self.compiled else 'eager'}"


def variants(dtype: str, only: str = "") -> list[Variant]:
    """All ways of running a model of this compute dtype, for the fastest to be picked; or `only` the one named so.

    Raises:
      UserError: there is none of that name.
    """
    precisions = ("float32",) if dtype == "float32" else ("autocast", "bfloat16")
    every = [Variant(precision, compiled) for precision in precisions for compiled in (False, True)]
    chosen = [variant for variant in every if only in ("", str(variant))]
    if not chosen:
        names = ", ".join(repr(str(variant)) for variant in every)
        raise UserError(f"--variant={only!r} does not run model.dtype={dtype}: choose {names}")
    return chosen


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step does, besides the model: the knobs of the same names, and R."""

    num_jacobi_iterations: int
    gradient_accumulation_steps: int
    loss_chunk_tokens: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


def check_peer(spec: ModelSpec, recurrence_spec: RecurrenceSpec) -> None:
    """Checks that there is a peer of this model, and the packages that it needs.

    Raises:
      UserError: another architecture or method; torch or transformers are absent.
    """
    if spec.architecture != "gpt_neox" or recurrence_spec.method not in _METHODS:
        raise UserError(
            f"model.architecture={spec.architecture!r} with recurrence.method={recurrence_spec.method!r} has no peer "
            f"in PyTorch: choose gpt_neox with {' or '.join(_METHODS)}"
        )
    if recurrence_spec.refinement != "full" or recurrence_spec.train_tolerance:
        raise UserError("the peer refines in full passes alone: set recurrence.refinement=full, train_tolerance=0.0")
    absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(f"{' and '.join(absent)} not installed, which the peer needs: pip install 'latentjax[peer]'")


def versions() -> dict[str, str]:
    """{package: version} of what the peer runs on."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


def use_device(platform: str, threads: int) -> str:
    """Names torch's device for a platform of jax, and has torch use so many threads of the CPU.

    Raises:
      UserError: torch does not know the platform, or sees no such device.
    """
    import torch

    torch.set_num_threads(threads)
    if platform == "cpu":
        return "cpu"
    if platform != "gpu" or not torch.cuda.is_available():
        raise UserError(
            f"jax runs on {platform}, where torch {torch.__version__} has no device: install a torch that has, or set "
            "JAX_PLATFORMS=cpu to compare the two on the CPU"
        )
    return "cuda"


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised this because the device's memory did not suffice."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


class TorchPeer:
    """A model with its optimizer, and one training step of it."""

    def __init__(
        self,
        spec: ModelSpec,
        recurrence_spec: RecurrenceSpec,
        tensors: Mapping[str, np.ndarray],
        settings: StepSettings,
        variant: Variant,
        device: str,
    ):
        """Takes the weights over.

        Args:
          tensors: float32, by the names of `interop.names`.
          device: cpu or cuda.
        """
        import torch

        self._settings, self._variant, self._device = settings, variant, device
        latent = recurrence_spec.method == "latent" and recurrence_spec.num_latent_thoughts > 0
        self._num_thoughts = recurrence_spec.num_latent_thoughts if latent else 0
        self._num_passes = self._num_thoughts + settings.num_jacobi_iterations + 1 if latent else 1
        self._free_passes = self._num_passes - recurrence_spec.backprop_passes if recurrence_spec.backprop_passes else 0
        scaled = latent and recurrence_spec.scale_embeddings
        self._embedding_scale = math.sqrt(2.5 * spec.hidden_size) if scaled else 1.0
        self._compute_dtype = torch.float32 if variant.precision == "float32" else torch.bfloat16

        model = _make_model(spec, tensors, self._compute_dtype if variant.precision == "bfloat16" else torch.float32)
        self._model = model.to(device).train()
        _set_remat(self._model, spec.remat)
        compiled = partial(torch.compile, dynamic=False) if variant.compiled else lambda function: function
        self._backbone = compiled(self._model.gpt_neox)
        self._sum_losses = compiled(self._sum_losses_of_chunk)

        self._params = list(self._model.parameters())
        self._masters = self._params
        if variant.precision == "bfloat16":
            self._masters = [param.detach().float() for param in self._params]
        matrices = [param for param in self._masters if param.ndim > 1]
        vectors = [param for param in self._masters if param.ndim == 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(settings.b1, settings.b2),
            eps=settings.eps,
            fused=True,
        )

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Puts a batch, as `data.windows` makes it, onto the device."""
        import torch

        tokens = batch["tokens"].astype(np.int64)
        targets = np.where(batch["loss_weights"] > 0, tokens[:, 1:], _IGNORED)
        positions = batch.get("positions", np.arange(targets.shape[1])[None]).astype(np.int64)
        arrays = {"tokens": np.ascontiguousarray(tokens[:, :-1]), "targets": targets, "positions": positions}
        if "segment_ids" in batch:
            arrays["segment_ids"] = batch["segment_ids"]
        return {name: torch.from_numpy(array).to(self._device) for name, array in arrays.items()}

    def loss_and_gradients(self, batch: dict[str, Any]) -> tuple[float, dict[str, np.ndarray]]:
        """Returns the mean loss in nats and the gradients, float32, by the names that the weights came under."""
        loss = self._backward(batch)
        gradients = {}
        for name, param in self._model.named_parameters():
            gradients[_HEAD if param is self._head() else name] = param.grad.float().cpu().numpy()
        self._drop_gradients()
        return float(loss), gradients

    def step(self, batch: dict[str, Any], learning_rate: float) -> Any:
        """Takes one optimizer step; returns the loss before it, a scalar tensor that may still be being computed."""
        import torch

        loss = self._backward(batch)
        if self._masters is not self._params:
            for master, param in zip(self._masters, self._params):
                master.grad, param.grad = param.grad.float(), None
        if self._settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._masters, self._settings.clip_norm, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        if self._masters is not self._params:
            with torch.no_grad():
                torch._foreach_copy_(self._params, self._masters)
        self._drop_gradients()
        return loss

    def weights(self) -> dict[str, np.ndarray]:
        """The weights, float32, by the names that they came under."""
        names = (name for name, _ in self._model.named_parameters())
        named = zip(names, self._params, self._masters)
        return {
            _HEAD if param is self._head() else name: master.detach().cpu().numpy().copy()
            for name, param, master in named
        }

    def _head(self) -> Any:
        """The head's matrix, or None if it is tied to the embedding."""
        weight = self._model.get_output_embeddings().weight
        return None if weight is self._model.get_input_embeddings().weight else weight

    def _drop_gradients(self) -> None:
        for param in (*self._params, *self._masters):
            param.grad = None

    def _backward(self, batch: dict[str, Any]) -> Any:
        """Adds up the gradients of all microbatches; returns the mean loss, detached."""
        import torch

        weight = (batch["targets"] != _IGNORED).sum().clamp(min=1)
        rows = batch["tokens"].shape[0] // self._settings.gradient_accumulation_steps
        total = torch.zeros((), device=self._device)
        autocast = self._variant.precision == "autocast"
        for start in range(0, batch["tokens"].shape[0], rows):
            # Positions may be one row for all.
            part = {name: x if x.shape[0] == 1 else x[start : start + rows] for name, x in batch.items()}
            with torch.autocast(self._device, torch.bfloat16, enabled=autocast):
                hidden_BTD = self._hidden(part["tokens"], part["positions"], part.get("segment_ids"))
                loss = self._loss_sum(hidden_BTD, part["targets"]) / weight
            loss.backward()
            total += loss.detach()
        return total

    def _hidden(self, tokens_BT: Any, positions_BT: Any, segment_ids_BT: Any) -> Any:
        """What the head reads, (B, T, D)."""
        import torch

        num_thoughts, num_tokens = self._num_thoughts, tokens_BT.shape[1]
        x_BTD = self._model.gpt_neox.embed_in(tokens_BT) * self._embedding_scale
        slots_BTSD, layouts = x_BTD.to(self._compute_dtype)[:, :, None], {}
        x_BT1D = slots_BTSD
        for index in range(self._num_passes):
            slots = slots_BTSD.shape[2]
            if slots not in layouts:  # one mask serves every pass and layer
                layouts[slots] = _layout(positions_BT, segment_ids_BT, slots)
            with torch.set_grad_enabled(index >= self._free_passes):
                h_BSD = self._apply(slots_BTSD.flatten(1, 2), *layouts[slots])
            h_BTSD = h_BSD.to(self._compute_dtype).unflatten(1, (num_tokens, slots))
            if index < self._num_passes - 1:
                # The pass that appends a thought also refines those before it; the last thought's output is no thought.
                slots_BTSD = torch.cat([x_BT1D, h_BTSD[:, :, :num_thoughts]], dim=2)
        return h_BTSD[:, :, num_thoughts]

    def _apply(self, x_BSD: Any, positions_BS: Any, mask: Any) -> Any:
        outputs = self._backbone(inputs_embeds=x_BSD, position_ids=positions_BS, attention_mask=mask, use_cache=False)
        return outputs.last_hidden_state

    def _loss_sum(self, hidden_BTD: Any, targets_BT: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        chunk = self._settings.loss_chunk_tokens
        if not 0 < chunk < targets_BT.shape[1]:
            return self._sum_losses(hidden_BTD, targets_BT)
        chunks = zip(hidden_BTD.split(chunk, 1), targets_BT.split(chunk, 1))
        return sum(checkpoint(self._sum_losses, *each, use_reentrant=False) for each in chunks)

    def _sum_losses_of_chunk(self, hidden_BtD: Any, targets_Bt: Any) -> Any:
        import torch

        logits_BtV = self._model.get_output_embeddings()(hidden_BtD)
        return torch.nn.functional.cross_entropy(
            logits_BtV.flatten(0, 1).float(), targets_Bt.flatten(), ignore_index=_IGNORED, reduction="sum"
        )


_HEAD = "embed_out.weight"  # what names.py calls the head; transformers has changed its name


def _make_model(spec: ModelSpec, tensors: Mapping[str, np.ndarray], dtype: Any) -> Any:
    """A transformers GPTNeoXForCausalLM with these weights, on the CPU."""
    import torch
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    # The stock SDPA attention under a name of its own. Under the stock name, transformers takes position ids that
    # repeat, as those of a token's slots do, for the starts of packed documents, and under torch.compile it writes
    # the causal mask out, which rules the fast kernels out.
    transformers.AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    config = transformers.GPTNeoXConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        intermediate_size=spec.intermediate_size,
        max_position_embeddings=spec.max_position_embeddings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": spec.rope_theta,
            "partial_rotary_factor": spec.rotary_fraction,
        },
        use_parallel_residual=spec.parallel_residual,
        layer_norm_eps=spec.norm_epsilon,
        tie_word_embeddings=spec.tie_embeddings,
        hidden_act="gelu",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cache=False,
        attn_implementation=_ATTENTION,  # pyright: ignore[reportCallIssue]  # of every config, and not in the stubs
    )
    model = cast(Any, transformers.GPTNeoXForCausalLM(config))  # to torch, all of its parts are `Tensor | Module`
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if spec.tie_embeddings:
        head.weight = embedding.weight
    params = {(_HEAD if param is head.weight else name): param for name, param in model.named_parameters()}
    if spec.tie_embeddings:
        params["gpt_neox.embed_in.weight"] = params.pop(_HEAD, embedding.weight)
    if params.keys() != tensors.keys():
        raise ValueError(f"tensors {sorted(params.keys() ^ tensors.keys())} are on one side only")
    with torch.no_grad():
        for name, param in params.items():
            if tuple(param.shape) != tensors[name].shape:
                raise ValueError(f"{name}: {tuple(param.shape)} is not {tensors[name].shape}")
            param.copy_(torch.from_numpy(np.array(tensors[name], np.float32)))
    rotary = model.gpt_neox.rotary_emb
    frequencies = rotary.inv_freq.clone()
    model = model.to(dtype)
    rotary.inv_freq = frequencies  # positions lose their phase in bfloat16
    return model


def _set_remat(model: Any, remat: str) -> None:
    """Has the backward pass recompute what ours recomputes (`models.remat`)."""
    import torch
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    if remat == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False}
    if remat != "keep_layer_inputs":
        matmuls = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
        kwargs["context_fn"] = partial(create_selective_checkpoint_contexts, matmuls)
    enable: Callable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(kwargs)


def _layout(positions_BT: Any, segment_ids_BT: Any, slots: int) -> tuple[Any, Any]:
    """Position ids (B or 1, S) and, with segments, what each slot sees: bool (B, 1, S, S); None: all before it."""
    import torch

    positions_BS = positions_BT.repeat_interleave(slots, dim=1)
    if segment_ids_BT is None:
        return positions_BS, None
    segments_BS = segment_ids_BT.repeat_interleave(slots, dim=1)
    same = segments_BS[:, None, :, None] == segments_BS[:, None, None, :]
    return positions_BS, torch.tril(same)
