"""Architectures: from embeddings to hidden states, and the embedding and head on either side. Knows no recurrence.

Shape suffixes, here and everywhere: B batch, T tokens, S slots, L slots that can be attended to (a cache's capacity),
D width, H heads, G heads of keys and values, K head dimension, F MLP width, V vocabulary, N layers.
"""
