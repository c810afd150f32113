"""Translating our settings to a Hugging Face config.json: the inverse of `hf_config.specs_from_config`."""

from typing import Any

from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec

# The class of transformers for each architecture, and the names that our own code for it begins with.
_CLASSES = {
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoX"),
    "llama": ("LlamaForCausalLM", "Llama"),
    "gpt2": ("GPT2LMHeadModel", "GPT2"),
}
CODE_FILES = ("configuration_latentjax.py", "modeling_latentjax.py")  # in interop/hf


def is_vanilla(recurrence_spec: RecurrenceSpec) -> bool:
    """Returns whether the method is one pass over the tokens, so that transformers' own classes compute it."""
    return recurrence_spec.method == "vanilla" or recurrence_spec.num_latent_thoughts == 0


def config_from_specs(
    spec: ModelSpec, recurrence_spec: RecurrenceSpec, dtype: str = "float32", eod_id: int | None = None
) -> dict[str, Any]:
    """Returns the content of a config.json.

    The keys for the methods are the reference's, beside `method`, which tells them apart. A config that is not vanilla
    names the classes of `interop/hf`, whose files (CODE_FILES) have to be beside it.

    Args:
      dtype: of the tensors beside it.
      eod_id: the token that ends documents, if there is a tokenizer.
    """
    own_class, stem = _CLASSES[spec.architecture]
    config = {
        "architectures": [own_class],
        "model_type": spec.architecture,
        "method": "vanilla",
        "torch_dtype": dtype,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_embeddings,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
        # Of the reference, for whoever trains on.
        "initializer_range": (2 / (5 * spec.hidden_size)) ** 0.5,
        "use_cache": True,
        **_architecture_keys(spec),
    }
    if is_vanilla(recurrence_spec):
        return config
    config |= {
        "architectures": [f"Latentjax{stem}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_latentjax.Latentjax{stem}Config",
            "AutoModelForCausalLM": f"modeling_latentjax.Latentjax{stem}ForCausalLM",
        },
        "method": recurrence_spec.method,
        "recurrent_model": True,
        "num_latent_thoughts": recurrence_spec.num_latent_thoughts,
        "scale_embeds": recurrence_spec.scale_embeddings,
        "interpolation": recurrence_spec.method == "ponder",
    }
    if recurrence_spec.method == "latent":
        config |= {
            "num_jacobi_iterations": recurrence_spec.num_jacobi_iterations,
            "random_jacobi_iterations": False,
            "prefill_tolerance": None,
        }
    elif recurrence_spec.method == "pause":
        config["pause_token_id"] = recurrence_spec.pause_token_id % spec.vocab_size  # -1: the last
    elif recurrence_spec.method == "ponder":
        config["residual_interpolated_embeds"] = True
    return config


def _architecture_keys(spec: ModelSpec) -> dict[str, Any]:
    """What each model type calls its sizes and settings."""
    if spec.architecture == "gpt2":
        return {
            "n_layer": spec.num_layers,
            "n_embd": spec.hidden_size,
            "n_head": spec.num_heads,
            "n_inner": spec.intermediate_size,
            "n_positions": spec.max_position_embeddings,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": spec.norm_epsilon,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
    sizes = {
        "num_hidden_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_heads,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "attention_dropout": 0.0,
    }
    if spec.architecture == "llama":
        return sizes | {
            "num_key_value_heads": spec.kv_heads,
            "hidden_act": "silu",
            "rms_norm_eps": spec.norm_epsilon,
            "rope_theta": spec.rope_theta,
            "attention_bias": False,
            "mlp_bias": False,
        }
    return sizes | {
        "hidden_act": "gelu",
        "hidden_dropout": 0.0,
        "layer_norm_eps": spec.norm_epsilon,
        "rotary_pct": spec.rotary_fraction,
        "rotary_emb_base": spec.rope_theta,
        "use_parallel_residual": spec.parallel_residual,
        "attention_bias": True,
    }
