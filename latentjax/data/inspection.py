"""What a token store holds, for people to look at."""

import functools
from collections.abc import Callable

from latentjax.data.store import MANIFEST_FILE, SPLITS, TokenStore
from latentjax.errors import UserError, brief

_SAMPLE_TOKENS = 64
_SAMPLE_CHARACTERS = 400
_BAR = 40
_MOST_DIGITS = 64  # binary ones, of a document's length


def _checked(function: Callable) -> Callable:
    """Makes a `UserError` of a manifest in which something is missing or of another kind: only people read these."""

    @functools.wraps(function)
    def checked(given):
        try:
            return function(given)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
            path = given["path"] if isinstance(given, dict) else given.path
            raise UserError(
                f"{path}/{MANIFEST_FILE} is damaged where it tells of the corpus ({type(error).__name__}: "
                f"{brief(error)}): restore it from a copy"
            ) from error

    return checked


@_checked
def inspect(store: TokenStore) -> dict:
    """Returns the manifest's facts, a decoded sample of each split and the histogram of document lengths.

    Raises:
      UserError: the store is damaged where it was read.
    """
    manifest = store.manifest
    samples = {}
    for name in SPLITS:
        split = store.split(name)
        ids = split.read(0, min(_SAMPLE_TOKENS, split.num_tokens))
        samples[name] = store.tokenizer.decode(ids)[:_SAMPLE_CHARACTERS]
    return {
        "path": str(store.path),
        "corpus": manifest["corpus"],
        "held_out": manifest["held_out"],
        "tokenizer": manifest["tokenizer"],
        "dtype": manifest["dtype"],
        "splits": {
            name: {key: value for key, value in split.items() if key != "shards"}
            | {"shards": len(split["shards"]), "shard_bytes": sum(shard["bytes"] for shard in split["shards"])}
            for name, split in manifest["splits"].items()
        },
        "versions": manifest["versions"],
        "samples": samples,
    }


@_checked
def describe(facts: dict) -> str:
    """Returns what `inspect` found as text for a terminal; raises as `inspect`."""
    corpus, tokenizer = facts["corpus"], facts["tokenizer"]
    lines = [
        facts["path"],
        f"  corpus       {corpus['path']}: {corpus['files']:,} files, {corpus['file_bytes'] / 1e6:,.1f} MB, "
        f"{corpus['documents']:,} documents, {corpus['bytes'] / 1e6:,.1f} MB of text, read by "
        + ", ".join(corpus["readers"]),
        f"  left out     {corpus['malformed']:,} malformed documents, {corpus['left_out']:,} files that are not text",
        f"  tokenizer    {tokenizer['kind']}, vocabulary {tokenizer['vocab_size']:,}, end of document "
        f"{tokenizer['eod_id']}, {tokenizer['bytes_per_token']:.3f} bytes per token, {tokenizer['fingerprint'][:16]}",
    ]
    for name, split in facts["splits"].items():
        lines.append(
            f"  {name:<12} {split['tokens']:,} tokens, {split['documents']:,} documents, "
            f"{split['bytes'] / 1e6:,.1f} MB of text; "
            f"{split['shards']:,} shards of {facts['dtype']}, {split['shard_bytes'] / 1e6:,.1f} MB"
        )
    lines.append("  made with    " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()))
    for name, sample in facts["samples"].items():
        lines += ["", f"beginning of {name}:", *(f"  | {line}" for line in sample.splitlines())]
    lengths = {int(digits): count for digits, count in corpus["document_lengths"].items()}
    if lengths and not 0 <= min(lengths) <= max(lengths) <= _MOST_DIGITS:
        raise ValueError(f"documents of 2**{max(lengths)} tokens")
    if lengths:
        lines += ["", "documents by length in tokens:"]
        most = max(lengths.values())
        for digits in range(min(lengths), max(lengths) + 1):
            count = lengths.get(digits, 0)
            low, high = (1 << digits) >> 1, (1 << digits) - 1
            bar = "#" * -(-count * _BAR // most)
            lines.append(f"  {low:>13,} to {high:>13,}  {count:>13,}  {bar}".rstrip())
    return "\n".join(lines)
