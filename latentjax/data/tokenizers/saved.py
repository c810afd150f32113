"""Tokenizers on disk: anyone's files, and the directory that `Tokenizer.save` writes."""

import json
from pathlib import Path

from latentjax.data.remote import entry, is_directory, is_remote, join, open_binary
from latentjax.data.tokenizers.base import DESCRIPTION_FILE, Tokenizer
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.data.tokenizers.definition import find_eod_token
from latentjax.data.tokenizers.huggingface import TOKENIZER_FILE, HuggingFaceTokenizer
from latentjax.data.tokenizers.sentence_piece import MODEL_FILE, SentencePieceTokenizer
from latentjax.errors import UserError, shown


def read_tokenizer(path: str | Path, eod_token: str = "") -> Tokenizer:
    """Loads a tokenizer that was made elsewhere.

    Args:
      path: a sentencepiece .model file, a Hugging Face tokenizer.json, or a directory with a file of one of these
        names (tokenizer.json goes before tokenizer.model); local, or a URL.
      eod_token: the token that ends documents; "" finds it: the end of sentence of a sentencepiece model, what the
        files beside a tokenizer.json call `eos_token`, or a well-known name in it.

    Raises:
      UserError: nothing there, a damaged file, or not a usable tokenizer.
    """
    path = str(path) if is_remote(str(path)) else str(Path(path).expanduser())
    if path.endswith(".model"):
        return SentencePieceTokenizer(_read(path), eod_token, path)
    if path.endswith(".json"):
        return _read_huggingface(path, _read(path), eod_token)
    for name in (TOKENIZER_FILE, MODEL_FILE):
        if entry(inner := join(path, name)) is not None:
            return read_tokenizer(inner, eod_token)
    found = (
        f"has neither {TOKENIZER_FILE} nor {MODEL_FILE}"
        if is_directory(path)
        else "is another file"
        if entry(path)
        else "is not there"
    )
    raise UserError(
        f"cannot read the tokenizer {path!r}: it {found}; a tokenizer is bytes, sentencepiece (trained on the corpus), "
        f"a sentencepiece .model file, a {TOKENIZER_FILE} or a directory with one of them"
    )


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Loads the tokenizer that `save` put into a directory; local, or a URL.

    Raises:
      UserError: it is missing, of an unknown kind, or not the one that was saved.
    """
    path = join(str(directory), DESCRIPTION_FILE)
    try:
        description = json.loads(_read(path))
        kind, fingerprint = description["kind"], description["fingerprint"]
        eod_token = description.get("eod_token", "")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: it does not describe a tokenizer") from error
    if kind == ByteTokenizer.kind:
        tokenizer: Tokenizer = ByteTokenizer()
    elif kind == SentencePieceTokenizer.kind:
        place = join(str(directory), MODEL_FILE)
        tokenizer = SentencePieceTokenizer(_read(place), eod_token, place)
    elif kind == HuggingFaceTokenizer.kind:
        place = join(str(directory), TOKENIZER_FILE)
        tokenizer = HuggingFaceTokenizer(_read(place), eod_token, place)
    else:
        raise UserError(f"{path} names a tokenizer kind {shown(kind)}, which this version does not know")
    if tokenizer.fingerprint != fingerprint:
        raise UserError(f"{path} does not belong to the tokenizer beside it: the fingerprints differ")
    return tokenizer


def _read_huggingface(path: str, definition: bytes, eod_token: str) -> HuggingFaceTokenizer:
    def read_beside(name: str) -> dict | None:
        place = path[: path.rfind("/") + 1] + name
        content = _read_if_there(place)
        try:
            said = None if content is None else json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is damaged: it is not JSON ({error})") from error
        return said if isinstance(said, dict) else None

    return HuggingFaceTokenizer(definition, eod_token or find_eod_token(definition, read_beside, path), path)


def _read(path: str) -> bytes:
    content = _read_if_there(path)
    if content is None:
        raise UserError(f"cannot read the tokenizer {path}: there is no such file")
    return content


def _read_if_there(path: str) -> bytes | None:
    if entry(path) is None:
        return None
    with open_binary(path) as file:
        return file.read()
