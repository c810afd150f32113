"""The README.md of an exported folder: what the model is, how it was made, how it is loaded."""

from collections.abc import Mapping
from typing import Any

from latentjax.interop.exported_config import is_vanilla
from latentjax.models.spec import ModelSpec
from latentjax.recurrence.base import RecurrenceSpec

_METHODS = {
    "vanilla": "one pass over the tokens, as the architecture is",
    "latent": "{count} latent thought{s} before the next is predicted: the last hidden state, fed back as an input "
    "(arXiv 2509.23184)",
    "pause": "{count} pause token{s} before the next is predicted (arXiv 2310.02226)",
    "loop": "the stack of layers is run {passes} times",
    "ponder": "{count} time{s}, the embedding that the prediction stands for is added to the input (arXiv 2505.20674)",
}
_CACHED = {
    "latent": "With a key/value cache, as `generate` has it, decoding is exact: the thoughts of the prompt are refined "
    "until they no longer change, and those of every new token are computed one after another. Without one, "
    "`model(input_ids)` computes all tokens at once with R = {rounds} refinement passes, as in training; "
    "`num_jacobi_iterations=` sets another R.",
    "pause": "The pause tokens are put in inside the model: prompts and outputs have none.",
    "loop": "Every run over the layers has a key/value cache of its own.",
    "ponder": "Every pass has a key/value cache of its own.",
}


def model_card(
    name: str,
    spec: ModelSpec,
    recurrence_spec: RecurrenceSpec,
    num_parameters: int,
    dtype: str,
    *,
    has_tokenizer: bool,
    facts: Mapping[str, Any],
    checked: str,
) -> str:
    """Returns the text, with front matter for the hub.

    Args:
      name: path or id that it is loaded by; its last part is the heading.
      facts: of the training, by name: the rows of a table.
      checked: a sentence on the comparison with the model that was exported.
    """
    vanilla = is_vanilla(recurrence_spec)
    method = "vanilla" if vanilla else recurrence_spec.method
    count = recurrence_spec.num_latent_thoughts
    what = _METHODS[method].format(count=count, s="s" * (count != 1), passes=count + 1)
    trust = "" if vanilla else ", trust_remote_code=True"
    model: dict[str, Any] = {
        "parameters": f"{num_parameters:,}",
        "method": f"{method}: {what}",
        "architecture": spec.architecture,
        "layers, width, heads": f"{spec.num_layers}, {spec.hidden_size}, {spec.num_heads}",
        "vocabulary": f"{spec.vocab_size:,}",
        "longest sequence": f"{spec.max_position_embeddings:,} tokens",
        "numbers in the files": dtype,
    }
    use = [
        "from transformers import AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else ""),
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
    ]
    if has_tokenizer:
        use += [
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            'inputs = tokenizer(["The "], return_tensors="pt")',
            "print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=50)))",
        ]
    notes = []
    if not vanilla:
        notes = [
            _CACHED[method].format(rounds=recurrence_spec.num_jacobi_iterations),
            "",
            f"**Give `trust_remote_code=True`.** The tensors are named as {spec.architecture}'s: without it "
            "transformers loads that architecture alone, does not warn, and what it computes is not this model. The "
            "code is in `modeling_latentjax.py` and `configuration_latentjax.py`; it needs torch and transformers. "
            "Attention is `sdpa` or `eager`.",
            "",
        ]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        "- latentjax",
        f"- {method}",
        "# license: it is for you to name one",
        "---",
        "",
        f"# {name.rstrip('/').rpartition('/')[2]}",
        "",
        f"A language model of {num_parameters:,} parameters, trained with latentjax. For every token, {what}."
        if not vanilla
        else f"A language model of {num_parameters:,} parameters, trained with latentjax.",
        "",
        "```python",
        *use,
        "```",
        "",
        *notes,
        "## Model",
        "",
        *_table(model),
        "",
    ]
    if facts:
        lines += ["## Training", "", *_table(facts), ""]
    return "\n".join([*lines, "## Export", "", checked, ""])


def _table(rows: Mapping[str, Any]) -> list[str]:
    return ["| | |", "| --- | --- |", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items())]


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
