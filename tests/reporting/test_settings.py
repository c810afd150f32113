"""Which runs are one setting, what settings are called, and which may be compared."""

import pytest
from made_runs import STEPS, made_config, made_run

from latentjax.errors import UserError
from latentjax.reporting.runs import read_run
from latentjax.reporting.settings import Setting, comparable_groups, group


@pytest.fixture
def make(tmp_path):
    """Makes and reads a run: (method, held-out loss at the end, keywords of `made_run`, knobs) -> RunRecord."""
    count = iter(range(100))

    def made(method: str = "vanilla", loss: float | None = 2.0, run=None, **changes):
        evaluations = {10: 3.0, 20: 2.5, STEPS: loss}
        path = made_run(tmp_path / f"run{next(count)}", made_config(method, **changes), evaluations, **(run or {}))
        return read_run(str(path))

    return made


def test_seeds_and_devices_make_no_setting(make):
    """Nor what a method never reads."""
    runs = [
        make("vanilla", 2.0, train__seed=1, data__seed=1),
        make("latent", 1.8),
        make("vanilla", 2.2, train__seed=2, data__seed=2, mesh__fsdp=2, recurrence__num_jacobi_iterations=9),
        make("latent", 1.9, train__seed=5, checkpoint__every_steps=7, recurrence__num_latent_thoughts=0),
    ]
    vanilla, latent = group(runs)
    assert [run.path for run in vanilla.runs] == [runs[each].path for each in (0, 2, 3)]
    assert (vanilla.label, latent.label) == ("vanilla", "latent, C = 1")
    assert vanilla.loss.mean == pytest.approx((2.0 + 2.2 + 1.9) / 3) and vanilla.loss.n == 3
    assert vanilla.loss.spread == pytest.approx((((0.0333333) ** 2 + 0.1666667**2 + 0.1333333**2) / 2) ** 0.5, rel=1e-4)
    assert latent.loss.spread is None and latent.loss.n == 1 and latent.is_finished and latent.final_step == STEPS


def test_labels_say_what_differs(make):
    """From most of the others; where there is no most, from all."""
    deep = make("vanilla", model__num_layers=4)
    runs = [make("vanilla"), deep, make("latent"), make("latent", recurrence__num_latent_thoughts=2), make("loop")]
    assert [each.label for each in group(runs)] == [
        "vanilla", "vanilla, 4 layers", "latent, C = 1", "latent, C = 2", "loop"
    ]  # fmt: skip
    assert [each.label for each in group([runs[0], deep])] == ["vanilla, 2 layers", "vanilla, 4 layers"]
    rates = [make("vanilla", optimizer__learning_rate=rate) for rate in (1e-2, 3e-3, 1e-4)]
    assert [each.label for each in group(rates)][2] == "vanilla, learning rate 0.0001"
    drawn = [make("latent", recurrence__train_jacobi_iterations=each) for each in ((1, 2), (3,))]
    assert [each.label for each in group(drawn)] == ["latent, C = 1, R from {1, 2}", "latent, C = 1, R from {3}"]


def test_labels_of_the_user(make):
    runs = [make("vanilla"), make("latent")]
    assert [each.label for each in group(runs, ["base", "ours"])] == ["base", "ours"]
    for labels, message in ((["one"], "2 settings: vanilla; latent"), (["a", "a"], "different"), (["a", ""], "empty")):
        with pytest.raises(UserError, match=message):
            group(runs, labels)


def test_unfinished_and_diverged_runs_do_not_count_beside_others(make):
    done, killed = make(loss=2.0), make(run={"until": 25}, train__seed=1)
    broken = make(loss=None, train__seed=2)
    (setting,) = group([done, killed, broken])
    assert setting.counted == (done,) and setting.loss.mean == 2.0
    # Without any that is done: at the last step that all have been evaluated at.
    setting = Setting("x", (killed, make(run={"until": 15}, train__seed=3), broken))
    assert setting.final_step == 10 and setting.loss.mean == 3.0 and setting.loss.n == 2 and not setting.is_finished
    assert Setting("x", (broken,)).loss is None and Setting("x", (broken,)).final_step is None


@pytest.mark.parametrize(
    ("change", "run", "words"),
    [
        ({"data__path": "/other"}, {}, "the corpus"),
        ({"data__eval_fraction": 0.2}, {}, "the held-out split (0.3 of the documents held out / 0.2"),
        ({"data__sequence_length": 32}, {}, "the length of sequences (16 / 32)"),
        ({"data__include": ("*.txt",)}, {}, "what is read of it"),
        ({}, {"fingerprint": "e" * 64}, "the tokenizer (ffffffffffff / eeeeeeeeeeee)"),
    ],
)
def test_what_cannot_be_compared(make, change, run, words):
    settings = group([make("vanilla"), make("latent"), make("vanilla", run=run, **change)])
    groups, warnings = comparable_groups(settings)
    assert [len(each) for each in groups] == [2, 1]
    assert len(warnings) == 1 and words in warnings[0] and "A: vanilla" in warnings[0]


def test_what_can_but_not_quite(make):
    """Other windows of the same text, repeats instead of seeds, other devices: all are said."""
    runs = [make(), make(), make("latent", train__eval_batches=5, run={"devices": "8 x TPU v5p"})]
    groups, warnings = comparable_groups(group(runs))
    assert len(groups) == 1
    assert [any(words in each for each in warnings) for words in ("16 and 40", "same seeds", "TPU v5p")] == [True] * 3
    assert comparable_groups(group([make(), make("latent")]))[1] == []


def test_the_same_eval_sets_make_other_corpora_comparable(make):
    sets = (("held", "/text"),)
    runs = [make(data__eval_sets=sets, data__path=path) for path in ("/a", "/b")]
    groups, warnings = comparable_groups(group(runs))
    assert len(groups) == 1 and not warnings
