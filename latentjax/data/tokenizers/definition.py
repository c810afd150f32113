"""What a Hugging Face tokenizer.json says, and what is made of it: text in, and exactly that text out.

The file is a pipeline: a normalizer, a pre-tokenizer, a model that has the vocabulary, a post-processor and a decoder.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from latentjax.data.tokenizers.base import SPACE_SYMBOL
from latentjax.errors import UserError, brief

# In the order in which they are asked; the first that names a token decides.
_NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
_KNOWN_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")

_MODELS = ("BPE", "Unigram")
_LOSING_PRE_TOKENIZERS = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")

_DECODERS = ("ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip")

_MOST_IDS = 1 << 24

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_characters() -> dict[int, int]:
    """GPT-2's table: the character (a code point) that spells each byte in a byte-level vocabulary, reversed."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: byte for byte in visible} | {256 + number: byte for number, byte in enumerate(hidden)}


_BYTE_OF_CHARACTER = _byte_characters()
BYTE_LEVEL_ALPHABET = tuple(chr(code) for code in sorted(_BYTE_OF_CHARACTER, key=_BYTE_OF_CHARACTER.__getitem__))
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True)
class Definition:
    """A tokenizer.json made ready to encode with.

    Attributes:
      pipeline: JSON for the `tokenizers` library. It is the file's own, except that nothing is cut off, padded, drawn
        at random, stripped around an added token or put around a text: neither control tokens nor a dummy prefix.
      space_symbol: what stands for a space within a token; "" where tokens are spelled in bytes (byte-level).
      has_dummy_prefix: whether the file's pipeline puts a space before a text that has none.
      unknown_token: what text outside the vocabulary becomes; "" if there is no such token.
      spells_all: whether the vocabulary has every byte, so that nothing is outside it.
    """

    pipeline: str
    space_symbol: str
    has_dummy_prefix: bool
    unknown_token: str
    spells_all: bool

    def spell(self, token: str) -> bytes:
        """Returns the bytes that a token of the model's vocabulary (not an added token) stands for."""
        if self.space_symbol:
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace(self.space_symbol, " ").encode()
        try:
            return bytes(_BYTE_OF_CHARACTER[ord(character)] for character in token)
        except KeyError:
            return token.encode()


def read_definition(content: bytes, eod_token: str, source: str) -> Definition:
    """Reads a tokenizer.json.

    Args:
      eod_token: the token that ends documents; it becomes a special one, which no text can spell.
      source: names the file in errors.

    Raises:
      UserError: not a tokenizer.json, or one whose tokens do not say what text they came from.
    """
    pipeline = _parse(content, source)
    try:
        return _make_ready(pipeline, eod_token, source)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        reason = f"{type(error).__name__} {brief(error)}"
        raise UserError(f"{source} is not a Hugging Face tokenizer.json: {reason}") from error


def _make_ready(pipeline: dict[str, Any], eod_token: str, source: str) -> Definition:
    model = pipeline["model"]
    kind = model.get("type") or ("BPE" if "merges" in model else "unnamed")
    if kind not in _MODELS or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        _refuse(source, f"the model {kind}" if kind not in _MODELS else "marks on parts of words")
    space_symbol = _space_symbol(pipeline, source)
    has_dummy_prefix = _take_dummy_prefix(pipeline, space_symbol, source)
    for token in pipeline.setdefault("added_tokens", []):
        token |= {"lstrip": False, "rstrip": False, "special": token["special"] or token["content"] == eod_token}
    model["dropout"] = None
    pipeline |= {"truncation": None, "padding": None, "post_processor": None}
    vocabulary = _vocabulary(pipeline)
    unknown = model.get("unk_token") or ""
    if isinstance(model.get("unk_id"), int):
        unknown = model["vocab"][model["unk_id"]][0]
    alphabet = BYTE_TOKENS if space_symbol else BYTE_LEVEL_ALPHABET
    spells_all = all(map(vocabulary.__contains__, alphabet)) and (not space_symbol or bool(model.get("byte_fallback")))
    return Definition(json.dumps(pipeline), space_symbol, has_dummy_prefix, unknown, spells_all)


def find_eod_token(content: bytes, read_beside: Callable[[str], dict | None], source: str) -> str:
    """Returns the token that ends documents according to the files beside a tokenizer.json, or to its own name.

    Args:
      content: the tokenizer.json.
      read_beside: returns the content of a JSON file in the same directory, None where there is none.
      source: names the tokenizer.json in errors.

    Raises:
      UserError: not a tokenizer.json, or nothing names the token.
    """
    vocabulary = _vocabulary(_parse(content, source))
    for name in _NAMING_FILES:
        said = read_beside(name) or {}
        token, index = said.get("eos_token"), said.get("eos_token_id")
        token = token.get("content") if isinstance(token, dict) else token
        index = index[0] if isinstance(index, list) and index else index
        if isinstance(token, str) and token:
            return token
        if isinstance(index, int):
            for token, place in vocabulary.items():
                if place == index:
                    return token
    known = [name for name in _KNOWN_NAMES if name in vocabulary]
    if len(known) == 1:
        return known[0]
    found = f"it has {' and '.join(known)}" if known else "it has none of the usual ones"
    raise UserError(f"nothing beside {source} says which token ends a document, and {found}: set data.eod_token")


def _parse(content: bytes, source: str) -> dict[str, Any]:
    try:
        pipeline = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is damaged: it is not JSON ({error})") from error
    model = pipeline.get("model") if isinstance(pipeline, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise UserError(f"{source} is not a Hugging Face tokenizer.json: it has no model with a vocabulary")
    try:
        _vocabulary(pipeline)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{source} is not a Hugging Face tokenizer.json: its vocabulary is damaged") from error
    return pipeline


def _vocabulary(pipeline: dict[str, Any]) -> dict[str, int]:
    vocabulary = pipeline["model"]["vocab"]
    if isinstance(vocabulary, list):  # of (piece, score), in a Unigram model
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    vocabulary = vocabulary | {token["content"]: token["id"] for token in pipeline.get("added_tokens", [])}
    # Tables are made with a row for every id up to the highest.
    if not all(type(index) is int and 0 <= index < _MOST_IDS for index in vocabulary.values()):
        raise ValueError(f"an id that is no whole number from 0 to {_MOST_IDS - 1}")
    return vocabulary


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Returns a component of the pipeline as the list of its parts, which it applies in order."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    (parts,) = (value for key, value in component.items() if key != "type")
    return [inner for part in parts for inner in _parts(part)]


def _space_symbol(pipeline: dict[str, Any], source: str) -> str:
    """Returns the symbol of a space in a sentencepiece vocabulary, "" for a byte-level one; refuses others."""
    pre_tokenizers = _parts(pipeline.get("pre_tokenizer"))
    for part in pre_tokenizers:
        if part["type"] in _LOSING_PRE_TOKENIZERS or part.get("behavior") == "Removed":
            _refuse(source, f"the pre-tokenizer {part['type']}, which drops what is between words")
    decoders = _parts(pipeline.get("decoder")) or [part for part in pre_tokenizers if part["type"] in _DECODERS]
    kinds = {part["type"] for part in decoders}
    if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse"}:
        return ""
    symbol = ""
    for part in decoders:
        if part["type"] not in _DECODERS or part["type"] == "ByteLevel":
            _refuse(source, f"the decoder {part['type']}")
        if part["type"] == "Metaspace":
            symbol = part.get("replacement", SPACE_SYMBOL)
        elif part["type"] == "Replace":
            symbol = part["pattern"].get("String", "")
            if len(symbol) != 1 or part["content"] != " ":
                _refuse(source, f"a decoder that replaces {part['pattern']} by {part['content']!r}")
        elif part["type"] == "Strip" and (part["content"], part["start"] > 1, part["stop"]) != (" ", False, 0):
            _refuse(source, "a decoder that strips more than a space from the beginning")
    if not symbol:
        _refuse(source, "no decoder for bytes or spaces")
    return symbol


def _take_dummy_prefix(pipeline: dict[str, Any], space_symbol: str, source: str) -> bool:
    """Takes the parts that put a space before a text out of the pipeline; returns whether there were any.

    The library puts that space behind every added token within a text as well, and leaves it out before a text that
    begins with a space, so that the text could not be told from its tokens.
    """
    normalizers, pre_tokenizers = _parts(pipeline.get("normalizer")), _parts(pipeline.get("pre_tokenizer"))
    prepends = [part for part in normalizers if part["type"] == "Prepend"]
    for part in prepends:
        if part["prepend"] not in (" ", space_symbol):
            _refuse(source, f"a normalizer that puts {part['prepend']!r} before every text")
    found = bool(prepends)
    for number, part in enumerate(pre_tokenizers):
        if part["type"] == "Metaspace":
            scheme = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
            part.pop("add_prefix_space", None)
            part["prepend_scheme"] = "never"
        elif part["type"] == "ByteLevel":
            scheme = "always" if part.get("add_prefix_space", True) else "never"
            part["add_prefix_space"] = False
        else:
            continue
        if scheme == "always" and number > 0:
            _refuse(source, f"a pre-tokenizer {part['type']} that puts spaces into the middle of a text")
        found = found or scheme != "never"
    kept = [part for part in normalizers if part["type"] != "Prepend"]
    pipeline["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    pipeline["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizers} if pre_tokenizers else None
    return found


def _refuse(source: str, what: str) -> None:
    raise UserError(
        f"{source} cannot be used: it has {brief(what)}, so its tokens do not spell the text exactly; byte-level and "
        "sentencepiece-like tokenizers do"
    )
