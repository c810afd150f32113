"""The page: whole HTML that needs nothing else, with the numbers in it, whatever the runs are called."""

import html.parser
import json
import re
import shlex

import pytest
from made_runs import STEPS, diagnostics, made_config, made_run

from latentjax import config as config_lib
from latentjax.command_line import split_overrides
from latentjax.reporting.recipes import command_of, recipe_names
from latentjax.reporting.results import results_of
from latentjax.reporting.runs import read_run
from latentjax.reporting.settings import group
from latentjax.reporting.writing import write_report

EVIL = '<script>alert("$x^2$ & more")</script>'
_VOID = {"meta", "br", "hr", "col", "path", "use"}


class Reader(html.parser.HTMLParser):
    """Collects what a page holds, and checks that its elements are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.words, self.rows = [], [], [], set(), [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in {"meta"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[name] for name in ("href", "src", "xlink:href", "srcset", "data") if name in found]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "text"):
            self.words.append(data)
            if "tr" in self.open:
                self.rows[-1] += f" {data}"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Results of six runs, among them one with diagnostics and one killed, and the directory of their report."""
    place = tmp_path_factory.mktemp("report")
    runs = []
    for name, method, seed, end in (
        ("vanilla-0", "vanilla", 0, 2.40), ("vanilla-1", "vanilla", 1, 2.44), ("<b>deep", "vanilla", 0, 2.2),
        ("latent 0", "latent", 0, 2.0), ("latent-1", "latent", 1, 2.1),
    ):  # fmt: skip
        config = made_config(
            method,
            train__seed=seed,
            recurrence__train_jacobi_iterations=(2,),
            model__num_layers=4 if "deep" in name else 2,
            checkpoint__directory="/elsewhere",
            train__sample_prompts=("it's", '"""'),
        )
        iterations = dict.fromkeys(range(1, STEPS + 1), 2) if method == "latent" else None
        evaluations = {10: 3.0, 20: 2.7, 30: end + 0.1, STEPS: end}
        path = made_run(place / name, config, evaluations, iterations=iterations)
        if name == "latent 0":
            (path / "diagnostics.json").write_text(json.dumps(diagnostics(2.5, 2.2, 2.0123)))
        runs.append(read_run(str(path)))
    killed = made_run(place / "killed", made_config("loop"), {10: 3.0}, until=15)
    runs.append(read_run(str(killed)))
    results = results_of(group(runs, ["vanilla", EVIL, "latent $x_1", "loop"]), 0.2)
    said = []
    write_report(results, place / "out", said.append)
    return results, place / "out", said


@pytest.fixture(scope="module")
def page(report) -> str:
    return (report[1] / "index.html").read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(page):
    read = Reader(page)
    assert page.startswith("<!doctype html>") and "script" not in read.tags
    assert len(read.ids) == len(set(read.ids)), "ids of figures meet"
    assert read.links and all(link.startswith("#") for link in read.links)
    targets = {link[1:] for link in read.links} | set(re.findall(r"url\(#([^)]*)\)", page))
    assert targets <= set(read.ids)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    for name, tag in (("figure", "svg"), ("table", "thead"), ("nav", "aside")):
        assert {name, tag} <= read.tags
    assert page.count('role="img"') == page.count("<figcaption>") == 8 + 3 + 1


def test_what_comes_from_files_is_escaped(page):
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>deep" not in page
    assert EVIL in "".join(Reader(page).words)


def test_the_numbers_are_on_the_page(report, page):
    results, read = report[0], Reader(page)
    vanilla = next(row for row in read.rows if row.split()[:2] == ["vanilla", "2"])
    spread = 0.02 * 2**0.5
    assert f" 2.420 \N{PLUS-MINUS SIGN}{spread:.3f} " in vanilla
    cost = results.settings[0].runs[0].cost
    assert f" {cost.layer_parameters + cost.table_parameters:,} " in vanilla
    assert f" {cost.cache_bytes:,} " in vanilla
    numbers = [float(word) for word in vanilla.replace(",", "").split() if re.fullmatch(r"[\d.]+", word)]
    for flops in (cost.total_train_flops, cost.decode_flops):
        written = [number * unit for number in numbers for unit in (1e3, 1e6, 1e9)]
        assert any(number == pytest.approx(flops, rel=5e-3) for number in written)
    assert any("loop" in row and "not finished" in row for row in read.rows)
    text = " ".join("".join(read.words).split())
    assert "Not finished" not in text and f"killed: not finished: at step 15 of {STEPS}." in text
    assert "2.0123" in text and "evaluate --checkpoint" in text  # measured, and still to be measured
    assert "sample standard deviation" in text and "spread not known" in text


def test_flops_of_the_table_are_those_of_the_cost(report):
    results = report[0]
    found = results.as_json()
    for row, setting in zip(found["settings"], results.settings, strict=True):
        cost = setting.runs[0].cost
        assert row["decode_flops_per_token"]["mean"] == cost.decode_flops
        assert row["cache_bytes_per_token"]["mean"] == cost.cache_bytes
        if row["finished"]:
            assert row["train_flops"]["mean"] == pytest.approx(cost.total_train_flops, rel=1e-12)
    assert [row["held_out_loss"]["n"] for row in found["settings"]] == [2, 1, 2, 1]
    assert found["settings"][2]["held_out_loss"]["standard_deviation"] == pytest.approx(0.05 * 2**0.5)
    assert found["settings"][3]["step"] == 10 and not found["settings"][3]["finished"]
    json.dumps(found, allow_nan=False)


def test_pictures_lie_beside_it(report):
    pictures = sorted(path.name for path in report[1].glob("*.png"))
    kinds = [f"{kind}_loss_by_{key}.png" for kind in ("held_out", "training")
             for key in ("flops", "seconds", "steps", "tokens")]  # fmt: skip
    assert pictures == sorted([*kinds, "distance_by_pass.png", "loss_by_pass.png", "residual_by_pass.png",
                                "residual_by_steps.png"])  # fmt: skip
    assert all((report[1] / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_recipes_give_the_configs_back(report):
    """Run as the page's command says, all but where checkpoints are kept."""
    results, directory, _ = report
    for setting, name in zip(results.settings, recipe_names(results.settings), strict=True):
        for run in setting.runs:
            words = shlex.split(command_of(run, setting, str(directory / "recipes" / name)))
            assert words[:3] == ["python", "-m", "latentjax.train"]
            rest, overrides = split_overrides(words[3:])
            assert rest[0] == "--config" and rest[2] == "--workdir"
            found = config_lib.load(rest[1], overrides)
            expected = config_lib.flatten(run.config) | {"checkpoint.directory": ""}
            assert config_lib.flatten(found) == expected


def test_a_single_run(tmp_path):
    """There is nothing to read from it, and everything else is there."""
    path = made_run(tmp_path / "run", made_config(), {STEPS: 2.0})
    results = results_of(group([read_run(str(path))]), 0.1)
    write_report(results, tmp_path / "out", lambda line: None)
    text = "".join(Reader((tmp_path / "out" / "index.html").read_text(encoding="utf-8")).words)
    assert "No two settings" in text and "Fewer than two settings" in text and "No run here refines thoughts" in text
