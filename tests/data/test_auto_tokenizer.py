"""Tokenizers as AutoTokenizer loads them: the same ids, the same text."""

import json

import pytest
from made_tokenizers import HARD_TEXTS, MAKERS, NORMALISED, foreign_model

from latentjax.data.sample_text import SAMPLE_TEXTS
from latentjax.data.tokenizers.auto_tokenizer import save_for_transformers
from latentjax.data.tokenizers.byte_level import ByteTokenizer
from latentjax.data.tokenizers.saved import load_tokenizer
from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install '.[peer]'")

TEXTS = [*SAMPLE_TEXTS, *HARD_TEXTS]
# Of a tokenizer.json made elsewhere, AutoTokenizer follows the file where it says something else than we do: added
# tokens that swallow the white space around them, and where a dummy prefix goes.
EXACT = ["trained sentencepiece", "byte-level", "byte-level, NFC"]
PREFIXED = ["LLaMA", "Metaspace, always", "Metaspace, first", "Unigram", "byte-level with a dummy prefix"]


def saved(tokenizer, directory, model_type="llama"):
    assert save_for_transformers(tokenizer, directory, max_length=64)
    # The model's type must not make it another tokenizer than the files say.
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return transformers.AutoTokenizer.from_pretrained(directory, split_special_tokens=True)


def assert_same(loaded, tokenizer, texts):
    for text in texts:
        ids = list(map(int, tokenizer.encode(text)))
        assert loaded(text)["input_ids"] == ids, repr(text)
        assert loaded.decode(ids) == tokenizer.decode(ids), repr(text)


@pytest.mark.parametrize("model_type", ["gpt_neox", "llama", "gpt2"])
@pytest.mark.parametrize("name", ["bytes", *EXACT])
def test_the_same_ids(name, model_type, tmp_path):
    """On every text, control tokens in it included, which are text where they are asked to be."""
    tokenizer = ByteTokenizer() if name == "bytes" else MAKERS[name]()
    loaded = saved(tokenizer, tmp_path, model_type)
    assert_same(loaded, tokenizer, [text for text in TEXTS if name == "bytes" or "<tool>" not in text])
    assert len(loaded) == tokenizer.vocab_size
    assert loaded.eos_token_id == loaded.pad_token_id == tokenizer.eod_id
    assert load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    by_default = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert by_default(f"a{by_default.eos_token}")["input_ids"][-1] == tokenizer.eod_id


@pytest.mark.parametrize("name", PREFIXED)
def test_nothing_is_put_around_a_text(name, tmp_path):
    """Training sees no beginning-of-sequence token, even where a file's own post-processor would put one."""
    tokenizer = MAKERS[name]()
    loaded = saved(tokenizer, tmp_path)
    for text in ("The ferry left.", "x = 1\n", "na\u00efve \u65e5\u672c", NORMALISED):
        assert loaded(text)["input_ids"] == list(tokenizer.encode(text)), text
    assert load_tokenizer(tmp_path).encode("The ferry") == tokenizer.encode("The ferry")


def test_a_sentencepiece_model_with_a_dummy_prefix(tmp_path):
    tokenizer = MAKERS["sentencepiece with a dummy prefix"]()
    loaded = saved(tokenizer, tmp_path)
    assert_same(loaded, tokenizer, [text for text in TEXTS if not text.startswith("\u2581")])


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_a_model_that_no_tokenizer_json_can_say(model_type, tmp_path):
    """One that rewrites white space and characters: only the model itself is written."""
    tokenizer = SentencePieceTokenizer(foreign_model(model_type=model_type))
    assert not save_for_transformers(tokenizer, tmp_path, max_length=64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latentjax_tokenizer.json", "tokenizer.model"]
