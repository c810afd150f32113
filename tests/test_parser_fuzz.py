"""Files from elsewhere, damaged in every way: models, tokenizers, and what a run left behind."""

import ast
import functools
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from data import made_tokenizers
from fuzzing import AMOUNTS, damaged, damaged_json, try_many

import latentjax
from latentjax.config import default, flatten, from_json, to_json, values_from_json
from latentjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from latentjax.errors import UserError
from latentjax.interop import hf_config, hub, pretrained
from latentjax.training.metrics import MetricsLog, read_metrics

CASES = Path(__file__).parent / "fixtures" / "parity"
FOLDER = CASES / "gpt_neox-latent-c1-r3"
GPT2 = {
    "model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_inner": None, "n_positions": 32, "vocab_size": 29,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip


@AMOUNTS
@pytest.mark.parametrize("case", ["gpt_neox-latent-c1-r3", "llama-vanilla-gqa", "gpt2"])
def test_config_of_hugging_face(amount, case, tmp_path):
    valid = GPT2 if case == "gpt2" else json.loads((CASES / case / "config.json").read_text())
    hf_config.specs_from_config(valid, "config.json")

    def check(content):
        (tmp_path / "config.json").write_bytes(content)
        spec, recurrence = hf_config.specs_from_config(hf_config.read_json(tmp_path / "config.json"), "config.json")
        sizes = (spec.num_layers, spec.num_heads, spec.intermediate_size, spec.vocab_size, spec.head_dim, spec.kv_heads)
        assert all(type(size) is int and 0 < size < 2**31 for size in sizes)
        assert spec.hidden_size == spec.num_heads * spec.head_dim and spec.num_heads % spec.kv_heads == 0
        assert spec.rotary_dims % 2 == 0 and 0 < spec.norm_epsilon <= 1 <= spec.rope_theta < 1e39
        assert type(spec.tie_embeddings) is bool and type(recurrence.num_latent_thoughts) is int

    try_many(amount, damaged_json(valid), check)


@pytest.fixture
def shapes_once(monkeypatch):
    """Traces a model once, not for every file."""
    monkeypatch.setattr(pretrained, "_abstract_params", functools.cache(pretrained._abstract_params))


@AMOUNTS
def test_safetensors(amount, tmp_path, shapes_once):
    """A header that says anything of sizes, places and dtypes; whatever is read has the shapes of the config."""
    valid = (FOLDER / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", valid[:8])
    header, body = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    (tmp_path / "config.json").write_bytes((FOLDER / "config.json").read_bytes())

    def check(content):
        (tmp_path / "model.safetensors").write_bytes(content)
        _, params = pretrained.load_pretrained(tmp_path)
        assert params["embedding"]["embedding"].dtype == np.float32

    check(valid)
    with_header = damaged_json(header).map(lambda text: struct.pack("<Q", len(text)) + text + body)
    try_many(amount // 2, with_header | damaged(valid), check)


@AMOUNTS
def test_index_of_shards(amount, tmp_path, shapes_once):
    """Only files in the folder are read."""
    for path in (FOLDER / "config.json", FOLDER / "model.safetensors"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    valid = {"metadata": {}, "weight_map": {"a": "model.safetensors", "b": "model.safetensors"}}

    def check(content):
        (tmp_path / hub.INDEX).write_bytes(content)
        pretrained.load_pretrained(tmp_path)

    check(json.dumps(valid).encode())
    try_many(amount // 2, damaged_json(valid), check)
    outside = {"weight_map": {"a": f"../{FOLDER.name}/model.safetensors"}}
    with pytest.raises(UserError, match="no safetensors file beside it"):
        check(json.dumps(outside).encode())


@AMOUNTS
@pytest.mark.parametrize("kind", ["byte_level", "llama"])
def test_tokenizer_json(amount, kind):
    """What is accepted encodes, within its own ids."""
    valid = _definitions()[kind]

    def check(content):
        tokenizer = HuggingFaceTokenizer(content, "</s>", "tokenizer.json")
        ids = tokenizer.encode("def f(x): return 3")
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        tokenizer.decode(ids)

    check(json.dumps(valid).encode())
    try_many(amount, damaged_json(valid), check)


@functools.cache
def _definitions():
    return {kind: _small(kind) for kind in ("byte_level", "llama")}


def _small(kind):
    """The parts of a tokenizer.json with a vocabulary of bytes and a few more."""
    from latentjax.data.tokenizers.definition import BYTE_LEVEL_ALPHABET, BYTE_TOKENS

    letters = BYTE_LEVEL_ALPHABET if kind == "byte_level" else (*BYTE_TOKENS, *"abcdefghijklmnop\u2581")
    vocabulary = {token: index for index, token in enumerate(("</s>", *letters, "re"))}
    added = {"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    symbol = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added | {"special": True}],
        "normalizer": None if kind == "byte_level" else {"type": "Sequence", "normalizers": [symbol]},
        "pre_tokenizer": byte_level if kind == "byte_level" else None,
        "post_processor": None,
        "decoder": byte_level if kind == "byte_level" else {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": kind != "byte_level",
            "vocab": vocabulary,
            "merges": [["r", "e"]] if kind == "byte_level" else [],
        },
    }


@AMOUNTS
def test_sentencepiece_model(amount):
    valid = made_tokenizers.foreign_model(vocab_size=60)

    def check(content):
        tokenizer = SentencePieceTokenizer(content, "", "tokenizer.model")
        ids = tokenizer.encode("def f(x): return 3")
        assert all(0 <= index < tokenizer.vocab_size for index in ids)
        tokenizer.decode(ids)

    check(valid)
    try_many(amount, damaged(valid), check)


@AMOUNTS
def test_config_of_a_run(amount):
    valid = json.loads(to_json(default()))

    def check(content):
        values_from_json(content.decode(errors="replace"), "config.json")
        read = from_json(content.decode(errors="replace"), "config.json")
        kinds = {key: type(value) for key, value in flatten(default()).items()}
        assert {key: type(value) for key, value in flatten(read).items()} == kinds

    check(to_json(default()).encode())
    try_many(amount * 3, damaged_json(valid), check)


@AMOUNTS
def test_metrics_of_a_run(amount, tmp_path):
    """Lines up to the first that is damaged are taken, and a run goes on from there."""
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": n, "loss": 1.5 / n, "eval_loss": 2.0} for n in range(1, 6)]
    valid = "".join(json.dumps(line) + "\n" for line in whole).encode()

    def check(content):
        path.write_bytes(content)
        (tmp_path / "samples.txt").write_bytes("=== step 1 ===\nä\n=== step 9 ===\n".encode() + content[:50])
        lines = read_metrics(path)
        assert all(type(line["step"]) is int for line in lines)
        common = next((n for n, (one, other) in enumerate(zip(content, valid)) if one != other), len(content))
        assert lines[: valid[:common].count(b"\n")] == whole[: valid[:common].count(b"\n")]
        MetricsLog(tmp_path, 3).close()
        assert all(line["step"] <= 3 for line in read_metrics(path))

    try_many(amount, damaged(valid) | damaged_json(whole[0]).map(lambda line: valid + line), check)


class _Runs:
    def __reduce__(self):
        return Path.touch, (Path("it-ran"),)


def test_no_pickle_is_read(tmp_path, monkeypatch):
    """A folder with PyTorch's pickles, and one whose safetensors file is a pickle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes((FOLDER / "config.json").read_bytes())
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(_Runs()))
        with pytest.raises(UserError, match="safetensors"):
            pretrained.load_pretrained(tmp_path)
    assert not Path("it-ran").exists()


def test_no_code_is_run_from_data():
    """Nothing in the package evaluates text or reads pickles; recipes are programs, and said to be."""
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "torch.load", "np.load", "marshal.loads", "yaml.load"}
    for path in Path(latentjax.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{path}:{node.lineno}"


def test_deep_nesting_and_long_numbers_everywhere():
    """The two ways in which valid JSON is more than Python's reader takes."""
    for text in ("[" * 10**5 + "]" * 10**5, '{"model": {"num_layers": ' + "9" * 5000 + "}}"):
        for read in (
            lambda text: from_json(text, "config.json"),
            lambda text: HuggingFaceTokenizer(text.encode(), "</s>"),
        ):
            with pytest.raises(UserError):
                read(text)
