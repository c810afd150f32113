"""The pictures of a report, each drawn once: as SVG for the page, in the page's own colours, and as PNG."""

import dataclasses
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from latentjax.errors import UserError
from latentjax.reporting.numbers import digits, prefix_of, time_unit
from latentjax.reporting.settings import Setting
from latentjax.reporting.statistics import smoothed

# Of Okabe and Ito, told apart by readers of every kind of colour vision; yellow is too faint on white. In the page each
# stands for a CSS variable, --series-N, which is lighter in the dark.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b4598f", "#b07d00", "#2f9fd8", "#4a4f57")
# Six beside seven colours: no two of the first 42 settings have the same colour and the same dashes.
DASHES = ((), (6, 2), (1.4, 1.6), (7, 2, 1.4, 2), (3, 1.6), (9, 2, 3, 2))
MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _MUTED, _GRID = "#1c1f24", "#5c636e", "#dfe2e6"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--grid"} | {
    colour: f"--series-{number}" for number, colour in enumerate(COLOURS)
}
_SIZE = (4.6, 3.1)  # inches: beside another on a desk, alone on a phone, with letters that can be read on both
_MOST_POINTS = 500  # of a line: a page of long runs stays small
_SMOOTHED_OVER = 1 / 40  # of a run's logged points: standard deviation of the weights of the mean
_LOG_FROM = 3.0  # axes on which settings end further apart than this are logarithmic
_SKIPPED = 0.1  # of a run: what is above the losses from there on is cut off


@dataclasses.dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
      name: of its PNG, without the ending.
      title: a few words, above it.
      description: in words, for who cannot see it.
      svg: an element to put into a page, ids unique by `name`; it needs the page's CSS variables.
      png: the bytes of the file, with a legend.
    """

    name: str
    title: str
    description: str
    svg: str
    png: bytes


def check_matplotlib() -> None:
    """Checks that pictures can be drawn.

    Raises:
      UserError: matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("drawing needs matplotlib: pip install 'latentjax[report]' (--json alone does not)") from error


def style_of(place: int) -> dict[str, Any]:
    """Colour, dashes and marker of the setting at a place, for matplotlib."""
    dashes = DASHES[place % len(DASHES)]
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": (0, dashes) if dashes else "solid",
        "marker": MARKERS[place % len(MARKERS)],
    }


@dataclasses.dataclass(frozen=True)
class View:
    """What a loss can be seen against.

    Attributes:
      key: a field of `Curve`.
      title: of the figure; words: the same in a sentence.
      unit: of the axis; divisor: of the values, for that unit.
    """

    key: str
    title: str
    words: str
    unit: str
    divisor: float


def views(settings: Sequence[Setting]) -> list[View]:
    """The four, with units that fit the runs."""
    found = [View("steps", "Steps", "steps", "steps", 1.0)]
    for key, title, axis in (("tokens", "Tokens", "tokens"), ("flops", "Training FLOPs", "training FLOPs")):
        power, prefix = prefix_of(_usual_end(settings, key))
        names = {"k": "thousand ", "M": "million ", "G": "billion ", "T": "trillion "}
        unit = f"{prefix}FLOPs" if key == "flops" else f"{names.get(prefix, prefix)}tokens"
        found.append(View(key, title, axis, unit, power))
    divisor, unit = time_unit(_usual_end(settings, "seconds"))
    return [*found, View("seconds", "Time in training steps", "time in training steps", unit, divisor)]


def loss_figure(settings: Sequence[Setting], view: View, *, held_out: bool) -> Figure:
    """Draws held-out or training loss against one of `views`; each run is a line."""
    kind = "Held-out" if held_out else "Training"
    ends, highest, lowest = [], -np.inf, np.inf
    lines = []
    for place, setting in enumerate(settings):
        for run in setting.runs:
            curve = run.held_out if held_out else run.training
            x_n = getattr(curve, view.key) / view.divisor
            curve = curve.only(np.isfinite(x_n))
            x_n = x_n[np.isfinite(x_n)]
            if not len(curve):
                continue
            y_n = curve.loss if held_out else smoothed(curve.loss, len(curve) * _SMOOTHED_OVER)
            lines.append((place, curve, x_n, y_n))
            ends.append(x_n[-1])
            later_n = y_n[np.isfinite(y_n) & (curve.steps >= _SKIPPED * curve.steps[-1])]
            if len(later_n):
                highest, lowest = max(highest, later_n.max()), min(lowest, later_n.min())

    def draw(axes: Any) -> None:
        for place, curve, x_n, y_n in lines:
            style = style_of(place)
            if held_out:
                marks = list(range(len(x_n) - 1, -1, -max(1, len(x_n) // 8)))  # the last point among them
                axes.plot(x_n, y_n, **style, linewidth=1.5, markersize=3.6, markevery=marks)
                continue
            colour = style["color"]
            axes.plot(*_thinned(x_n, curve.loss), color=colour, linewidth=0.6, alpha=0.22)
            axes.plot(*_thinned(x_n, y_n), color=colour, linestyle=style["linestyle"], linewidth=1.5)
        if np.isfinite(highest) and highest > lowest:
            room = 0.06 * (highest - lowest)
            axes.set_ylim(lowest - room, highest + room)
        axes.xaxis.set_major_formatter("{x:,.10g}")
        if ends and max(ends) > _LOG_FROM * min(ends):
            _log_axis(axes, "x")
            in_sight = [x_n[(x_n > 0) & (y_n <= max(highest, y_n[-1]))] for _, _, x_n, y_n in lines]
            first = min((x_n[0] for x_n in in_sight if len(x_n)), default=min(ends))
            axes.set_xlim(first / 1.12, max(ends) * 1.08)
        axes.set_xlabel(view.unit)
        axes.set_ylabel(f"{kind.lower()} loss (nats per token)")

    described = "; ".join(_described(setting, held_out) for setting in settings)
    return _figure(
        f"{kind.lower().replace('-', '_')}_loss_by_{view.key}",
        view.title,
        f"{kind} loss against {view.words}, in {view.unit}. {described}.",
        draw,
        [(setting.label, style_of(place)) for place, setting in enumerate(settings)],
    )


def pass_figures(settings: Sequence[Setting]) -> list[Figure]:
    """Draws thought residual, distance from exact decoding, and loss, by refinement pass; of runs with diagnostics."""
    measured = [
        (place, setting, run.diagnostics)
        for place, setting in enumerate(settings)
        for run in setting.runs
        if run.diagnostics is not None
    ]
    if not measured:
        return []
    legend = [(label, style_of(place)) for place, label in {place: each.label for place, each, _ in measured}.items()]

    def by_pass(name: str, label: str) -> Callable[[Any], None]:
        def draw(axes: Any) -> None:
            for place, _, found in measured:
                values_n = getattr(found, name)
                shown_n = np.isfinite(values_n) & ((values_n > 0) | (name == "loss"))
                axes.plot(found.iterations[shown_n], values_n[shown_n], **style_of(place), linewidth=1.5, markersize=4)
                if name == "loss" and np.isfinite(found.exact_loss):
                    axes.axhline(found.exact_loss, color=style_of(place)["color"], linewidth=0.8, alpha=0.6)
            if name != "loss":
                _log_axis(axes, "y")
            axes.set_xlabel("refinement passes, R")
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)

        return draw

    def words(name: str) -> str:
        return "; ".join(
            f"{setting.label}: "
            + ", ".join(
                f"{digits(value)} at R = {iterations}"
                for iterations, value in zip(found.iterations, getattr(found, name), strict=True)
                if np.isfinite(value)
            )
            for _, setting, found in measured
        )

    parts = (
        ("residual", "Change of the thoughts", "relative RMS change in the last pass"),
        ("distance", "Distance from exact decoding", "relative RMS distance"),
        ("loss", "Held-out loss by R", "held-out loss (nats per token)"),
    )
    return [
        _figure(f"{name}_by_pass", title, f"{title}. {words(name)}.", by_pass(name, label), legend)
        for name, title, label in parts
    ]


def residual_figure(settings: Sequence[Setting]) -> Figure | None:
    """Draws the thought residual that runs logged at their evaluations; None where none did."""
    logged = [(place, *run.residuals) for place, setting in enumerate(settings) for run in setting.runs]
    logged = [(place, steps_n, residual_n) for place, steps_n, residual_n in logged if (residual_n > 0).any()]
    if not logged:
        return None

    def draw(axes: Any) -> None:
        for place, steps_n, residual_n in logged:
            marks = list(range(len(steps_n) - 1, -1, -max(1, len(steps_n) // 8)))
            axes.plot(steps_n, residual_n, **style_of(place), linewidth=1.5, markersize=3.6, markevery=marks)
        _log_axis(axes, "y")
        axes.set_xlabel("steps")
        axes.set_ylabel("relative RMS change in the last pass")

    words = "; ".join(f"{settings[place].label} ends at {digits(residual_n[-1])}" for place, _, residual_n in logged)
    title = "Change of the thoughts, in training"
    legend = [(settings[place].label, style_of(place)) for place in dict.fromkeys(place for place, *_ in logged)]
    return _figure(
        "residual_by_steps", title, f"Thought residual at evaluations, against steps. {words}.", draw, legend
    )


def _figure(
    name: str, title: str, description: str, draw: Callable[[Any], None], legend: Sequence[tuple[str, dict[str, Any]]]
) -> Figure:
    import matplotlib

    settings = {
        "svg.fonttype": "none", "svg.hashsalt": name, "svg.id": name, "font.size": 8.5, "font.family": "sans-serif",
        "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED, "xtick.color": _MUTED, "ytick.color": _MUTED,
        "axes.titlecolor": _INK, "text.color": _INK, "grid.color": _GRID, "axes.grid": True, "grid.linewidth": 0.7,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.linewidth": 0.7,
        "ytick.major.size": 0, "ytick.minor.size": 0, "axes.axisbelow": True, "path.simplify": True,
    }  # fmt: skip
    known: dict[Any, Any] = {key: value for key, value in settings.items() if key in matplotlib.rcParams}
    with matplotlib.rc_context(known), warnings.catch_warnings(action="ignore"):  # of letters that its font lacks
        svg, png = io.BytesIO(), io.BytesIO()
        _draw(draw, None, "").savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        _draw(draw, legend, title).savefig(png, format="png", dpi=200, facecolor="white")
    return Figure(
        name, title, description, _for_page(svg.getvalue().decode("utf-8"), name, description), png.getvalue()
    )


def _draw(draw: Callable[[Any], None], legend: Sequence[tuple[str, dict[str, Any]]] | None, title: str) -> Any:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.lines import Line2D

    rows = 0 if legend is None else -(-len(legend) // 2)
    canvas = Canvas(figsize=(_SIZE[0], _SIZE[1] + (0.35 if legend else 0) + 0.19 * rows), layout="constrained")
    axes = canvas.add_subplot()
    draw(axes)
    if legend is not None:
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        handles = [Line2D([], [], **style, markersize=4) for _, style in legend]
        labels = [label.replace("$", r"\$") for label, _ in legend]  # no formulas
        canvas.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, handlelength=3, fontsize=8)
    return canvas


def _for_page(svg: str, name: str, description: str) -> str:
    """An SVG as part of a page: no header, no names of other documents, ids of its own, colours of the page."""
    from html import escape

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]*)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]*)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'\b(?:xlink:)?href="#([^"]*)"', rf'href="#{name}-\1"', svg)
    for colour, variable in _VARIABLES.items():
        svg = re.sub(colour, f"var({variable})", svg, flags=re.IGNORECASE)
    width, height = (f"{72 * inches:g}" for inches in _SIZE)  # as matplotlib has them, in points
    body = svg[svg.index(">") + 1 :]
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">{body}'.rstrip()


def _log_axis(axes: Any, which: str) -> None:
    """A logarithmic axis whose ticks are numbers that people read: 0.1, 0.2, 0.5, 1, 2, 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: digits(value, 1)))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _thinned(x_n: np.ndarray, y_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most so many points as can be seen; evenly, which keeps how a curve jitters."""
    keep = np.unique(np.linspace(0, len(x_n) - 1, min(len(x_n), _MOST_POINTS)).round().astype(np.int64))
    return x_n[keep], y_n[keep]


def _usual_end(settings: Sequence[Setting], key: str) -> float:
    """Between the smallest and the largest number that runs end at, on a logarithmic scale: what a unit should fit."""
    values = [getattr(run.training, key) for setting in settings for run in setting.runs]
    ends = [known_n[-1] for values_n in values if len(known_n := values_n[np.isfinite(values_n) & (values_n > 0)])]
    return float(np.sqrt(min(ends) * max(ends))) if ends else 0.0


def _described(setting: Setting, held_out: bool) -> str:
    """Where the curves of a setting end."""
    curves = [run.held_out if held_out else run.training for run in setting.runs]
    ends = [f"{curve.loss[-1]:.3f}" for curve in curves if len(curve)]
    return f"{setting.label} ends at {' and '.join(ends)}" if ends else f"{setting.label} has no curve"
