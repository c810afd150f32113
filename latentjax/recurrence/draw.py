"""What a training step computes: with how many thoughts, and by how many refinement passes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.methods import make_recurrence


class Work(NamedTuple):
    """What one step computes; each that can be drawn is a compiled program of its own.

    Attributes:
      num_latent_thoughts: C, or what stands for it; 0 with a method that has thoughts: as if it were vanilla.
      num_jacobi_iterations: R; 0 where a method has none.
    """

    num_latent_thoughts: int
    num_jacobi_iterations: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of training, steps begin .. end - 1.

    Attributes:
      handover_steps: how many of them, the first, share out among this stage and the one before.
      num_latent_thoughts: C.
      iterations: R is drawn from these.
    """

    begin: int
    end: int
    handover_steps: int
    num_latent_thoughts: int
    iterations: tuple[int, ...]

    def has_taken_over(self, seed: int, step: int) -> bool:
        """Whether a step from `begin` on is of this stage: over the hand-over, ever more of them are, linearly."""
        place = step - self.begin
        return place >= self.handover_steps or _words(seed, step)[1] / 2**64 < (place + 0.5) / self.handover_steps


@dataclasses.dataclass(frozen=True)
class TrainSchedule:
    """The stages of a run, in order; each has at least one step."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, spec: RecurrenceSpec, num_steps: int) -> "TrainSchedule":
        """The stages of `recurrence.train_schedule`, or the one that there is without: all steps draw from the same."""
        recurrence = make_recurrence(spec)
        iterations = spec.train_jacobi_iterations if recurrence.uses_jacobi_iterations else (0,)
        planned = spec.train_schedule or ((0.0, spec.num_latent_thoughts, iterations),)
        begins = [round(share * num_steps) for share, _, _ in planned]
        most = round(spec.handover_ratio * num_steps)
        stages: list[Stage] = []
        for begin, end, (_, thoughts, choices) in zip(begins, [*begins[1:], num_steps], planned, strict=True):
            if begin < end:  # of so few steps, a short stage may have none
                handover = min(most, end - begin) if stages else 0
                stages.append(Stage(begin, end, handover, thoughts, tuple(choices)))
        return cls(tuple(stages))

    @property
    def works(self) -> tuple[Work, ...]:
        """All that can be drawn, each once, in order."""
        return tuple(sorted(self.shares))

    @property
    def description(self) -> str:
        """What can be drawn, in words."""
        if not self.varies_thoughts:
            return "R = " + ", ".join(str(work.num_jacobi_iterations) for work in self.works)
        return ", ".join(f"C = {thoughts} R = {iterations}" for thoughts, iterations in self.works)

    @property
    def varies_thoughts(self) -> bool:
        """Whether C is not the same at all steps."""
        return len({stage.num_latent_thoughts for stage in self.stages}) > 1

    @property
    def shares(self) -> dict[Work, float]:
        """The share of all steps that each is drawn for, on average over seeds."""
        steps: dict[Work, float] = {}
        for number, stage in enumerate(self.stages):
            # Over a hand-over, half of the steps are of either stage.
            lost = stage.handover_steps / 2
            won = self.stages[number + 1].handover_steps / 2 if number + 1 < len(self.stages) else 0.0
            for iterations in stage.iterations:
                work = Work(stage.num_latent_thoughts, iterations)
                share = (stage.end - stage.begin - lost + won) / len(stage.iterations)
                steps[work] = steps.get(work, 0.0) + share
        return {work: count / self.stages[-1].end for work, count in steps.items()}

    def draw(self, seed: int, step: int) -> Work:
        """The work of a step, from 0: a pure function, as `draw_jacobi_iterations` is."""
        number = max(number for number, stage in enumerate(self.stages) if stage.begin <= step)
        stage = self.stages[number]
        if not stage.has_taken_over(seed, step):
            stage = self.stages[number - 1]
        return Work(stage.num_latent_thoughts, draw_jacobi_iterations(stage.iterations, seed, step))


def draw_jacobi_iterations(choices: Sequence[int], seed: int, step: int) -> int:
    """Draws R for a step, uniformly from `choices` (PonderLM-2, section 3.3).

    A pure function of its arguments, made on the host: all hosts agree, and a resumed run draws what it would have
    drawn. `SeedSequence` hashes the same on every platform and NumPy version.
    """
    return int(choices[_words(seed, step)[0] % len(choices)])


def _words(seed: int, step: int) -> tuple[int, int]:
    """Two independent random numbers of 64 bits: for R, and for the stage."""
    first, second = np.random.SeedSequence([seed, step]).generate_state(2, np.uint64)
    return int(first), int(second)
