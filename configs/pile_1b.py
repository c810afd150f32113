"""PonderLM-2 on the shape of Pythia-1.4B: one latent thought per token, 300B tokens of the Pile.

Paper: "Pretraining LLM with Latent Thoughts in Continuous Space", arXiv 2509.23184. Its claim for this recipe: the
1.4B model with one latent thought beats the vanilla 2.8B one, which costs as much per generated token.

Data: the Pile, tokenised once with GPT-NeoX's tokenizer (a local copy will do). On many machines: docs/data.md.

    python -m latentjax.prepare --input '/data/pile/train/*.jsonl.zst' --output data/pile --num_workers 32 \
        --tokenizer hf://EleutherAI/gpt-neox-20b/tokenizer.json

Training:

    python -m latentjax.train --config configs/pile_1b.py --config.mesh.fsdp=8

Expect: 143,000 steps of 1024 sequences of 2048 tokens. R is 2, 3 or 4 with equal odds, so a step costs 9 forwards per
token on average where a vanilla model has 1: 2.3e22 model FLOPs for the whole run (`latentjax/training/flops.py`). The
whole run has not been made with this code, so no loss is promised here.
"""

from ml_collections import ConfigDict

from latentjax.config import default


def get_config() -> ConfigDict:
    """The recipe; `pile_410m`, `pile_160m` and `pile_70m` change its shape, learning rate and weight decay."""
    config = default()
    config.model.architecture = "gpt_neox"
    config.model.num_layers = 24
    config.model.hidden_size = 2048
    config.model.num_heads = 16
    config.model.intermediate_size = 8192
    config.model.vocab_size = 50304
    config.model.max_position_embeddings = 2048
    config.model.dtype = "bfloat16"
    config.model.remat = "keep_layer_inputs"

    config.recurrence.method = "latent"
    config.recurrence.num_latent_thoughts = 1
    config.recurrence.num_jacobi_iterations = 3
    config.recurrence.train_jacobi_iterations = (2, 3, 4)

    config.data.path = "data/pile"
    config.data.tokenizer_vocab_size = 50304
    config.data.sequence_length = 2048
    config.data.batch_size = 1024

    config.optimizer.learning_rate = 2e-4
    config.optimizer.min_learning_rate_ratio = 0.1
    config.optimizer.warmup_ratio = 0.01
    config.optimizer.weight_decay = 0.01

    config.train.num_steps = 143_000
    config.train.log_every_steps = 10
    config.train.eval_every_steps = 1000
    config.train.eval_batches = 2
    config.train.sample_every_steps = 5000
    config.train.sample_prompts = ("The capital of France is", "def fibonacci(n):", "Once upon a time")
    config.train.loss_chunk_tokens = 512
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 10_000

    config.mesh.data = 1
    config.mesh.fsdp = -1
    return config
