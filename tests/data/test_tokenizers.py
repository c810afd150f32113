"""Tokenizers of every kind: exact round trips, whole and in pieces, byte counts, saving and loading."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import CORPUS, HARD_TEXTS, MAKERS, byte_level_file, foreign_model, llama_file, llama_model
from tokenizers import normalizers

from latentjax.data.tokenizers.base import check_ids
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.data.tokenizers.saved import load_tokenizer, read_tokenizer
from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from latentjax.data.tokenizers.training import train_sentencepiece
from latentjax.errors import UserError

# Fragments that mean something to one tokenizer or another, among any characters at all.
FRAGMENTS = ["</s>", "<s>", "<unk>", "<|endoftext|>", "<|padding|>", "<tool>", "<0x0A>", "\u2581", " ", "  ", " " * 9]
FRAGMENTS += [
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    "return ",
    "self.value",
    "🙂",
    "\u0301",
    "\0",
    "<",
    "/s>",
    "s>",
    "\u2581\u2581",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=12).map("".join)


@pytest.fixture(scope="module", params=["bytes", *MAKERS])
def tokenizer(request):
    return ByteTokenizer() if request.param == "bytes" else MAKERS[request.param]()


@pytest.fixture(scope="module")
def exact(tokenizer):
    """What becomes of a text: nothing, or its normal form."""
    normalises = tokenizer.decode(tokenizer.encode("e\u0301")) == "\u00e9"
    # Not Python's own, which is of another version of Unicode.
    return normalizers.NFC().normalize_str if normalises else lambda text: text


def prefix_bytes(tokenizer, text: str) -> int:
    """How many bytes of a dummy prefix are in the ids of a document."""
    ids = tokenizer.encode(text)
    return len(tokenizer.decode_bytes(ids, continued=True)) - len(tokenizer.decode_bytes(ids))


def check_round_trip(tokenizer, text: str, expected: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode_bytes(ids) == expected.encode()
    assert tokenizer.bytes_per_id[ids].sum() == len(expected.encode()) + prefix_bytes(tokenizer, text)
    assert all(type(index) is int and 0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.eod_id not in ids
    (batched,) = tokenizer.encode_batch([text])
    assert batched.dtype == np.int32 and batched.tolist() == ids
    (inner,) = tokenizer.encode_batch([text], [True])
    assert tokenizer.decode_bytes(inner, continued=True) == expected.encode()
    assert tokenizer.bytes_per_id[inner].sum() == len(expected.encode())
    assert tokenizer.eod_id not in inner


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_every_hard_text_comes_back_exactly(tokenizer, exact, text):
    check_round_trip(tokenizer, text, exact(text))


@settings(max_examples=150, deadline=None)
@given(TEXTS)
def test_every_text_comes_back_exactly(tokenizer, exact, text):
    check_round_trip(tokenizer, text, exact(text))


def test_every_character_comes_back(tokenizer, exact):
    text = "".join(chr(code) for code in range(0x3000) if not 0xD800 <= code < 0xE000)
    check_round_trip(tokenizer, text, exact(text))


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXTS.filter(len), min_size=1, max_size=5))
def test_pieces_of_a_document_join_to_the_document(tokenizer, exact, pieces):
    arrays = tokenizer.encode_batch(pieces, [number > 0 for number in range(len(pieces))])
    document = "".join(map(exact, pieces)).encode()
    assert tokenizer.decode_bytes(np.concatenate(arrays)) == document
    # A window begins anywhere: what is before it and what is in it are the document.
    ids = np.concatenate(arrays)
    middle = len(ids) // 2 or 1
    assert tokenizer.decode_bytes(ids[:middle]) + tokenizer.decode_bytes(ids[middle:], continued=True) == document


def test_batches_agree_with_single_texts(tokenizer):
    texts = HARD_TEXTS * 2
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == tokenizer.encode(text)
    flags = np.arange(len(texts)) % 3 > 0
    for text, ids, continued in zip(texts, tokenizer.encode_batch(texts, flags), flags, strict=True):
        assert ids.tolist() == tokenizer.encode_batch([text], [continued])[0].tolist()
    assert tokenizer.encode_batch([]) == []


def test_windows_cut_within_a_character_lose_no_byte(tokenizer):
    text = "x日y" * 5
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids)):
        after = tokenizer.decode_bytes(ids[cut:], continued=True)
        assert tokenizer.decode_bytes(ids[:cut]) + after == text.encode()


def test_byte_tokenizer_is_utf8():
    assert ByteTokenizer().encode("aé\n") == [97, 0xC3, 0xA9, 10]
    assert ByteTokenizer().vocab_size == 257
    assert ByteTokenizer().bytes_per_id.tolist() == [1] * 256 + [0]


def test_end_of_document_and_foreign_ids_decode_to_nothing(tokenizer):
    (rest,) = tokenizer.encode_batch(["b"], [True])
    ids = [*tokenizer.encode("a"), tokenizer.eod_id, *rest, tokenizer.vocab_size + 7, -1]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.bytes_per_id[tokenizer.eod_id] == 0
    assert tokenizer.bytes_per_id.shape == (tokenizer.vocab_size,)
    assert tokenizer.bytes_per_id.dtype == np.int32


def test_saving_and_pickling_keep_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer")
    for copy in (load_tokenizer(tmp_path / "new" / "tokenizer"), pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer)
        assert (copy.fingerprint, copy.eod_id, copy.vocab_size) == (
            tokenizer.fingerprint,
            tokenizer.eod_id,
            tokenizer.vocab_size,
        )
        assert [copy.encode(text) for text in HARD_TEXTS] == [tokenizer.encode(text) for text in HARD_TEXTS]
    description = json.loads((tmp_path / "new" / "tokenizer" / "latentjax_tokenizer.json").read_text())
    assert (description["kind"], description["eod_id"]) == (tokenizer.kind, tokenizer.eod_id)
    if tokenizer.kind != "bytes":
        assert read_tokenizer(tmp_path / "new" / "tokenizer").fingerprint == tokenizer.fingerprint


def test_a_dummy_prefix_is_put_before_documents_only():
    tokenizer = SentencePieceTokenizer(foreign_model())
    document, inner = tokenizer.encode_batch(["return self.value"] * 2, [False, True])
    assert tokenizer.decode_bytes(document) == tokenizer.decode_bytes(inner, continued=True) == b"return self.value"
    assert tokenizer.decode_bytes(document, continued=True) == b" return self.value"
    assert tokenizer.bytes_per_id[document].sum() == len(b" return self.value")
    assert tokenizer.bytes_per_id[inner].sum() == len(b"return self.value")
    assert tokenizer.eod_id == 2


def test_a_control_piece_can_be_chosen_to_end_documents():
    model = foreign_model(control_symbols=["<doc>"], eos_id=-1)
    with pytest.raises(UserError, match="mine.model has no end-of-sentence piece.* data.eod_token"):
        SentencePieceTokenizer(model, "", "mine.model")
    tokenizer = SentencePieceTokenizer(model, "<doc>")
    assert tokenizer.decode(tokenizer.encode("self <doc>")).startswith("self ")
    assert tokenizer.eod_id not in tokenizer.encode("self <doc>")
    assert pickle.loads(pickle.dumps(tokenizer)).eod_id == tokenizer.eod_id
    assert tokenizer.fingerprint != SentencePieceTokenizer(model, "<s>").fingerprint
    for token in ("absent", "r"):
        with pytest.raises(UserError, match=f"data.eod_token: mine.model has no control piece '{token}'"):
            SentencePieceTokenizer(model, token, "mine.model")


def test_files_and_directories_of_others_are_read(tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    (both / "tokenizer.model").write_bytes(llama_model())
    assert read_tokenizer(both).fingerprint == SentencePieceTokenizer(llama_model()).fingerprint
    (both / "tokenizer.json").write_bytes(llama_file())
    for path, kind in ((both, "huggingface"), (both / "tokenizer.model", "sentencepiece")):
        assert read_tokenizer(path).kind == read_tokenizer(str(path)).kind == kind
    assert read_tokenizer(f"file://{both}").fingerprint == read_tokenizer(both).fingerprint
    assert read_tokenizer(both, "<s>").eod_id == 1
    (both / "other.json").write_bytes(byte_level_file())
    assert read_tokenizer(both / "other.json").eod_token == "<|endoftext|>"


def test_damaged_and_missing_tokenizers_are_named(tmp_path, monkeypatch):
    for name in ("absent.model", "absent.json", "absent"):
        with pytest.raises(UserError, match=f"cannot read the tokenizer .*{name}'?: "):
            read_tokenizer(tmp_path / name)
    with pytest.raises(UserError, match="has neither tokenizer.json nor tokenizer.model"):
        read_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="notes.txt': it is another file; a tokenizer is bytes, sentencepiece"):
        read_tokenizer(tmp_path / "notes.txt")
    (tmp_path / "noise.model").write_bytes(b"\x07noise" * 9)
    with pytest.raises(UserError, match="noise.model is not a sentencepiece model"):
        read_tokenizer(tmp_path / "noise.model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lone.json").write_bytes(llama_file())
    assert read_tokenizer("lone.json").eod_token == "</s>"


def test_a_saved_tokenizer_that_is_not_itself_any_more_is_refused(tmp_path):
    with pytest.raises(UserError, match="latentjax_tokenizer.json"):
        load_tokenizer(tmp_path)
    description = tmp_path / "latentjax_tokenizer.json"
    train_sentencepiece(CORPUS, 320).save(tmp_path)
    train_sentencepiece(CORPUS, 300).save(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    with pytest.raises(UserError, match="fingerprints differ"):
        load_tokenizer(tmp_path)
    description.write_text('{"kind": "runes", "fingerprint": ""}')
    with pytest.raises(UserError, match="'runes'"):
        load_tokenizer(tmp_path)
    for damaged in ("{", "[]", '{"kind": "bytes"}', '"bytes"'):
        description.write_text(damaged)
        with pytest.raises(UserError, match="latentjax_tokenizer.json is damaged"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_ids_beyond_the_vocabulary_are_named(dtype):
    check_ids(np.array([0, 256], dtype), ByteTokenizer(), "corpus, row 3")
    check_ids(np.array([], dtype), ByteTokenizer(), "corpus, row 3")
    with pytest.raises(UserError, match="corpus, row 3: token 1 is the id 257, .* end at 256"):
        check_ids(np.array([0, 257, 999], dtype), ByteTokenizer(), "corpus, row 3")
    if dtype != np.uint16:
        with pytest.raises(UserError, match="token 0 is the id -1,"):
            check_ids(np.array([-1, 257], dtype), ByteTokenizer(), "corpus, row 3")
