"""Tokenizers in the form that `transformers`' AutoTokenizer loads, with the ids that a model was trained on.

AutoTokenizer reads a tokenizer.json. A tokenizer that came as one is written as it came. Bytes and sentencepiece models
become one here: the vocabulary of a sentencepiece model is written with real spaces, so that no normalizer is needed
and text that holds sentencepiece's own symbol for a space still comes out in bytes, as it does here.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from latentjax.data.sample_text import SAMPLE_TEXTS
from latentjax.data.tokenizers.base import SPACE_SYMBOL, Tokenizer
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.data.tokenizers.definition import BYTE_LEVEL_ALPHABET
from latentjax.data.tokenizers.huggingface import CONFIG_FILE, TOKENIZER_FILE, HuggingFaceTokenizer
from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer

_BYTES_END = "<|endoftext|>"  # what ends a document of bytes
_AROUND = ("TemplateProcessing", "BertProcessing", "RobertaProcessing")  # post-processors that add tokens


def save_for_transformers(tokenizer: Tokenizer, directory: str | Path, max_length: int) -> bool:
    """Writes what `Tokenizer.save` writes, and what AutoTokenizer needs beside it.

    Text that spells a special token becomes that token there, unless it is loaded with `split_special_tokens=True`;
    a tokenizer.json with a dummy prefix keeps its own way of placing it. All else gives the same ids.

    Args:
      max_length: tokens of the longest sequence of the model.

    Returns:
      False if no tokenizer.json says what a sentencepiece model made elsewhere does: then only the model is written.
    """
    directory = Path(directory)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        tokenizer, end = _bare(tokenizer), tokenizer.eod_token
    tokenizer.save(directory)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        pass  # it is a tokenizer.json already
    else:
        assert isinstance(tokenizer, ByteTokenizer | SentencePieceTokenizer)  # there are three kinds
        made = _bytes_pipeline() if isinstance(tokenizer, ByteTokenizer) else _sentencepiece_pipeline(tokenizer)
        if made is None:
            return False
        pipeline, end = made
        pipeline.save(str(directory / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",  # for generation; training sees whole windows
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return True


def _bare(tokenizer: HuggingFaceTokenizer) -> HuggingFaceTokenizer:
    """The same tokenizer without control tokens around a text, which training knows nothing of, cuts and padding.

    What needs no change keeps its bytes, and with them its fingerprint.
    """
    pipeline = json.loads(tokenizer.definition)
    around = pipeline.get("post_processor") or {}
    parts = around.get("processors", [around])
    bare = [part for part in parts if part.get("type") not in _AROUND]
    if bare == parts and not pipeline.get("truncation") and not pipeline.get("padding"):
        return tokenizer
    pipeline |= {"truncation": None, "padding": None}
    pipeline["post_processor"] = {"type": "Sequence", "processors": bare} if bare else None
    return HuggingFaceTokenizer(json.dumps(pipeline, ensure_ascii=False).encode(), tokenizer.eod_token)


def _bytes_pipeline() -> tuple[tokenizers.Tokenizer, str]:
    """Bytes as a vocabulary of 256 letters without merges."""
    pipeline = tokenizers.Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(BYTE_LEVEL_ALPHABET)}, []))
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.decoder = decoders.ByteLevel()
    pipeline.add_special_tokens([_BYTES_END])
    return pipeline, _BYTES_END


def _sentencepiece_pipeline(tokenizer: SentencePieceTokenizer) -> tuple[tokenizers.Tokenizer, str] | None:
    """A byte-pair model with the same pieces, if it gives the same ids; and the piece that ends a document."""
    pieces = tokenizer.pieces()
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    if len(vocabulary) < len(pieces):
        return None
    learned = [piece.text for piece in sorted(pieces, key=lambda piece: -piece.score) if piece.kind == "normal"]
    known = set(learned)
    # sentencepiece joins whichever neighbours spell the piece of the highest score.
    merges = [
        (text[:cut], text[cut:])
        for text in learned
        for cut in range(1, len(text))
        if text[:cut] in known and text[cut:] in known
    ]
    unknown = next((piece.text for piece in pieces if piece.kind == "unknown"), None)
    has_bytes = any(piece.kind == "byte" for piece in pieces)
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    pipeline = tokenizers.Tokenizer(model)
    steps: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    if tokenizer.has_dummy_prefix:
        pipeline.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(" ", 1, 0))
    pipeline.decoder = decoders.Sequence(steps)
    control = [piece.text for piece in pieces if piece.kind in ("control", "unknown")]
    pipeline.add_special_tokens(control)
    pipeline.encode_special_tokens = True  # for the comparison alone: the file does not keep it
    # Before a text that begins with the symbol of a space, sentencepiece leaves the dummy prefix out.
    compared = [text for text in SAMPLE_TEXTS if not (tokenizer.has_dummy_prefix and text.startswith(SPACE_SYMBOL))]
    if not _gives_the_same(pipeline, tokenizer, compared):
        return None
    return pipeline, pieces[tokenizer.eod_id].text


def _gives_the_same(pipeline: tokenizers.Tokenizer, tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    return all(
        pipeline.encode(text, add_special_tokens=False).ids == list(map(int, tokenizer.encode(text))) for text in texts
    )
