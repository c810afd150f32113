"""Every knob, with its default and what it means; loading recipes and overriding them.

A recipe is a Python file whose `get_config()` (or `get_config(arg)`, reached as `recipe.py:arg`) changes what it needs
of `default()`. Keys are dotted: `optimizer.learning_rate`. Limits on values are in `latentjax.validation`.
"""

import ast
import difflib
import inspect
import json
import runpy
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ml_collections import ConfigDict

from latentjax.errors import UserError, brief, shown
from latentjax.recipes import find_recipe, neighbours_importable

ALIASES = {"init_from": "train.init_from"}  # other names of knobs, on the command line
# What messages call the types that values have.
TYPE_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a tuple"}


def default() -> ConfigDict:
    """Returns a new config that names every knob; it is locked (no new keys) and type-safe."""
    config = ConfigDict()

    config.model = model = ConfigDict()
    model.architecture = "gpt_neox"  # the block: gpt_neox, llama or gpt2
    model.num_layers = 6  # N
    model.hidden_size = 512  # D
    model.num_heads = 8  # H; the head dimension is hidden_size / num_heads
    model.num_kv_heads = 0  # heads of keys and values (llama); 0: as many as num_heads
    model.intermediate_size = 2048  # F, width of the MLP
    model.vocab_size = 50304  # V, rows of the embedding and columns of the head; may exceed the tokenizer's
    model.max_position_embeddings = 2048  # longest sequence in tokens; a token's slots share its position
    model.rotary_fraction = 0.25  # share of each head that is rotated (gpt_neox; llama: all, 1.0; gpt2: none, 0.0)
    model.rope_theta = 10000.0  # base of the rotary wavelengths
    model.parallel_residual = True  # gpt_neox: attention and MLP read the same input
    model.norm_epsilon = 1e-5  # added to the variance in every norm
    model.tie_embeddings = False  # the head is the transposed embedding
    model.dtype = "bfloat16"  # of activations and matmuls; parameters, norms, softmax and loss stay in float32
    model.attention = "auto"  # backend: xla, splash (TPU), cudnn or tokamax (GPU); auto: the best that serves
    model.loops = "auto"  # over layers and refinement passes: rolled, unrolled, or auto (models/loops.py)
    model.remat = "none"  # what the backward pass recomputes: a name of latentjax/models/remat.py

    config.recurrence = recurrence = ConfigDict()
    recurrence.method = "latent"  # how the backbone is applied: vanilla, latent, ponder, loop or pause
    recurrence.num_latent_thoughts = 1  # C; or pauses, pondering steps, runs besides the first; 0 is a vanilla model
    recurrence.num_jacobi_iterations = 3  # R in evaluation: refinement passes (latent)
    recurrence.train_jacobi_iterations = (2, 3, 4)  # training draws R from these, uniformly, at every step (latent)
    recurrence.backprop_passes = 0  # gradients flow through this many last passes (latent); 0: through every pass
    recurrence.train_schedule = ()  # (latent) stages: ((share of num_steps from which on, C, (R, ..)), ...); (): one
    recurrence.handover_ratio = 0.0  # share of num_steps in which a stage takes over, ever more steps being of it
    recurrence.train_tolerance = 0.0  # (latent) refine until thoughts change by no more than this; 0.0: R times
    recurrence.refinement = "full"  # (latent) of thoughts in training: full passes, or alternating, slot by slot
    recurrence.scale_embeddings = True  # of latent by sqrt(2.5 D), of pause and ponder by sqrt(D); loop's always are
    recurrence.pause_token_id = -1  # the token that pause inserts; -1: the last of the vocabulary, which no text has
    recurrence.ponder_chunk_tokens = 0  # tokens per sequence whose probabilities ponder holds at once; 0: all

    config.data = data = ConfigDict()
    data.path = ""  # a token store, or a raw corpus (file or directory) that becomes one at first use
    data.mixture = ()  # in place of data.path: (("path", weight), ...), windows of each in proportion to its weight
    data.eval_sets = ()  # what to evaluate on: (("name", "path"), ...); (): what the stores hold out
    data.include = ("**/*.txt", "**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst", "**/*.parquet")  # files of a directory
    data.exclude = ()  # glob patterns of files to leave out again
    data.text_field = "text"  # field of a JSON line, Parquet row or data set example: its text, or list of token ids
    data.packed_rows = False  # rows of token ids are stretches of one stream, not documents
    data.max_malformed = 100  # so many malformed documents are left out and counted; more are an error
    data.shard_megabytes = 0  # input per shard of a store in MB; 0: by the size of the corpus
    data.tokenizer = "sentencepiece"  # bytes, sentencepiece (trained here) or path of a .model or tokenizer.json
    data.eod_token = ""  # end-of-document token of a tokenizer.json; "": found in the files beside it
    data.tokenizer_vocab_size = 8192  # pieces of a sentencepiece model trained on the corpus
    data.eval_fraction = 0.01  # share of documents held out for evaluation
    data.store_cache = "~/.cache/latentjax/stores"  # where the token stores of raw corpora are kept
    data.sequence_length = 2048  # T, tokens per sequence
    data.batch_size = 8  # sequences per step, over all hosts and gradient accumulation steps
    data.mask_documents = False  # keep attention, positions and thoughts within a document
    data.seed = 0  # of the order of the windows
    data.shuffle = True  # windows in a random order, another in every epoch; else in their own
    data.prefetch_batches = 4  # batches read ahead of the step
    data.num_threads = 2  # threads that read ahead; more where storage is slow to answer
    data.num_workers = 0  # processes that read ahead instead of threads; 0: none
    data.device_prefetch = 2  # batches put onto the devices ahead of the step
    data.on_corrupt_block = "stop"  # a damaged block of a store: stop, or skip (leave out the windows that touch it)

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-3  # peak, reached at the end of the warm-up
    optimizer.min_learning_rate_ratio = 0.1  # floor of the cosine decay, as a share of the peak
    optimizer.warmup_ratio = 0.01  # share of num_steps in which the learning rate rises linearly
    optimizer.b1 = 0.9  # AdamW decay of the first moment
    optimizer.b2 = 0.95  # AdamW decay of the second moment
    optimizer.eps = 1e-8  # AdamW denominator offset
    optimizer.weight_decay = 0.1  # on matrices only: not on biases and norm scales
    optimizer.clip_norm = 1.0  # global gradient norm is clipped to this; 0: not clipped

    config.train = train = ConfigDict()
    train.init_from = ""  # begin with the weights of a run, a Hugging Face folder or hub id; "": with random ones
    train.num_steps = 1000  # optimizer steps of the whole run
    train.log_every_steps = 10  # steps between lines of metrics.jsonl
    train.eval_every_steps = 100  # also after the last step; 0: never
    train.eval_batches = 8  # batches of held-out windows per evaluation (fewer if the split has fewer)
    train.tasks_every_steps = 0  # steps between runs of eval_tasks, also after the last step; 0: never
    train.eval_tasks = ()  # names of lm-evaluation-harness: ("lambada_openai", "piqa"), or ("paper",) for the paper's
    train.eval_tasks_num_fewshot = 0  # examples before each question
    train.eval_tasks_limit = 0  # questions of each task; 0: all
    train.eval_tasks_path = ""  # a directory with YAML files of tasks of your own; "": none
    train.eval_tasks_batch_tokens = 4096  # tokens of a batch of requests, over all hosts
    train.sample_every_steps = 500  # also after the last step; 0: never
    train.sample_prompts = ("The ",)  # continued in samples.txt
    train.sample_tokens = 64  # tokens generated per prompt
    train.sample_temperature = 0.8  # 0: greedy
    train.gradient_accumulation_steps = 1  # microbatches per step
    train.loss_chunk_tokens = 0  # tokens per sequence whose logits are held at once; 0: all
    train.compilation_cache = "~/.cache/latentjax/compiled"  # keeps compiled programs for the next start; "": none
    train.lost_after_seconds = 60.0  # without a sign of one of several processes, after which the others end
    train.hung_after_seconds = 1800.0  # without progress of several processes, after which all end; 0: never
    train.on_bad_numbers = "rewind"  # a run of skipped updates or a spike: rewind, stop, or skip (just go on)
    train.max_skipped_updates = 10  # so many updates in a row whose numbers are not finite are trouble
    train.spike_threshold = 0.0  # trouble too: losses so many deviations (MAD) above the median; 0: none is
    train.spike_window = 100  # logged losses that this median is of
    train.max_rewinds = 3  # so many rewinds to one checkpoint; where they do not help the run stops
    train.seed = 0  # of initialisation, of the draws of R and of samples

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 500  # also when the run ends or is stopped
    checkpoint.max_to_keep = 2  # the last ones
    checkpoint.keep_every_steps = 0  # and for good every multiple of this; 0: none
    checkpoint.every_minutes = 0.0  # and whenever so long has passed since the last; 0: never
    checkpoint.directory = ""  # a path or gs:// URL, of this run alone; "": WORKDIR/checkpoints

    config.mesh = mesh = ConfigDict()  # devices along each axis; one of them may be -1: the rest
    mesh.replica = 1  # data parallel over the slow network between slices
    mesh.data = -1  # data parallel
    mesh.fsdp = 1  # data parallel, with parameters and optimizer state sharded
    mesh.sequence = 1  # slots of a sequence
    mesh.tensor = 1  # heads, MLP width and vocabulary

    config.lock()
    return config


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Returns {dotted key: value}, sorted by key (as ConfigDict keeps them)."""
    return dict(_leaves(config, ""))


def _leaves(config: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def load(recipe: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Runs a recipe and applies overrides.

    Args:
      recipe: path of a Python file, or the name of one that comes with latentjax (`recipes.find_recipe`), with `:arg`
        behind it where its `get_config` takes an argument.
      overrides: `dotted.key=value` strings, applied in order.

    Raises:
      UserError: no such file, a recipe that fails or returns something else, an unknown key, a value of another type.
    """
    text, _, argument = recipe.partition(":")
    found = find_recipe(text)
    path = str(found)
    with neighbours_importable(found):
        get_config = _run(path, runpy.run_path, path).get("get_config")
        if not callable(get_config):
            raise UserError(f"{path} defines no get_config(): a recipe returns its config from that function")
        if argument and not _run(path, inspect.signature, get_config).parameters:
            raise UserError(f"{path} takes no argument, but was given {shown(':' + argument)}")
        config = _run(path, get_config, *([argument] if argument else []))
    if not isinstance(config, ConfigDict) or flatten(config).keys() != flatten(default()).keys():
        raise UserError(f"{path}: get_config() must return a config made by latentjax.config.default()")
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise UserError(f"--config.{brief(key)} has no value: write --config.{brief(key)}=VALUE")
        set_key(config, key, text)
    return config


def _run(path: str, function: Callable, *arguments: Any) -> Any:
    """Calls what runs code of the recipe at `path`, whose mistakes become a `UserError` with the line."""
    try:
        return function(*arguments)
    except UserError:
        raise
    except SyntaxError as error:
        # The recipe itself, or a module that it imports.
        place = error.filename or path
        raise UserError(f"{place}:{error.lineno}: {error.msg}" if error.lineno else f"{place}: {error.msg}") from error
    except SystemExit as error:
        raise UserError(
            f"{_place(path, error)}: the recipe left Python (exit) instead of returning a config"
        ) from error
    except Exception as error:
        # ml_collections names the nearest key, and both types, in the first argument of these.
        reason = error.args[0] if isinstance(error, AttributeError | KeyError | TypeError) and error.args else error
        raise UserError(f"{_place(path, error)}: {type(error).__name__}: {brief(reason, 200)}") from error


def _place(path: str, error: BaseException) -> str:
    """Names the line of the recipe that an exception came through."""
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == path]
    return f"{path}:{lines[-1]}" if lines else path


def set_key(config: ConfigDict, key: str, text: str) -> None:
    """Sets a dotted key (or one of ALIASES) from the text of a command line, as the type of its default.

    Raises:
      UserError: no such key (the nearest is named), or the text is not of the key's type.
    """
    known = flatten(config)
    key = ALIASES.get(key, key)
    if key not in known:
        names = list(known) + [name.rsplit(".", 1)[1] for name in known]
        near = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
        full = [name for name in known if near and (name == near[0] or name.endswith(f".{near[0]}"))]
        hint = f"did you mean {full[0]!r}?" if full else f"the groups are {', '.join(config.keys())}"
        raise UserError(f"unknown config key {shown(key)}: {hint}")
    group, name = key.rsplit(".", 1)
    config[group][name] = _parse(key, text, known[key])


def _parse(key: str, text: str, default_value: Any) -> Any:
    """Reads `text` as a value of the type that `default_value` has."""
    kind = type(default_value)
    if kind is str:
        return text
    if kind is tuple and not text:
        return ()
    try:
        with warnings.catch_warnings(action="ignore"):  # Python remarks on odd literals
            value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        value = text
    if kind is tuple and not isinstance(value, list | tuple):
        value = tuple(text.split(",")) if isinstance(value, str) else (value,)
    if kind is tuple:
        value = _as_tuples(value)
    if kind is float and type(value) is int and abs(value) < 2**1023:  # beyond lies no float
        value = float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # 1e6 steps
    if type(value) is not kind:
        raise UserError(f"config key {key!r} takes {TYPE_NAMES[kind]}, not {shown(text)}")
    return value


def _as_tuples(value: Any) -> Any:
    """Turns lists into tuples, inside too: no value of a config is a list."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def to_json(config: ConfigDict) -> str:
    """Returns the resolved config as indented JSON (what a run keeps as config.json)."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def values_from_json(text: str, source: str) -> dict[str, Any]:
    """Reads what `to_json` of any version wrote, as {dotted key: value}; `source` names the file in errors.

    Raises:
      UserError: the text is not a config.
    """
    try:
        groups = json.loads(text)
        values = {f"{group}.{name}": value for group, knobs in groups.items() for name, value in knobs.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{source} is not a latentjax config: {brief(error)}") from error
    return {key: _as_tuples(value) for key, value in values.items()}


def from_json(text: str, source: str, *, of_any_version: bool = False) -> ConfigDict:
    """Reads what `to_json` wrote; `source` names the file in errors.

    Args:
      of_any_version: take the default of a knob that the text does not have, and pass over what is no knob (any more)
        outside the groups that say what the model is.

    Raises:
      UserError: the text is not a config, or not one of this version: it has a key more or less, or another type.
    """
    values, config = values_from_json(text, source), default()
    missing = flatten(config).keys() - values.keys()
    if of_any_version and "model.architecture" in values:
        missing = set()
        known = flatten(config)
        values = {key: value for key, value in values.items() if key in known or key.startswith(("model.", "recurr"))}
    if missing:
        raise UserError(f"{source} is not a latentjax config: {min(missing)!r} is missing")
    try:
        for key, value in values.items():
            group, name = key.split(".")
            if value is None or isinstance(value, bool) is not isinstance(config[group][name], bool):
                raise TypeError(f"{key} is {shown(value)}")  # which the config itself would take
            config[group][name] = value
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{source} is not a latentjax config: {brief(error.args[0] if error.args else error)}"
        ) from error
    return config
