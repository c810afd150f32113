"""Configs that must pass: every knob drawn from what docs and comments allow, the ends of ranges among it."""

import math
import random
from typing import Any

import recipes
from ml_collections import ConfigDict

from latentjax.config import flatten

NUM_DEVICES = 8


def valid_config(draw: random.Random) -> ConfigDict:
    """A config that would train on tests/recipes.py's corpus and eight CPU devices, were there time."""
    config = recipes.get_config()
    for group in (_model, _recurrence, _data, _optimizer, _train):
        config.update({key: ConfigDict(values) for key, values in group(draw).items()})
    mesh = _mesh(draw)
    config.mesh.update(mesh)
    model, data, train = config.model, config.data, config.train
    size = {axis: 1 if value == -1 else value for axis, value in mesh.items()}
    for axis, value in mesh.items():
        if value == -1:
            size[axis] = NUM_DEVICES // math.prod(size.values())
    # What is split over devices is made a multiple of their number, and heads of an even width.
    model.num_kv_heads = size["tensor"] * draw.choice([1, 2]) if model.architecture == "llama" else 0
    model.num_heads = (model.num_kv_heads or size["tensor"]) * draw.choice([1, 2, 3])
    model.hidden_size = model.num_heads * size["fsdp"] * draw.choice([4, 8, 16])
    model.intermediate_size = size["tensor"] * draw.choice([1, 5, 24])
    model.vocab_size = size["tensor"] * draw.randrange(-(-257 // size["tensor"]), 400)
    train.gradient_accumulation_steps = draw.choice([1, 1, 2, 3])
    rows = size["replica"] * size["data"] * size["fsdp"]
    data.batch_size = rows * train.gradient_accumulation_steps * draw.choice([1, 1, 2, 5])
    data.sequence_length = size["sequence"] * draw.choice([1, 2, 7, 16])
    model.max_position_embeddings = max(data.sequence_length, 4 + train.sample_tokens) + draw.choice([0, 0, 100])
    if train.sample_every_steps == 0:
        model.max_position_embeddings = data.sequence_length  # samples are not taken, and need no room
    assert flatten(config).keys() == flatten(recipes.get_config()).keys()
    return config


def _mesh(draw: random.Random) -> dict[str, int]:
    axes, sizes = ["replica", "data", "fsdp", "sequence", "tensor"], {}
    left = NUM_DEVICES
    for axis in draw.sample(axes, 5):
        sizes[axis] = draw.choice([size for size in (1, 2, 4, 8) if left % size == 0])
        left //= sizes[axis]
    sizes["data"] *= left
    if draw.random() < 0.5:
        sizes[draw.choice(axes)] = -1
    return {axis: sizes[axis] for axis in axes}


def _model(draw: random.Random) -> dict[str, Any]:
    architecture = draw.choice(["gpt_neox", "llama", "gpt2"])
    knobs = {
        "architecture": architecture,
        "num_layers": draw.choice([1, 2, 12, 13, 80]),
        "rotary_fraction": {"llama": 1.0, "gpt2": 0.0}.get(architecture, draw.choice([0.0, 0.5, 1.0])),
        "rope_theta": draw.choice([1.0, 1e4, 5e5, 1e7]),
        "parallel_residual": draw.random() < 0.5,
        "norm_epsilon": draw.choice([1e-12, 1e-5, 1e-2]),
        "tie_embeddings": draw.random() < 0.5,
        "dtype": draw.choice(["float32", "bfloat16"]),
        "attention": draw.choice(["auto", "xla"]),
        "loops": draw.choice(["auto", "rolled", "unrolled"]),
        "remat": draw.choice(["none", "keep_matmul_outputs", "keep_layer_inputs", "keep_pass_inputs"]),
    }
    return {"model": knobs}


def _recurrence(draw: random.Random) -> dict[str, Any]:
    method = draw.choice(["vanilla", "latent", "latent", "ponder", "loop", "pause"])
    thoughts = draw.choice([0, 1, 2, 4])
    schedules = [
        ((0, thoughts, (0,)),),
        ((0.0, 0, (0,)), (0.25, thoughts, (0,)), (0.75, thoughts // 2, (0, 0))),
    ]
    if thoughts:
        schedules.append(((0.0, 0, (0,)), (0.5, 1, (0, 1)), (0.8, thoughts, (2, 3, 4))))
    schedule = draw.choice([(), *schedules]) if method == "latent" else ()
    drawn = draw.choice([(0,), (2, 3, 4), (2, 2, 3), (5,), (4, 1)])
    trained = 0 if method in ("ponder", "loop") else draw.choice([0, 1, 3, 99])
    # What a tolerance needs: one number, and gradients through no more passes than there are.
    tolerates = method == "latent" and drawn == (5,) and trained in (1, 3) and not schedule
    knobs = {
        "method": method,  # vanilla passes over how many thoughts there would be
        "num_latent_thoughts": thoughts,
        "train_schedule": schedule,
        "refinement": draw.choice(["full", "alternating"]) if method == "latent" and trained != 1 else "full",
        "handover_ratio": draw.choice([0.0, 1e-9, 0.2]) if len(schedule) > 1 else 0.0,
        "num_jacobi_iterations": draw.choice([0, 3, 20]),
        "train_jacobi_iterations": drawn,
        "backprop_passes": trained,
        "train_tolerance": draw.choice([0.0, 1e-9, 0.1, 1e9]) if tolerates else 0.0,
        "scale_embeddings": draw.random() < 0.5,
        "pause_token_id": draw.choice([0, 256] if method == "pause" else [-1, 0, 256]),
        "ponder_chunk_tokens": draw.choice([0, 1, 3, 10**6]),
    }
    return {"recurrence": knobs}


def _data(draw: random.Random) -> dict[str, Any]:
    corpus = str(recipes.CORPUS)
    sources = draw.choice(
        [
            {"path": corpus},
            {"path": "", "mixture": ((corpus, 0.7), (corpus, 3))},
            {"path": "", "mixture": ((corpus, 1e-300), (corpus, 1e30))},
            {"path": corpus, "eval_sets": (("web-2_x", corpus), ("W", corpus))},
        ]
    )
    knobs = {
        "exclude": draw.choice([(), ("*.md",), ("**/no[a-c]/*", "x?")]),
        "text_field": draw.choice(["text", "content", "input_ids"]),
        "max_malformed": draw.choice([0, 10**12]),
        "mask_documents": draw.random() < 0.5,
        "seed": draw.choice([0, 1, 2**40, 2**64 - 1]),
        "shuffle": draw.random() < 0.5,
        "prefetch_batches": draw.choice([0, 1, 64]),
        "num_threads": draw.choice([0, 1, 16]),
        "num_workers": draw.choice([0, 0, 2]),
        "device_prefetch": draw.choice([0, 1, 8]),
    }
    return {"data": sources | knobs}


def _optimizer(draw: random.Random) -> dict[str, Any]:
    knobs = {
        "learning_rate": draw.choice([0.0, 1e-6, 3e-4, 1.0]),
        "min_learning_rate_ratio": draw.choice([0.0, 0.1, 1.0]),
        "warmup_ratio": draw.choice([0.0, 0.01, 0.5, 1.0]),
        "b1": draw.choice([0.0, 0.9, 0.99]),
        "b2": draw.choice([0.0, 0.95, 0.99999, 1 - 1e-7]),
        "eps": draw.choice([1e-20, 1e-8, 1e-3]),
        "weight_decay": draw.choice([0.0, 0.1, 1.0]),
        "clip_norm": draw.choice([0.0, 1.0, 100.0]),
    }
    return {"optimizer": knobs}


def _train(draw: random.Random) -> dict[str, Any]:
    knobs = {
        "num_steps": draw.choice([1, 2, 1000, 2**31 - 1]),
        "log_every_steps": draw.choice([1, 10, 10**12]),
        "eval_every_steps": draw.choice([0, 1, 100, 10**12]),
        "eval_batches": draw.choice([1, 10**9]),
        # With tasks_every_steps as well, the harness would have to be there.
        "eval_tasks": draw.choice([(), ("piqa", "race")]),
        "eval_tasks_num_fewshot": draw.choice([0, 5]),
        "eval_tasks_limit": draw.choice([0, 10**6]),
        "eval_tasks_batch_tokens": draw.choice([1, 4096]),
        "sample_every_steps": draw.choice([0, 1, 10**12]),
        "sample_prompts": draw.choice([(), ("The ",), ("a", "日本")]),
        "sample_tokens": draw.choice([1, 64]),
        "sample_temperature": draw.choice([0.0, 0.8, 5.0]),
        "loss_chunk_tokens": draw.choice([0, 1, 3, 10**6]),
        "seed": draw.choice([0, 7, 2**32 - 1]),
    }
    checkpoint = {
        "every_steps": draw.choice([1, 500, 10**12]),
        "max_to_keep": draw.choice([1, 3]),
        "keep_every_steps": draw.choice([0, 7, 10**9]),
    }
    return {"train": knobs, "checkpoint": checkpoint}
