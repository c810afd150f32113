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
