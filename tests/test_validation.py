"""Values that cannot be, each named with what is allowed."""

import pytest

from latentjax.config import default, set_key
from latentjax.errors import UserError
from latentjax.validation import validate


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("data.mixture", "stores/a,stores/b", r"must be pairs, such as \(\(\"path\", weight\),\)"),
        ("data.mixture", '("stores/a", 0.5)', r"data.mixture=\('stores/a', 0.5\) must be pairs"),
        ("data.mixture", '(("stores/a", "0.5"),)', "must be pairs"),
        ("data.mixture", '(("stores/a", True),)', "must be pairs"),
        ("data.mixture", '(("stores/a", 1, 2),)', "must be pairs"),
        ("data.mixture", '(("", 1),)', "must be pairs"),
        ("data.mixture", '(("stores/a", 0.5), ("stores/b", 0))', "the weight of 'stores/b' is 0, .* above 0"),
        ("data.mixture", '(("stores/a", -0.5),)', "above 0"),
        ("data.mixture", '(("stores/a", 1e999),)', "above 0"),
        ("data.eval_sets", '(("web", 1),)', r"must be pairs, such as \(\(\"name\", \"path\"\),\)"),
        ("data.eval_sets", "stores/a", "must be pairs"),
        ("data.eval_sets", '(("a/b", "x"),)', "the name 'a/b' must be made of letters, digits, _ and -"),
        ("data.eval_sets", '(("a", "x"), ("a", "y"))', "the name 'a' stands for two sets"),
        ("data.num_workers", "-1", "data.num_workers=-1"),
        ("data.on_corrupt_block", "ignore", "data.on_corrupt_block='ignore' is not known: choose stop or skip"),
        ("data.device_prefetch", "-1", "data.device_prefetch=-1"),
    ],
)
def test_what_data_is_read(key, text, message):
    config = default()
    validate(config)
    set_key(config, key, text)
    with pytest.raises(UserError, match=message):
        validate(config)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("train.on_bad_numbers", "ignore", "'ignore' is not known: choose rewind or stop or skip"),
        ("train.max_skipped_updates", "0", "train.max_skipped_updates=0 is out of range"),
        ("train.max_rewinds", "0", "train.max_rewinds=0 is out of range"),
        ("train.spike_window", "9", "from 10 to"),
        ("train.spike_threshold", "-1", "train.spike_threshold=-1.0"),
        ("train.log_every_steps", "501", "log_every_steps=501 is more than checkpoint.every_steps=500: when a spike"),
    ],
)
def test_what_bad_numbers_are(key, text, message):
    config = default()
    config.train.spike_threshold = 10.0
    validate(config)
    set_key(config, key, text)
    with pytest.raises(UserError, match=message):
        validate(config)
    config.train.spike_threshold, config.train.log_every_steps = 0.0, 501
    if key == "train.log_every_steps":
        validate(config)


def test_a_mixture_takes_the_place_of_a_path():
    config = default()
    config.data.mixture = (("stores/a", 0.7), ("stores/a", 3))
    config.data.eval_sets = (("web-2_x", "stores/a"), ("W", "stores/a"))
    validate(config)
    config.data.path = "stores/b"
    with pytest.raises(UserError, match=r"data.path='stores/b' and data.mixture are both set"):
        validate(config)


STAGES = "((0.0, 0, (0,)), (0.5, 1, (2, 3)))"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_schedule": "((0.5, 1),)"}, r"must be stages \(share of num_steps, C, \(R, ..\)\), such as"),
        ({"train_schedule": "((0.0, 0, (0,)), (0.5, 2, (2,)))"}, "the C of a stage is 2, .*num_latent_thoughts=1"),
        ({"train_schedule": "((0.0, 1, ()),)"}, r"the values of R of a stage are \(\), "),
        ({"train_schedule": "((0.0, 0, (0, 1)),)"}, r"C = 0 has no thoughts to refine; its values of R must be \(0,\)"),
        ({"train_schedule": "((0.1, 1, (2,)),)"}, "must rise from 0.0, and be below 1.0"),
        ({"train_schedule": "((0.0, 0, (0,)), (0.5, 1, (2,)), (0.5, 1, (3,)))"}, "must rise from 0.0"),
        ({"train_schedule": STAGES, "method": "loop"}, "recurrence.method=loop has no stages, only latent has"),
        ({"handover_ratio": "0.1"}, "no second stage to hand over to"),
        ({"train_schedule": STAGES, "handover_ratio": "0.6"}, "is longer than a stage of .*, which takes 0.5 of"),
        ({"train_tolerance": "0.1"}, "set recurrence.backprop_passes to 1 or more"),
        (
            {"train_tolerance": "0.1", "backprop_passes": "2"},
            r"train_jacobi_iterations must say, .* \(2, 3, 4",
        ),
        (
            {"train_tolerance": "0.1", "backprop_passes": "4", "train_jacobi_iterations": "2"},
            r"at least recurrence.backprop_passes - 1 = 3",
        ),
        (
            {"train_tolerance": "0.1", "backprop_passes": "1", "train_schedule": STAGES},
            r"recurrence.train_schedule must say, in place of \(2, 3\)",
        ),
        ({"train_tolerance": "0.1", "method": "ponder"}, "recurrence.method=ponder has nothing to refine"),
        ({"refinement": "half"}, "'half' is not known: choose full or alternating"),
        ({"refinement": "alternating", "method": "pause"}, "recurrence.method=pause has nothing to refine"),
        ({"refinement": "alternating", "backprop_passes": "1"}, "embeddings learn through the passes before the last"),
    ],
)
def test_what_makes_training_cheaper(changes, message):
    config = default()
    for key, text in changes.items():
        set_key(config, f"recurrence.{key}", text)
    with pytest.raises(UserError, match=message):
        validate(config)


def test_what_makes_training_cheaper_goes_together():
    config = default()
    for key, text in (
        ("train_schedule", "[[0, 0, [0]], [0.25, 1, [0]], [0.75, 1, [6]]]"),
        ("handover_ratio", "0.25"),
        ("train_tolerance", "0.1"),
        ("backprop_passes", "2"),
        ("refinement", "alternating"),
    ):
        set_key(config, f"recurrence.{key}", text)
    with pytest.raises(UserError, match=r"in place of \(0,\)"):  # fewer than gradients flow through
        validate(config)
    set_key(config, "recurrence.train_schedule", "[[0, 0, [0]], [0.25, 1, [1]], [0.75, 1, [6]]]")
    validate(config)
