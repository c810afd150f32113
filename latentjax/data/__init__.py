"""From raw text to batches: tokenizers, corpus readers, the token store and the windows read from it."""
