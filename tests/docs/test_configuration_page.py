"""docs/configuration.md is what its script makes of the source now, and every knob is in it."""

import importlib.util

from pages import DOCS

from latentjax.config import default, flatten

spec = importlib.util.spec_from_file_location("configuration_page", DOCS / "configuration_page.py")
configuration_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(configuration_page)


def test_the_committed_page_is_the_present_one():
    assert configuration_page.PAGE.read_text(encoding="utf-8") == configuration_page.page(), (
        "latentjax/config.py or validation.py has changed: run `python docs/configuration_page.py`"
    )


def test_every_knob_has_a_row():
    text = configuration_page.page()
    for key in flatten(default()):
        assert text.count(f"| `{key}` |") == 1, key


def test_defaults_and_limits_are_those_of_the_source():
    text = configuration_page.page()
    assert "| `optimizer.min_learning_rate_ratio` | `0.1` |" in text
    assert "| 0 to 1 |" in next(line for line in text.splitlines() if "`optimizer.warmup_ratio`" in line)
    assert "| `recurrence.train_jacobi_iterations` | `(2, 3, 4)` |" in text
    assert "`vanilla`, `latent`" in next(line for line in text.splitlines() if "`recurrence.method`" in line)
