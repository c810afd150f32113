"""Readers: from the files of a raw corpus, one module per format, to documents in pieces."""
