"""Tokenizers: text to token ids and back without losing a byte, whoever made the vocabulary."""
