"""How a backbone is applied: the methods, each with its training forward and its cached decoding.

A recurrence sees the backbone only as a function of embeddings, so every method works with every architecture, mesh,
attention backend and remat policy without knowing of them. It knows no data, no optimiser and no file.
"""
