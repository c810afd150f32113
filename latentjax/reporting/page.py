"""The page of a report: one HTML file that needs nothing but itself."""

import dataclasses
from collections.abc import Sequence
from importlib import resources

from latentjax import __version__
from latentjax.reporting import recipes, tables
from latentjax.reporting.figures import Figure
from latentjax.reporting.markup import Markup, element, joined
from latentjax.reporting.numbers import decimals_for
from latentjax.reporting.results import Results
from latentjax.reporting.runs import printable


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The figures of a page: losses against the four views, and what there is of thoughts, by pass and by step."""

    held_out: Sequence[Figure]
    training: Sequence[Figure]
    passes: Sequence[Figure]
    residual: Figure | None

    def all(self) -> list[Figure]:
        """Each of them once."""
        return [*self.held_out, *self.training, *self.passes, *([self.residual] if self.residual else [])]


def page(results: Results, pictures: Pictures) -> str:
    """Returns the page; all that comes from runs and flags is escaped."""
    sections = [
        ("results", "Results", _results(results)),
        ("readings", "Readings", _readings(results)),
        ("curves", "Curves", _curves(results, pictures)),
        ("thoughts", "Thoughts", _thoughts(results, pictures)),
        ("runs", "Runs", _runs(results)),
        ("counting", "How it is counted", _counting()),
    ]
    css = resources.files("latentjax.reporting").joinpath("page.css").read_text(encoding="utf-8")
    title = _title(results)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(css)),
    )
    links = [element("a", heading, href=f"#{name}") for name, heading, _ in sections]
    body = element(
        "body",
        element(
            "header",
            element("h1", title),
            element("p", _lead(results), class_="lead"),
            element("nav", links, aria_label="Sections"),
        ),
        element(
            "main",
            _warnings(results),
            [element("section", element("h2", heading), content, id=name) for name, heading, content in sections],
        ),
        element("footer", element("p", f"Made by latentjax {__version__}.")),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _title(results: Results) -> str:
    runs, settings = len(results.runs), len(results.settings)
    return f"{runs} run{'s' * (runs > 1)} in {settings} setting{'s' * (settings > 1)}"


def _lead(results: Results) -> str:
    """What is alike for all runs, as far as it is."""
    configs = [run.config for run in results.runs]

    def alike(form: str, values: Sequence[object]) -> list[str]:
        return [form.format(values[0])] if len(set(values)) == 1 else []

    paths = [" + ".join(path for path, _ in config.data.mixture) or config.data.path for config in configs]
    parts = [
        *alike("{}", [config.model.architecture for config in configs]),
        *alike("width {}", [config.model.hidden_size for config in configs]),
        *alike("{} layers", [config.model.num_layers for config in configs]),
        *alike("sequences of {:,} tokens", [config.data.sequence_length for config in configs]),
        *alike("{:,} sequences a step", [config.data.batch_size for config in configs]),
        *alike("{:,} steps", [config.train.num_steps for config in configs]),
        *alike("text of {}", [printable(path) for path in paths]),
    ]
    return f"The same for all: {', '.join(parts)}." if parts else ""


def _warnings(results: Results) -> Markup | None:
    if not results.warnings:
        return None
    items = [element("li", each) for each in results.warnings]
    return element("aside", element("h2", "Before you compare"), element("ul", items), class_="warnings")


def _results(results: Results) -> Markup:
    note = (
        "Mean \N{PLUS-MINUS SIGN} sample standard deviation over the runs of a setting, which differ in their seeds; "
        "one run has no spread. Held-out numbers are of the last evaluation. Parameters are all, tables included."
    )
    return joined([tables.results_table(results), element("p", note, class_="note")])


def _readings(results: Results) -> Markup:
    losses = [row.estimates[0] for row in results.rows]
    decimals = max(3, decimals_for(each.spread for each in losses if each is not None))
    parts = [element("h3", "At equal cost of decoding")]
    for found in results.equal_inference:
        parts.append(element("p", " ".join(found.sentences(decimals)), class_="reading"))
        parts.append(tables.inference_table(found, results, decimals))
    limit = f"{results.tolerance:.0%}"
    if not results.equal_inference:
        parts.append(
            element("p", f"No two settings that can be compared are within {limit} of one another.", class_="reading")
        )
    parts.append(
        element(
            "p",
            f"Compared are settings whose decoding FLOPs per token are at most {limit} above the cheapest of their "
            "group. The spread of a difference is the root of the sum of both squared standard deviations; it is not "
            "known where a setting has one run, and with two or three it is itself a rough number.",
            class_="note",
        )
    )
    parts.append(element("h3", "At equal training FLOPs"))
    for table in results.equal_training:
        parts += [element("p", sentence, class_="reading") for sentence in table.sentences(decimals)]
        parts.append(tables.training_table(table, results, decimals))
    if results.equal_training:
        parts.append(
            element(
                "p",
                "Held-out loss that a setting had reached by then, on the straight line in log FLOPs between the two "
                "evaluations around it. \N{DAGGER} before the end of its schedule: the learning rate had not decayed, "
                "and a run planned for this budget would most likely have ended lower. The lowest of a column is bold.",
                class_="note",
            )
        )
    else:
        parts.append(element("p", "Fewer than two settings were evaluated on the same text.", class_="reading"))
    return joined(parts)


def _curves(results: Results, pictures: Pictures) -> Markup:
    held_out = (
        "Each line is a run; marks stand at some evaluations. Losses above those after a tenth of a run are cut off."
    )
    training = (
        "Faint: each logged batch. Line: its mean, weighted by a Gaussian of a fortieth of the run's logged steps."
    )
    time = (
        "Time is that in training steps, from the logged tokens per second: starting, compiling, evaluating, sampling "
        "and saving are left out."
    )
    return joined(
        [
            element("h3", "Held-out loss"), _legend(results), _grid(pictures.held_out),
            element("p", held_out, class_="note"),
            element("h3", "Training loss"), _legend(results), _grid(pictures.training),
            element("p", f"{training} {time}", class_="note"),
        ]
    )  # fmt: skip


def _legend(results: Results, *, iterating: bool = False) -> Markup:
    """Which line is which; with `iterating`, of the settings that refine thoughts alone."""
    items = [
        element("li", tables.swatch(place), element("span", setting.label))
        for place, setting in enumerate(results.settings)
        if setting.runs[0].iterates or not iterating
    ]
    return element("ul", items, class_="legend")


def _grid(figures: Sequence[Figure]) -> Markup:
    return element(
        "div",
        [
            element("figure", element("figcaption", figure.title), Markup(figure.svg), class_="plot")
            for figure in figures
        ],
        class_="plots",
    )


def _thoughts(results: Results, pictures: Pictures) -> Markup:
    if not any(run.iterates for run in results.runs):
        return element("p", "No run here refines thoughts.", class_="reading")
    missing = [run for run in results.runs if run.iterates and run.diagnostics is None]
    figures = [*pictures.passes, *([pictures.residual] if pictures.residual else [])]
    parts: list[Markup] = []
    if figures:
        note = (
            "Change is the relative RMS change of the thoughts in the last refinement pass; in training it is that of "
            "evaluations, with their R."
        )
        if pictures.passes:
            note += (
                " Distance is that of what the head reads from exact sequential decoding, likewise. The thin line is "
                "the loss of exact decoding."
            )
        parts += [_legend(results, iterating=True), _grid(figures), element("p", note, class_="note")]
    if pictures.passes:
        parts.append(tables.pass_table(results))
    if missing:
        words = "Not measured by refinement pass yet. Each of these commands does that, and leaves it for this page:"
        parts.append(element("p", words, class_="reading"))
        commands = "\n".join(f"python -m latentjax.evaluate --checkpoint {run.path} --diagnostics" for run in missing)
        parts.append(element("pre", element("code", commands)))
    return joined(parts)


def _runs(results: Results) -> Markup:
    parts = [tables.runs_table(results), element("p", _versions(results), class_="note")]
    parts.append(element("h3", "Making them again"))
    parts.append(
        element(
            "p",
            "The recipes lie beside this page, in recipes/; each holds what differs from the defaults in the config of "
            "its setting. The commands are to be given in the directory of the page.",
            class_="reading",
        )
    )
    names = recipes.recipe_names(results.settings)
    for place, (setting, name) in enumerate(zip(results.settings, names, strict=True)):
        commands = "\n".join(recipes.command_of(run, setting, f"recipes/{name}") for run in setting.runs)
        parts.append(
            element(
                "div",
                element("h4", tables.swatch(place), " ", setting.label),
                element("pre", element("code", commands), tabindex="0"),
                element(
                    "details",
                    element("summary", f"recipes/{name}"),
                    element("pre", element("code", recipes.recipe_text(setting)), tabindex="0"),
                ),
                class_="again",
            )
        )
    return joined(parts)


def _versions(results: Results) -> str:
    """Which packages the runs were made with: once, where it was the same for all."""
    found: dict[str, list[str]] = {}
    for run in results.runs:
        words = ", ".join(f"{name} {version}" for name, version in run.versions.items())
        found.setdefault(words or "versions not known (the run has not ended)", []).append(run.path)
    if len(found) == 1:
        return f"All runs: {next(iter(found))}."
    return " ".join(f"{', '.join(paths)}: {words}." for words, paths in found.items())


_COUNTING = {
    "Settings": (
        "Runs are of one setting if their configs are the same but for data.seed, train.seed and what cannot change "
        "numbers by more than rounding: devices, attention backend, memory, logging, checkpoints. A setting is "
        "called by its method and by where it differs from most of the others."
    ),
    "Runs that count": (
        "Means are over the runs that came to their last step, or over all of them if none did, at the last step at "
        "which all of those were evaluated. Runs whose last numbers are not finite are left out."
    ),
    "Training FLOPs": (
        "Matrix products that the method needs, forward and backward: all passes, causal attention at half, nothing "
        "for recomputation. R is known for each step, so that they are exact for each run; with a tolerance in "
        "place of R it is known at logged steps, and taken for those since the one before. Steps that were done "
        "again after a kill or a rewind count once."
    ),
    "Decoding FLOPs": (
        "Per token with a cache, on average over a sequence of the training's length. Cache: keys and values of a "
        "token in the dtype of the config."
    ),
    "Time": (
        "Time in steps adds up the steps between logged lines, from their tokens per second. Wall time is that of "
        "all starts of a run, with starting, compiling, evaluating and saving, and without the time between starts. "
        "Both are those of the machine that the run was on."
    ),
    "Losses": (
        "Nats per token; perplexity is exp(loss). Bits per byte do not depend on the tokenizer. Nothing here tests "
        "significance: a difference beyond the spread of two or three seeds is a hint, not a proof."
    ),
}


def _counting() -> Markup:
    return element("dl", [[element("dt", term), element("dd", text)] for term, text in _COUNTING.items()])
