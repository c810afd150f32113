"""The tables of a report's page: numbers right-aligned to one another, each with digits that mean something."""

from collections.abc import Sequence

from latentjax.reporting.figures import COLOURS, DASHES, MARKERS
from latentjax.reporting.markup import Markup, element, joined
from latentjax.reporting.numbers import decimals_for, digits, duration, prefix_of, scaled, signed, time_unit, written
from latentjax.reporting.readings import EqualInference, EqualTraining, verdict
from latentjax.reporting.results import COLUMNS, Column, Results
from latentjax.reporting.settings import Setting
from latentjax.reporting.statistics import Estimate

_NONE = "\N{EN DASH}"
_PLUS_MINUS = "\N{PLUS-MINUS SIGN}"
_LOSSES = ("held_out_loss", "perplexity", "bits_per_byte")
_TIMES = ("step_seconds", "wall_seconds")
# Outlines of matplotlib's markers around (0, 0), as the figures have them.
_MARKER_PATHS = {
    "o": "M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z",
    "s": "M-2.8,-2.8h5.6v5.6h-5.6z",
    "^": "M0,-3.2L3.2,2.8H-3.2z",
    "D": "M0,-3.6L3.6,0L0,3.6L-3.6,0z",
    "v": "M0,3.2L3.2,-2.8H-3.2z",
    "P": "M-1.1,-3.3h2.2v2.2h2.2v2.2h-2.2v2.2h-2.2v-2.2h-2.2v-2.2h2.2z",
}


def swatch(place: int) -> Markup:
    """A piece of the line that the setting at a place has in the figures."""
    colour = f"var(--series-{place % len(COLOURS)})"
    dashes = " ".join(f"{1.5 * each:g}" for each in DASHES[place % len(DASHES)])
    line = element("path", d="M1,6H33", stroke=colour, stroke_width="2", fill="none", stroke_dasharray=dashes or None)
    marker = element("path", d=_MARKER_PATHS[MARKERS[place % len(MARKERS)]], fill=colour, transform="translate(17,6)")
    return element("svg", line, marker, class_="swatch", viewBox="0 0 34 12", aria_hidden="true")


def scroller(table: Markup, label: str) -> Markup:
    """A box in which a table that is wider than the screen is scrolled, by keyboard too."""
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def results_table(results: Results) -> Markup:
    """The final table: a row for each setting."""
    shown = [_formatted(column, [row.estimates[n] for row in results.rows]) for n, column in enumerate(COLUMNS)]
    heads = [_head(column.heading, unit) for column, (unit, _) in zip(COLUMNS, shown, strict=True)]
    body = []
    for place, row in enumerate(results.rows):
        setting = row.setting
        step = "" if setting.is_finished else "not evaluated" if setting.final_step is None else "not finished"
        note = [element("small", step)] if step else []
        cells = [element("td", cells[place], class_="number") for _, cells in shown]
        count = element("td", str(len(setting.counted)), class_="number")
        body.append(element("tr", _name(place, setting, note), count, *cells))
    head = element("thead", element("tr", element("th", "Setting", scope="col"), _head("Runs", ""), *heads))
    return scroller(element("table", head, element("tbody", body), class_="wide"), "Final results of each setting")


def inference_table(found: EqualInference, results: Results, decimals: int) -> Markup:
    """Settings of about the same decoding cost, the lowest loss first."""
    rows = []
    for each in found.ranked:
        flops = each.setting.runs[0].cost.decode_flops
        trained, gap = _train_flops(each.setting, results), each.over_lowest
        spread = None if gap is None else gap.spread
        rows.append(
            element(
                "tr",
                _name(results.settings.index(each.setting), each.setting),
                element("td", f"{scaled(flops)}FLOPs", class_="number"),
                element("td", f"{flops / found.cheapest:.3f}", class_="number"),
                element("td", _NONE if trained is None else f"{scaled(trained.mean)}FLOPs", class_="number"),
                element("td", _with_spread(each.loss, decimals), class_="number"),
                element("td", str(each.loss.n), class_="number"),
                element("td", _NONE if gap is None else signed(gap.value, decimals), class_="number"),
                element("td", _NONE if spread is None else written(spread, decimals), class_="number"),
                element("td", "lowest" if gap is None else verdict(gap)),
            )
        )
    heads = (
        ("Decoding", "per token"), ("Ratio", "to cheapest"), ("Training", "in all"),
        ("Held-out loss", "nats per token"), ("Runs", ""), ("Above lowest", "nats per token"),
        ("Spread", "of the difference"),
    )  # fmt: skip
    head = element(
        "thead",
        element(
            "tr",
            element("th", "Setting", scope="col"),
            *(_head(*each) for each in heads),
            element("th", "Difference", scope="col"),
        ),
    )
    return scroller(element("table", head, element("tbody", rows)), "Settings of equal decoding cost")


def training_table(found: EqualTraining, results: Results, decimals: int) -> Markup:
    """A column for each budget; the lowest of it stands out, and what is not at the end of its schedule is marked."""
    lowest = []
    for column in range(len(found.budgets)):
        losses = [row[column].loss for row in found.reached]
        means = [loss.mean for loss in losses if loss is not None]
        lowest.append(min(means) if len(means) > 1 else None)
    rows = []
    for setting, row in zip(found.settings, found.reached, strict=True):
        cells = []
        for column, each in enumerate(row):
            if each.loss is None:
                cells.append(element("td", element("small", each.reason), class_="number none"))
                continue
            text = _with_spread(each.loss, decimals, "" if each.is_end else "\N{DAGGER}")
            is_lowest = each.loss.mean == lowest[column]
            cells.append(element("td", text, class_="number best" if is_lowest else "number"))
        rows.append(element("tr", _name(results.settings.index(setting), setting), *cells))
    heads = [_head(f"{scaled(budget)}FLOPs", "") for budget in found.budgets]
    head = element("thead", element("tr", element("th", "Setting", scope="col"), *heads))
    return scroller(element("table", head, element("tbody", rows)), "Held-out loss at equal training FLOPs")


def pass_table(results: Results) -> Markup:
    """What was measured by refinement pass: a row for each run and R."""
    rows = []
    for place, setting in enumerate(results.settings):
        for run in setting.runs:
            if (found := run.diagnostics) is None:
                continue
            for n, iterations in enumerate(found.iterations):
                numbers = [f"{found.loss[n]:.4f}", _small(found.residual[n]), _small(found.distance[n])]
                first = _name(place, setting, [element("small", run.path)]) if n == 0 else element("td")
                cells = [element("td", each, class_="number") for each in (str(iterations), *numbers)]
                rows.append(element("tr", first, *cells))
            exact = [element("td", each, class_="number") for each in ("exact", _small(found.exact_loss, 4), "", "")]
            rows.append(element("tr", element("td"), *exact))
            factors = [found.contraction["residual"], found.contraction["distance"]]
            fitted = [element("td", each, class_="number") for each in ("factor a pass", "", *map(_small, factors))]
            rows.append(element("tr", element("td"), *fitted, class_="last"))
    heads = (
        ("R", "passes"),
        ("Held-out loss", "nats per token"),
        ("Change", "relative RMS"),
        ("Distance", "from exact"),
    )
    head = element("thead", element("tr", element("th", "Setting", scope="col"), *(_head(*each) for each in heads)))
    return scroller(element("table", head, element("tbody", rows)), "Measurements by refinement pass")


def runs_table(results: Results) -> Markup:
    """Every run, with its seeds and where it was made."""
    rows = []
    for place, setting in enumerate(results.settings):
        for run in setting.runs:
            loss = f"{run.held_out.loss[-1]:.4f}" if len(run.held_out) else _NONE
            wall = _NONE if run.wall_seconds is None else duration(run.wall_seconds)
            config = run.config
            cells = [
                str(config.data.seed), str(config.train.seed), f"{run.step:,}", loss, wall,
            ]  # fmt: skip
            rows.append(
                element(
                    "tr",
                    element("th", element("code", run.path), scope="row"),
                    element("td", swatch(place), " ", setting.label, class_="setting"),
                    *(element("td", cell, class_="number") for cell in cells),
                    element("td", run.devices or "not known"),
                )
            )
    heads = (("Data", "seed"), ("Train", "seed"), ("Last step", ""), ("Last held-out", "loss"), ("Wall", "time"))
    head = element(
        "thead",
        element(
            "tr",
            element("th", "Run", scope="col"),
            element("th", "Setting", scope="col"),
            *(_head(*each) for each in heads),
            element("th", "Devices", scope="col"),
        ),
    )
    return scroller(element("table", head, element("tbody", rows)), "All runs")


def _train_flops(setting: Setting, results: Results) -> Estimate | None:
    """As the final table has it."""
    at = [column.key for column in COLUMNS].index("train_flops")
    return results.rows[results.settings.index(setting)].estimates[at]


def _formatted(column: Column, estimates: Sequence[Estimate | None]) -> tuple[str, list[str | Markup]]:
    """The unit of a column, and its cells: all in one unit, so that they can be compared down the page."""
    known = [each for each in estimates if each is not None]
    if column.key in _LOSSES:
        decimals = decimals_for(each.spread for each in known)
        return column.unit, [_with_spread(each, decimals) for each in estimates]
    if column.key in ("parameters", "cache_bytes_per_token"):
        return column.unit, [_NONE if each is None else f"{each.mean:,.0f}" for each in estimates]
    largest = max((each.mean for each in known), default=0.0)
    power, prefix = time_unit(largest) if column.key in _TIMES else prefix_of(largest)
    smallest = min((each.mean / power for each in known), default=1.0)
    # All with as many decimals as the smallest needs for three digits.
    decimals = len(digits(smallest).partition(".")[2])
    unit = (
        f"{prefix}{column.unit}"
        if column.unit
        else {"k": "thousand", "M": "million", "G": "billion"}.get(prefix, prefix)
    )
    return unit, [_NONE if each is None else written(each.mean / power, decimals) for each in estimates]


def _with_spread(found: Estimate | None, decimals: int, mark: str = "") -> Markup:
    """A mean, a mark where there is one, and in a space that is always left for it the spread."""
    if found is None:
        return joined(_NONE)
    mean = written(found.mean, decimals)
    spread = [] if found.spread is None else [f"{_PLUS_MINUS}{written(found.spread, decimals)}"]
    return joined([mean, element("span", " ".join([*spread, *filter(None, [mark])]), class_="spread")])


def _head(heading: str, unit: str) -> Markup:
    return element("th", heading, element("small", unit) if unit else "", scope="col", class_="number")


def _name(place: int, setting: Setting, note: Sequence[str] = ()) -> Markup:
    return element(
        "th", element("span", swatch(place), element("span", setting.label, *note), class_="name"), scope="row"
    )


def _small(value: float, count: int = 3) -> str:
    return digits(value, count) if value == value else _NONE
