"""The config: every knob named and commented, every mistake named before any device is touched."""

import inspect
import json
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from latentjax.config import default, flatten, from_json, load, set_key, to_json
from latentjax.errors import UserError, shown

RECIPE = """
from latentjax.config import default

def get_config():
    config = default()
    config.model.num_layers = 3
    return config
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes the source of a recipe and returns its path."""

    def write(source, name="recipe.py"):
        path = tmp_path / name
        path.write_text(source)
        return str(path)

    return write


def error_of(function, *args):
    with pytest.raises(UserError) as caught:
        function(*args)
    assert "\n" not in str(caught.value).strip()
    return str(caught.value)


def test_every_knob_has_a_comment():
    """In the source, on the knob's own line; the axes of the mesh and the groups included."""
    source = inspect.getsource(default)
    for key in flatten(default()):
        lines = re.findall(rf"^    {re.escape(key)} = .*$", source, re.MULTILINE)
        assert len(lines) == 1, f"{key} is set on {len(lines)} lines"
        assert re.search(r"  # \S", lines[0]), f"{key} has no comment"


def test_knobs_that_scripts_outside_the_project_rely_on():
    """Renaming one of them breaks somebody's launch script."""
    names = {
        "model": "architecture num_layers hidden_size num_heads num_kv_heads intermediate_size vocab_size "
        "max_position_embeddings tie_embeddings dtype attention remat",
        "recurrence": "method num_latent_thoughts num_jacobi_iterations train_jacobi_iterations backprop_passes",
        "data": "path tokenizer sequence_length batch_size mask_documents seed",
        "optimizer": "learning_rate min_learning_rate_ratio warmup_ratio b1 b2 weight_decay clip_norm",
        "train": "num_steps log_every_steps eval_every_steps sample_every_steps gradient_accumulation_steps seed",
        "checkpoint": "every_steps max_to_keep keep_every_steps",
        "mesh": "replica data fsdp sequence tensor",
    }
    assert {f"{group}.{name}" for group, line in names.items() for name in line.split()} <= flatten(default()).keys()
    assert set(default()) == set(names)


def test_default_is_new_locked_and_type_safe():
    """A change to one does not reach the next; no key can be added, no type changed."""
    config = default()
    config.model.num_layers = 99
    assert default().model.num_layers != 99
    with pytest.raises(AttributeError):
        config.model.num_layer = 3
    with pytest.raises(AttributeError):
        config.extra = 3
    with pytest.raises(TypeError):
        config.model.num_layers = "3"


def test_flatten_is_dotted_and_sorted():
    """Leaves of the groups under their full names."""
    flat = flatten(default())
    assert list(flat) == sorted(flat)
    assert [key for key in flat if key.startswith("mesh.")] == [
        f"mesh.{axis}" for axis in ("data", "fsdp", "replica", "sequence", "tensor")
    ]
    assert flat["recurrence.train_jacobi_iterations"] == (2, 3, 4)
    assert not any(isinstance(value, ConfigDict) for value in flat.values())


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("model.num_layers", "12", 12),
        ("train.num_steps", "1e6", 1_000_000),
        ("mesh.data", "-1", -1),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("optimizer.clip_norm", "2", 2.0),
        ("model.tie_embeddings", "true", True),
        ("model.tie_embeddings", "False", False),
        ("model.architecture", "llama", "llama"),
        ("data.path", "1234", "1234"),
        ("data.path", "", ""),
        ("recurrence.train_jacobi_iterations", "(2, 3)", (2, 3)),
        ("recurrence.train_jacobi_iterations", "[2,3]", (2, 3)),
        ("recurrence.train_jacobi_iterations", "2,3", (2, 3)),
        ("recurrence.train_jacobi_iterations", "4", (4,)),
        ("data.include", "**/*.py,**/*.md", ("**/*.py", "**/*.md")),
        ("data.exclude", "()", ()),
        ("train.sample_prompts", "('Hello, world', 'The')", ("Hello, world", "The")),
        ("data.mixture", '(("a",0.7),("b",0.3))', (("a", 0.7), ("b", 0.3))),
        ("data.mixture", '[["a", 1]]', (("a", 1),)),
        ("data.eval_sets", '("web", "stores/web"),', (("web", "stores/web"),)),
    ],
)
def test_overrides_of_every_type(recipe, key, text, value):
    """Read as the type of the default, equal signs behind the first left alone."""
    config = load(recipe(RECIPE), [f"{key}={text}"])
    read = flatten(config)[key]
    assert read == value and type(read) is type(value)
    assert [k for k, v in flatten(config).items() if v != flatten(load(recipe(RECIPE)))[k]] in ([key], [])


def test_overrides_apply_in_order(recipe):
    """The last one wins, over the recipe too; a value may contain an equal sign."""
    config = load(recipe(RECIPE), ["model.num_layers=5", "model.num_layers=7", "data.path=a=b"])
    assert (config.model.num_layers, config.data.path) == (7, "a=b")
    assert load(recipe(RECIPE)).model.num_layers == 3


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("lerning_rate", "optimizer.learning_rate"),
        ("model.layers", "model.num_layers"),
        ("num_latent_thought", "recurrence.num_latent_thoughts"),
        ("data.sequence_lenght", "data.sequence_length"),
        ("learning_rate", "optimizer.learning_rate"),
    ],
)
def test_unknown_key_names_the_nearest(recipe, key, nearest):
    """With its group, whether or not the mistyped one had it."""
    message = error_of(load, recipe(RECIPE), [f"{key}=1"])
    assert f"{key!r}" in message and f"did you mean {nearest!r}?" in message


def test_unknown_key_like_no_other_names_the_groups():
    """And a group by itself is not a key."""
    assert "the groups are checkpoint, data, mesh, model" in error_of(set_key, default(), "zzzzqqqq", "1")
    assert "unknown config key 'model'" in error_of(set_key, default(), "model", "1")


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("model.num_layers", "six", "a whole number"),
        ("model.num_layers", "6.5", "a whole number"),
        ("model.num_layers", "True", "a whole number"),
        ("model.num_layers", "", "a whole number"),
        ("optimizer.learning_rate", "fast", "a number"),
        ("optimizer.learning_rate", "1" + "0" * 400, "a number"),
        ("model.tie_embeddings", "1", "true or false"),
        ("model.tie_embeddings", "yes", "true or false"),
        ("model.num_layers", "{[]: 1}", "a whole number"),
    ],
)
def test_value_of_another_type(recipe, key, text, wanted):
    """Says what the key takes and what it was given."""
    message = error_of(load, recipe(RECIPE), [f"{key}={text}"])
    assert message == f"config key {key!r} takes {wanted}, not {shown(text)}"


def test_override_without_a_value(recipe):
    """Is not taken as true."""
    assert "--config.model.tie_embeddings=VALUE" in error_of(load, recipe(RECIPE), ["model.tie_embeddings"])


@settings(deadline=None)  # a loaded machine is no failure
@given(st.sampled_from(list(flatten(default()))), st.text() | st.from_regex(r"[-(\[{'\"0-9e.,\]})]{0,12}"))
def test_any_text_is_a_value_or_the_users_error(key, text):
    """Nothing but UserError, and what is taken has the type of the default."""
    config = default()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python remarks on odd literals
        try:
            set_key(config, key, text)
        except UserError:
            return
    assert type(flatten(config)[key]) is type(flatten(default())[key])


@settings(deadline=None)  # a loaded machine is no failure
@given(st.text())
def test_any_text_is_a_key_or_the_users_error(key):
    """Unknown keys of every kind."""
    if key not in flatten(default()):
        with pytest.raises(UserError):
            set_key(default(), key, "1")


def test_recipe_with_an_argument(recipe):
    """Behind a colon; a recipe that takes none says so, and one that needs it too."""
    path = recipe(RECIPE.replace("get_config()", "get_config(size)").replace("= 3", "= int(size)"))
    assert load(f"{path}:8").model.num_layers == 8
    assert "get_config() missing 1 required positional argument: 'size'" in error_of(load, path)
    plain = recipe(RECIPE, "plain.py")
    assert error_of(load, f"{plain}:8") == f"{plain} takes no argument, but was given ':8'"


@pytest.mark.parametrize(
    ("source", "pattern"),
    [
        ("x = 1\ndef get_config(:\n    pass\n", r"recipe\.py:2: "),
        ("x = 1\n\ny = 1 / 0\n", r"recipe\.py:3: ZeroDivisionError: division by zero"),
        (RECIPE.replace("num_layers = 3", "num_layers = 3 / 0"), r"recipe\.py:6: ZeroDivisionError"),
        (RECIPE.replace("num_layers = 3", "num_layer = 3"), r"recipe\.py:6: AttributeError: .*num_layers"),
        (RECIPE.replace("num_layers = 3", "num_layers = 'x'"), r"recipe\.py:6: TypeError: .*"),
        ("import no_such_module\n", r"recipe\.py:1: ModuleNotFoundError: .*no_such_module"),
        ("x = 1\n", r"recipe\.py defines no get_config\(\)"),
        ("def get_config():\n    return {}\n", r"recipe\.py: get_config\(\) must return a config made by"),
    ],
)
def test_mistakes_in_a_recipe_name_file_and_line(recipe, source, pattern):
    """What Python says of it, without the traceback."""
    assert re.search(pattern, error_of(load, recipe(source)))


def test_syntax_error_in_an_imported_module_names_that_module(recipe, monkeypatch, tmp_path):
    """Not a line of the recipe, which is fine."""
    monkeypatch.syspath_prepend(tmp_path)
    recipe("x = 1\n\nbroken(\n", "broken_part_of_a_recipe.py")
    assert "broken_part_of_a_recipe.py:3: " in error_of(load, recipe("import broken_part_of_a_recipe\n"))


def test_missing_recipe():
    """Names the path and an example of one."""
    assert "no recipe at 'configs/none.py'" in error_of(load, "configs/none.py")


def test_json_round_trip():
    """Every value comes back as it was, tuples as tuples."""
    config = default()
    config.recurrence.train_jacobi_iterations = (5,)
    config.optimizer.learning_rate = 0.1 + 0.2
    config.data.path = 'ä\n"quoted"'
    config.data.mixture = (("stores/a", 0.7), ("stores/b", 3))
    again = from_json(to_json(config), "config.json")
    assert flatten(again) == flatten(config)
    assert [type(v) for v in flatten(again).values()] == [type(v) for v in flatten(config).values()]
    assert to_json(config).endswith("}\n")


@pytest.mark.parametrize("text", ["{", "[1]", '{"model": 3}', '{"modell": {"num_layers": 3}}', "null"])
def test_json_that_is_no_config(text):
    """Names its source."""
    assert error_of(from_json, text, "runs/x/config.json").startswith("runs/x/config.json is not a latentjax config: ")


def test_json_without_a_key():
    """Is not filled up with a default that the run was not made with."""
    content = json.loads(to_json(default()))
    del content["optimizer"]["eps"]
    assert "'optimizer.eps' is missing" in error_of(from_json, json.dumps(content), "c.json")


def test_json_with_a_wrong_key_or_type():
    """Of a knob."""
    content = json.loads(to_json(default()))
    content["model"]["num_layers"] = "three"
    assert error_of(from_json, json.dumps(content), "c.json").startswith("c.json is not a latentjax config: ")
    content["model"] = dict(default().model) | {"num_lay": 3}
    assert "num_lay" in error_of(from_json, json.dumps(content), "c.json")


def test_json_with_a_number_that_no_float_holds():
    content = json.loads(to_json(default()))
    content["optimizer"]["b1"] = 10**400
    assert error_of(from_json, json.dumps(content), "c.json").startswith("c.json is not a latentjax config: ")
