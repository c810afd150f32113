"""Draws the pictures of docs/method.md: slots, passes, and how fast thoughts settle, which it measures.

python docs/method_figures.py --run runs/quickstart
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from latentjax import config as config_lib
from latentjax.models.spec import ModelSpec
from latentjax.opening import open_model
from latentjax.recurrence.base import RecurrenceSpec
from latentjax.recurrence.language_model import LanguageModel

DOCS = Path(__file__).parent
# On a panel of their own: readable on light pages and on dark ones.
PANEL, INK, MUTED = "#fbfaf6", "#22262e", "#6a7080"
TOKEN, THOUGHT, EXACT, LINE = "#cfe0f5", "#f7dcb2", "#b9dfb9", "#8a90a0"
CELL = 46


class Drawing:
    """An SVG, element by element."""

    def __init__(self, width: int, height: int, title: str):
        self.elements = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="system-ui, sans-serif" font-size="14" role="img"><title>{title}</title>',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0 L8 4 L0 8 z" fill="{MUTED}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="{PANEL}" stroke="{LINE}" stroke-width="0.5"/>',
        ]

    def text(self, x: float, y: float, words: str, anchor: str = "middle", colour: str = INK, size: int = 14) -> None:
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{words}</text>'
        )

    def note(self, x: float, y: float, words: str, anchor: str = "start") -> None:
        self.text(x, y, words, anchor, MUTED, 12)

    def box(self, x: float, y: float, words: str, fill: str, width: float = CELL - 10, height: float = 28) -> None:
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{LINE}"/>'
        )
        self.text(x + width / 2, y + height / 2 + 5, words)

    def arrow(self, path: str) -> None:
        self.elements.append(
            f'<path d="{path}" fill="none" stroke="{MUTED}" stroke-width="1.4" marker-end="url(#tip)"/>'
        )

    def line(self, points: list[tuple[float, float]], colour: str, dash: str = "") -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"/>'
        )

    def save(self, name: str) -> None:
        (DOCS / name).write_text("\n".join([*self.elements, "</svg>"]) + "\n", encoding="utf-8")


def name_of(slot: int, thoughts: int) -> str:
    token, place = divmod(slot, thoughts + 1)
    if place == 0:
        return f"x{_low(token + 1)}"
    return f"z{_low(token + 1)}" + (_high(place) if thoughts > 1 else "")


def _low(number: int) -> str:
    return chr(0x2080 + number)


def _high(number: int) -> str:
    return {1: "\u00b9", 2: "\u00b2", 3: "\u00b3"}[number]


def slots() -> None:
    """How slots follow each other for C = 0, 1, 2; arrows say what a thought is made of and what predicts."""
    drawing = Drawing(680, 330, "Slots of a vanilla model, and with one and two latent thoughts")
    for row, thoughts in enumerate((0, 1, 2)):
        y, first = 62 + row * 100, 150
        drawing.text(20, y + 12, ("vanilla", "latent, C = 1", "latent, C = 2")[row], anchor="start")
        drawing.note(20, y + 30, f"{thoughts + 1} slot{'s' * (thoughts > 0)} a token")
        tokens = (4, 4, 3)[row]
        width = 490 / (tokens * (thoughts + 1))
        for slot in range(tokens * (thoughts + 1)):
            x, is_token = first + slot * width, slot % (thoughts + 1) == 0
            drawing.box(x, y, name_of(slot, thoughts), TOKEN if is_token else THOUGHT, width=36)
            if slot % (thoughts + 1) < thoughts:  # its hidden state is the next slot's input
                here, there = x + 18, x + width + 18
                drawing.arrow(f"M{here:g} {y - 1} C{here:g} {y - 22} {there:g} {y - 22} {there:g} {y - 2}")
            else:
                drawing.arrow(f"M{x + 18:g} {y + 29} L{x + 18:g} {y + 44}")
                after = slot // (thoughts + 1) + 2
                drawing.note(x + 22, y + 56, f"predicts x{_low(after)}", "middle")
    drawing.note(20, 26, "arrows above: a hidden state becomes the input of the next slot")
    drawing.save("method_slots.svg")


def passes() -> None:
    """Which inputs are exact in each pass, for C = 1: one slot more every time."""
    tokens, rounds = 5, 3
    names = ["growing", *[f"refining {number}" for number in range(1, rounds + 1)], "predicting"]
    drawing = Drawing(680, 92 + 48 * len(names), "Passes of a training forward: one thought, three refinements")
    drawing.text(20, 28, "inputs of each pass, C = 1, R = 3", anchor="start")
    for place, (fill, words) in enumerate([(TOKEN, "token"), (EXACT, "exact thought"), (THOUGHT, "guess")]):
        drawing.box(310 + place * 125, 14, "", fill, width=18, height=18)
        drawing.note(334 + place * 125, 28, words)
    for row, name in enumerate(names):
        y = 56 + row * 48
        drawing.text(20, y + 19, name, anchor="start")
        for slot in range(2 * tokens):
            token, x = slot // 2, 150 + slot * 50
            if slot % 2 == 0:
                drawing.box(x, y, name_of(slot, 1), TOKEN, width=38)
            elif row > 0:  # the growing pass makes the first thoughts
                drawing.box(x, y, name_of(slot, 1), EXACT if token < row else THOUGHT, width=38)
    y = 56 + 48 * len(names) + 12
    drawing.note(150, y, "after the last pass the head reads the outputs at the z slots")
    drawing.save("method_passes.svg")


def residuals(model: LanguageModel, params: Any, tokens_BT: np.ndarray, num_passes: int = 16) -> np.ndarray:
    """The thought residual of every refinement pass, in float32."""
    model = model.clone(spec=dataclasses.replace(model.spec, dtype="float32", attention="xla", loops="rolled"))
    settle = jax.jit(partial(model.apply, num_jacobi_iterations=num_passes, method="hidden"))
    return np.asarray(settle({"params": params}, tokens_BT)[1])


def initialised(recipe: str) -> tuple[LanguageModel, Any]:
    """A recipe's model with random weights."""
    config = config_lib.load(str(DOCS.parent / "configs" / recipe))
    config.model.update(attention="xla", loops="rolled")
    model = LanguageModel(ModelSpec(**config.model), RecurrenceSpec(**config.recurrence))
    variables = nn.meta.unbox(jax.jit(model.init)(jax.random.key(0), np.zeros((1, 1), np.int32)))
    return model, variables["params"]


def settling(run: Path) -> None:
    """Residual by pass, measured: two models as initialised, and a run of the quickstart on a file it has not seen."""
    large, quickstart, trained = initialised("pile_70m.py"), initialised("quickstart.py"), open_model(run)
    read = np.frombuffer((DOCS.parent / "latentjax" / "config.py").read_bytes(), np.uint8)  # a byte is its token
    text = read[: 4 * 128].reshape(4, 128).astype(np.int32)
    curves = {
        "pile_70m, initialised": residuals(*large, np.random.default_rng(0).integers(0, 50254, (2, 128))),
        "quickstart, initialised": residuals(*quickstart, text),
        "quickstart, trained": residuals(trained.model, trained.params, text),
    }
    drawing = Drawing(680, 330, "How the thoughts settle: the relative change in each refinement pass")
    left, top, width, height, decades = 70, 48, 420, 225, 8

    def place(number: int, value: float) -> tuple[float, float]:
        return left + width * (number - 1) / 15, top - height * np.log10(value) / decades

    drawing.text(20, 28, "relative RMS change of the thoughts in a pass", "start")
    for power in range(0, decades + 1, 2):
        drawing.line([place(1, 10.0**-power), place(16, 10.0**-power)], "#dcdcd6")
        drawing.note(left - 10, place(1, 10.0**-power)[1] + 5, f"1e-{power}" if power else "1", "end")
    for number in range(1, 17, 3):
        drawing.note(place(number, 1)[0], top + height + 20, str(number), "middle")
    drawing.note(left + width / 2, top + height + 40, "refinement pass", "middle")
    for row, (label, curve) in enumerate(curves.items()):
        colour = ("#8a5fb0", "#2f6db5", "#c0742a")[row]
        drawing.line([place(number, max(value, 1e-8)) for number, value in enumerate(curve, start=1)], colour)
        drawing.line([(510, 80 + 24 * row), (530, 80 + 24 * row)], colour)
        drawing.note(536, 84 + 24 * row, label)
        ratio = np.exp(np.log(curve[1:5] / curve[:4]).mean())
        print(label, *(f"{value:.2e}" for value in curve), f"| ratio from pass 1 to 5: {ratio:.3f}")
    drawing.save("method_settling.svg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="of configs/quickstart.py")
    flags = parser.parse_args()
    slots()
    passes()
    settling(flags.run)


if __name__ == "__main__":
    main()
