"""Our training step against the same step in another framework, on one device, in one run.

First both must compute the same loss and gradients from the same weights, in float32; only then are they timed, taking
turns. What the other framework is, this room does not know: it is handed in as a `Peer`.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from latentjax.data.progress import Progress
from latentjax.errors import UserError
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.draw import Work
from latentjax.training.mesh import make_mesh, put_batch
from latentjax.training.optimizer import learning_rate_schedule, make_optimizer
from latentjax.training.programs import compile_lowered, lower_train_step, make_model, memory_errors, sharded_tracing
from latentjax.training.state import abstract_state, create_state
from latentjax.training.step import summed_loss
from latentjax.training.step_benchmark import random_batch, time_steps

# Largest relative differences in float32, where sums are made in another order: of the loss, of the global gradient
# norm, and of any one tensor's gradient (the norm of the difference over the norm).
LOSS_TOLERANCE = 1e-4
GRADIENT_NORM_TOLERANCE = 1e-3
GRADIENT_TOLERANCE = 1e-2
_CHECKED_ROWS = 2
_WARM_UP_STEPS = 2  # the first compiles, the second may still tune
_CHOOSING_STEPS = 3

Tensors = Mapping[str, np.ndarray]


class Peer(Protocol):
    """The other framework's model and optimizer."""

    def put_batch(self, batch: Mapping[str, np.ndarray]) -> Any:
        """Puts a batch, as `data.windows` makes it, onto the device."""
        ...

    def loss_and_gradients(self, batch: Any) -> tuple[float, Tensors]:
        """Returns the mean loss in nats and the gradients, under the names of the tensors it was made from."""
        ...

    def step(self, batch: Any, learning_rate: float) -> Any:
        """Takes a step; returns the loss before it, a scalar that `float` waits for."""
        ...


@dataclasses.dataclass(frozen=True)
class PeerMaker:
    """What the peer's room offers, bound to nothing yet.

    Attributes:
      make: (spec, recurrence_spec, tensors, R, variant) to a Peer; spec.dtype is that of the check or of the recipe.
      variants: ways of running the same step in a compute dtype, of which the fastest is taken.
      check_variant: the one whose gradients are compared.
      tensors: (params or gradients, spec) to tensors under the names that `make` takes.
    """

    make: Callable[[ConfigDict, ModelSpec, RecurrenceSpec, Tensors, int, Any], Peer]
    variants: Callable[[str], Sequence[Any]]
    check_variant: Any
    tensors: Callable[[Any, ModelSpec], Tensors]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Losses in nats and gradient norms of both from the same weights, and the worst tensor's gradient."""

    loss: float
    peer_loss: float
    gradient_norm: float
    peer_gradient_norm: float
    worst_tensor: str
    worst_difference: float

    def line(self) -> str:
        """The comparison in words."""
        return (
            f"in float32: loss {self.loss:.6f}, peer {self.peer_loss:.6f}; gradient norm {self.gradient_norm:.6f}, "
            f"peer {self.peer_gradient_norm:.6f}; worst gradient, of {self.worst_tensor}, is "
            f"{self.worst_difference:.1e} off"
        )

    def check(self) -> None:
        """Raises UserError if the two do not compute the same."""
        checks = (
            ("losses", _relative(self.loss, self.peer_loss), LOSS_TOLERANCE),
            ("gradient norms", _relative(self.gradient_norm, self.peer_gradient_norm), GRADIENT_NORM_TOLERANCE),
            (f"gradients of {self.worst_tensor}", self.worst_difference, GRADIENT_TOLERANCE),
        )
        for what, difference, tolerance in checks:
            if not difference <= tolerance:
                raise UserError(
                    f"the peer does not compute the same: the {what} differ by {difference:.1e}, more than "
                    f"{tolerance:.0e} ({self.line()}); nothing was timed"
                )


@dataclasses.dataclass(frozen=True)
class PeerTimes:
    """Both, measured.

    Attributes:
      num_tokens: of a batch.
      seconds, peer_seconds: of a step, the mean of each round.
      variant: how the peer was run, and `variant_seconds`: the best step of every way that was tried, or None.
      loss, peer_loss: of the first step from the same weights, in the recipe's dtype.
    """

    num_tokens: int
    num_jacobi_iterations: int
    seconds: tuple[float, ...]
    peer_seconds: tuple[float, ...]
    variant: str
    variant_seconds: dict[str, float | None]
    loss: float
    peer_loss: float

    @property
    def best_ratio(self) -> float:
        """Our tokens per second in terms of the peer's, in the fastest round of each."""
        return min(self.peer_seconds) / min(self.seconds)

    @property
    def median_ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(peer / ours for ours, peer in zip(self.seconds, self.peer_seconds, strict=True))

    def lines(self) -> list[str]:
        """The comparison as a table."""
        rows = [f"{'':<8} {'tokens/s, best':>15} {'median':>12} {'ms a step, best':>16} {'median':>10}"]
        for name, seconds in (("ours", self.seconds), ("peer", self.peer_seconds)):
            best, median = min(seconds), statistics.median(seconds)
            rows.append(
                f"{name:<8} {self.num_tokens / best:>15,.1f} {self.num_tokens / median:>12,.1f} {1e3 * best:>16,.1f} "
                f"{1e3 * median:>10,.1f}"
            )
        return [*rows, f"{'ratio':<8} {self.best_ratio:>15.3f} {self.median_ratio:>12.3f}"]


def compare(
    config: ConfigDict, maker: PeerMaker, rounds: int, steps: int, progress: Progress
) -> tuple[Agreement, PeerTimes]:
    """Checks the peer against ours, picks its fastest variant, and times the two in turns.

    Args:
      config: validated; R is the first that training draws, or whatever the method needs.
      rounds: how often both have their turn; steps: how many steps a turn has.

    Raises:
      UserError: the mesh has more than one device, the two do not compute the same, no variant of the peer runs, or the
        device memory does not suffice.
    """
    mesh = single_device_mesh(config)
    work = _work(config)
    iterations = work.num_jacobi_iterations
    # The model first: an attention backend that cannot serve here is found before the long check.
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, config.train.num_steps)
    progress.note("checking that both compute the same")
    agreement = check_agreement(config, mesh, maker, iterations)
    progress.note(agreement.line())
    agreement.check()

    batch = random_batch(config, config.data.batch_size)
    tensors = maker.tensors(_params(config, mesh), model.spec)
    progress.note("compiling our step")
    program = compile_lowered(lower_train_step(config, model, mesh, abstract_state(model, optimizer, mesh), work), mesh)

    def make_peer(variant: Any) -> Peer:
        return maker.make(config, model.spec, model.recurrence_spec, tensors, iterations, variant)

    variant, tried = _fastest(maker.variants(model.spec.dtype), make_peer, batch, progress)
    peer = make_peer(variant)
    peer_batch, our_batch = peer.put_batch(batch), put_batch(batch, mesh)
    rate = float(learning_rate_schedule(config.optimizer, config.train.num_steps)(0))
    state = create_state(model, optimizer, mesh, config.train.seed)
    state, metrics = program(state, our_batch)
    loss, peer_loss = float(metrics["loss"]), float(peer.step(peer_batch, rate))
    state, _ = time_steps(program, state, our_batch, _WARM_UP_STEPS)
    time_peer_steps(peer, peer_batch, rate, _WARM_UP_STEPS)

    seconds, peer_seconds = [], []
    for turn in range(rounds):
        state, elapsed = time_steps(program, state, our_batch, steps)
        seconds.append(elapsed / steps)
        peer_seconds.append(time_peer_steps(peer, peer_batch, rate, steps) / steps)
        progress.note(
            f"round {turn + 1} of {rounds}: ours {1e3 * seconds[-1]:,.1f} ms a step, "
            f"peer {1e3 * peer_seconds[-1]:,.1f} ms"
        )
    num_tokens = config.data.batch_size * config.data.sequence_length
    times = (tuple(seconds), tuple(peer_seconds))
    return agreement, PeerTimes(num_tokens, iterations, *times, str(variant), tried, loss, peer_loss)


def check_agreement(config: ConfigDict, mesh: Mesh, maker: PeerMaker, iterations: int) -> Agreement:
    """Computes loss and gradients of a few rows by both, in float32 and by plain attention."""
    config = config.copy_and_resolve_references()
    config.model.update(dtype="float32", attention="xla")
    config.data.batch_size = min(config.data.batch_size, _CHECKED_ROWS)
    config.train.gradient_accumulation_steps = 1
    model, batch = make_model(config, mesh), random_batch(config, config.data.batch_size)
    params, weight = _params(config, mesh), max(float(batch["loss_weights"].sum()), 1.0)

    def mean_loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
        return summed_loss(model, params, batch, iterations, config.train.loss_chunk_tokens)[0] / weight

    # A GPU would round float32 operands of a product to TF32.
    with sharded_tracing(mesh), jax.default_matmul_precision("highest"):
        loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params, put_batch(batch, mesh))
    ours = maker.tensors(jax.device_get(gradients), model.spec)
    tensors = maker.tensors(jax.device_get(params), model.spec)
    del params, gradients
    peer = maker.make(config, model.spec, model.recurrence_spec, tensors, iterations, maker.check_variant)
    peer_loss, theirs = peer.loss_and_gradients(peer.put_batch(batch))
    if ours.keys() != theirs.keys():
        raise ValueError(f"gradients of {sorted(ours.keys() ^ theirs.keys())} are on one side only")
    differences = {name: _norm({0: ours[name] - theirs[name]}) / max(_norm({0: ours[name]}), 1e-30) for name in ours}
    worst = max(differences, key=differences.__getitem__)
    return Agreement(float(loss), peer_loss, _norm(ours), _norm(theirs), worst, differences[worst])


def _work(config: ConfigDict) -> Work:
    """What is measured: the model's own C, and the first R that training draws."""
    return Work(config.recurrence.num_latent_thoughts, config.recurrence.train_jacobi_iterations[0])


def our_step_fits(config: ConfigDict) -> bool:
    """Whether a step of the recipe fits the first device's memory."""
    mesh = single_device_mesh(config)
    model, optimizer = make_model(config, mesh), make_optimizer(config.optimizer, config.train.num_steps)
    try:
        with memory_errors("trying a batch"):
            abstract = abstract_state(model, optimizer, mesh)
            lowered = lower_train_step(config, model, mesh, abstract, _work(config))
            program = compile_lowered(lowered, mesh)
            state = create_state(model, optimizer, mesh, config.train.seed)
            time_steps(program, state, put_batch(random_batch(config, config.data.batch_size), mesh), _WARM_UP_STEPS)
    except UserError as error:
        if isinstance(error.__cause__, jax.errors.JaxRuntimeError):
            return False
        raise
    return True


def peer_step_fits(config: ConfigDict, maker: PeerMaker, is_out_of_memory: Callable[[Exception], bool]) -> bool:
    """Whether the peer's step, in its first variant, fits its device's memory; jax's is not asked for any of it."""
    dtype, config = config.model.dtype, config.copy_and_resolve_references()
    config.model.attention = "xla"  # of a model that is made for its parameters alone
    mesh = single_device_mesh(config)
    model = make_model(config, mesh)
    tensors = maker.tensors(_params(config, mesh), model.spec)
    iterations = config.recurrence.train_jacobi_iterations[0]
    try:
        variant = maker.variants(dtype)[0]
        peer = maker.make(config, model.spec, model.recurrence_spec, tensors, iterations, variant)
        batch = peer.put_batch(random_batch(config, config.data.batch_size))
        time_peer_steps(peer, batch, 0.0, _WARM_UP_STEPS)
    except Exception as error:
        if is_out_of_memory(error):
            return False
        raise
    return True


def largest_that_fits(fits: Callable[[int], bool], limit: int) -> int:
    """Seeks the largest number of 1 .. `limit` that fits, by doubling and then bisecting to one part in sixteen.

    Returns:
      A number that fits, such that one a sixteenth larger (or larger by 1) does not; 0 if 1 does not fit.
    """
    fitting, too_large = 0, limit + 1
    while too_large - fitting > max(1, fitting // 16):
        tried = min(2 * fitting or 1, limit) if too_large > limit else (fitting + too_large) // 2
        if fits(tried):
            fitting = tried
        else:
            too_large = tried
    return fitting


def single_device_mesh(config: ConfigDict) -> Mesh:
    """A mesh of the first device alone."""
    return make_mesh(config, jax.devices()[:1])


def time_peer_steps(peer: Peer, batch: Any, learning_rate: float, steps: int) -> float:
    """Takes steps one after another; returns the seconds that all took."""
    start = time.perf_counter()
    for _ in range(steps):
        loss = peer.step(batch, learning_rate)
    float(loss)
    return time.perf_counter() - start


def _fastest(
    variants: Sequence[Any], make_peer: Callable[[Any], Peer], batch: Tensors, progress: Progress
) -> tuple[Any, dict[str, float | None]]:
    """Tries every variant; returns the fastest and what a step of each took at best, None for one that failed."""
    seconds: dict[str, float | None] = {}
    running: list[tuple[float, Any]] = []
    reason = ""
    for variant in variants:
        try:
            peer = make_peer(variant)
            on_device = peer.put_batch(batch)
            time_peer_steps(peer, on_device, 0.0, _WARM_UP_STEPS)
            best = min(time_peer_steps(peer, on_device, 0.0, 1) for _ in range(_CHOOSING_STEPS))
            progress.note(f"peer, {variant}: {1e3 * best:,.1f} ms a step")
            seconds[str(variant)] = best
            running.append((best, variant))
        except Exception as error:  # a compiler that is absent or fails, memory that does not suffice: not this one
            seconds[str(variant)] = None
            reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            progress.note(f"peer, {variant}: does not run ({reason})")
        peer = on_device = None
        gc.collect()  # before the next one takes its memory
    if not running:
        raise UserError(f"no variant of the peer runs here; the last one: {reason}")
    return min(running, key=lambda each: each[0])[1], seconds


def _params(config: ConfigDict, mesh: Mesh) -> Any:
    """The parameters that training starts from."""
    # Without moments, for which there may be no memory while the peer has its own.
    return create_state(make_model(config, mesh), optax.identity(), mesh, config.train.seed).params


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), 1e-30)


def _norm(tensors: Mapping[Any, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in tensors.values())))
