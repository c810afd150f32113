"""Small tokenizers of every kind, made in the test, and texts that are hard on them."""

import functools
import io
import json

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from latentjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from latentjax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from latentjax.data.tokenizers.training import train_sentencepiece

CORPUS = [
    f"def function_{n}(self, value):\n    if value > {n}:\n        return self.value + {n * 7}\n\n" for n in range(200)
]
HARD_TEXTS = [
    "",
    " ",
    "   ",
    "\n",
    "  leading and trailing   ",
    "tabs\t\tand\r\nline\rends\n\n\n",
    "    if x:\n        return  {1:  2}\n",
    "na\u00efve Gr\u00fc\u00dfe, 日本語, עברית, 🙂👩‍🚀",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \uff21 is not A",
    "\u2581",
    "\u2581 \u2581begins with it",
    "the space symbol \u2581\u2581 itself, and \u2585 and \u2047",
    "\ufeffbyte order mark, \u00a0no-break, \u3000wide, \u2028line separator",
    "control </s> <unk> <s> <0x0A> \0 \x1b \x7f",
    "</s>",
    "</s></s> <|endoftext|><|endoftext|>\n<|padding|>x</s>",
    "a tag <tool> and  <tool>\n<tool>",
    "1234567890",
]
NORMALISED = "e\u0301 is not"  # what NFC changes


def foreign_model(**options) -> bytes:
    """A sentencepiece model with that trainer's own defaults: a dummy prefix, NFKC, no byte fallback."""
    model = io.BytesIO()
    options = {"vocab_size": 60, "minloglevel": 2, "num_threads": 1} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **options)
    return model.getvalue()


@functools.cache
def llama_model() -> bytes:
    """A sentencepiece model as LLaMA's: lossless but for the dummy prefix."""
    return foreign_model(
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.99,
    )


def _file(tokenizer: Tokenizer) -> bytes:
    return tokenizer.to_str().encode()


@functools.cache
def byte_level_file(normalizer: str = "", prefix_space: bool = False) -> bytes:
    """A tokenizer.json as GPT-NeoX's: byte-level, with runs of spaces as added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC() if normalizer else None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>", "<|padding|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(8, 1, -1)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, lstrip=True, rstrip=True)])
    return _file(tokenizer)


@functools.cache
def llama_file(metaspace: str = "", normalized: bool = False) -> bytes:
    """A tokenizer.json as LLaMA's: byte fallback, a dummy prefix, BOS around a text, and merges that lead to "</s>".

    Args:
      metaspace: the prepend scheme of a Metaspace pre-tokenizer; "" puts the prefix by a normalizer, as LLaMA 2 does.
      normalized: whether added tokens are looked for in normalised text.
    """
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = json.loads(words.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"</s>", "</", "s>"]
    tokens += [token for token in learned["vocab"] if token not in tokens]
    merges = [tuple(pair) for pair in learned["merges"]] + [("<", "/"), ("s", ">"), ("</", "s>")]
    model = models.BPE(
        {token: index for index, token in enumerate(tokens)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_tokens([AddedToken(token, normalized=normalized) for token in ("<tool>", "    ")])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", tokens.index("<s>"))])
    return _file(tokenizer)


@functools.cache
def unigram_file() -> bytes:
    """A tokenizer.json with a Unigram model, as of a sentencepiece model of that type."""
    words = Tokenizer(models.Unigram())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator(CORPUS, trainers.UnigramTrainer(vocab_size=120, show_progress=False))
    learned = [tuple(entry) for entry in json.loads(words.to_str())["model"]["vocab"]]
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", 0.0) for byte in range(256)), *learned]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "</s>")])
    return _file(tokenizer)


# Every kind that gives every text back (the one that normalises: every text in that form).
MAKERS = {
    "trained sentencepiece": lambda: train_sentencepiece(CORPUS, 320),
    "sentencepiece with a dummy prefix": lambda: SentencePieceTokenizer(llama_model()),
    "byte-level": lambda: HuggingFaceTokenizer(byte_level_file(), "<|endoftext|>"),
    "byte-level, NFC": lambda: HuggingFaceTokenizer(byte_level_file("NFC"), "<|endoftext|>"),
    "byte-level with a dummy prefix": lambda: HuggingFaceTokenizer(byte_level_file("", True), "<|endoftext|>"),
    "LLaMA": lambda: HuggingFaceTokenizer(llama_file(), "</s>"),
    "LLaMA, normalised added tokens": lambda: HuggingFaceTokenizer(llama_file("", True), "</s>"),
    "Metaspace, always": lambda: HuggingFaceTokenizer(llama_file("always"), "</s>"),
    "Metaspace, first": lambda: HuggingFaceTokenizer(llama_file("first"), "</s>"),
    "Metaspace, never": lambda: HuggingFaceTokenizer(llama_file("never"), "</s>"),
    "Unigram": lambda: HuggingFaceTokenizer(unigram_file(), "</s>"),
}
