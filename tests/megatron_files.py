"""A writer of Megatron data for tests, by the published layout and sharing nothing with what reads it."""

import struct

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write(prefix, sequences, dtype="uint16", gaps=None, modes=b""):
    """Writes the two files as the format is published; `gaps` are bytes left before each sequence, negative to overlap.

    Returns the path of the index.
    """
    item = np.dtype(dtype).itemsize
    pointers, data, end = [], bytearray(), 0
    for sequence, gap in zip(sequences, gaps or [0] * len(sequences)):
        pointers.append(end + gap)
        raw = b"".join(int(token).to_bytes(item, "little", signed=dtype.startswith("i")) for token in sequence)
        data.extend(b"\xee" * max(pointers[-1] - len(data), 0))
        data[pointers[-1] : pointers[-1] + len(raw)] = raw
        end = pointers[-1] + len(raw)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(sequences) + 1)
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences)) + struct.pack(f"<{len(sequences)}q", *pointers)
    index += struct.pack(f"<{len(sequences) + 1}q", *range(len(sequences) + 1)) + modes
    prefix.with_name(prefix.name + ".bin").write_bytes(data)
    path = prefix.with_name(prefix.name + ".idx")
    path.write_bytes(index)
    return path
