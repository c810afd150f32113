"""The value of a field: whether it can be a document."""

import numpy as np


class BadDocument(Exception):
    """A document that cannot be read, and is passed over; the message says why."""


def text_of(value: str, field: str) -> str:
    """Returns a text if every character of it is one.

    Raises:
      BadDocument: it holds half of a surrogate pair.
    """
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadDocument(f"field {field!r} holds half of a surrogate pair, which is no character") from error
    return value


def utf8(value: bytes, field: str) -> str:
    """Returns bytes as text.

    Raises:
      BadDocument: they are not UTF-8.
    """
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        place = f"byte 0x{value[error.start]:02x} at {error.start}"
        raise BadDocument(f"field {field!r} is not UTF-8 text ({place})") from error


def ids_of(value: list | np.ndarray, field: str) -> np.ndarray:
    """Returns token ids as a 1-D array of integers (int64 if they come as a list).

    Raises:
      BadDocument: one is no whole number, or is negative.
    """
    if isinstance(value, list):
        others = {type(item).__name__ for item in value} - {"int"}
        if others:
            raise BadDocument(f"field {field!r} is a list with {min(others)} in it, not of whole numbers")
        try:
            value = np.array(value, np.int64)
        except OverflowError as error:
            raise BadDocument(f"field {field!r} holds a number that is no token id") from error
    if value.ndim != 1 or value.dtype.kind not in "iu":
        raise BadDocument(f"field {field!r} is {value.ndim}-dimensional {value.dtype}, not a list of whole numbers")
    if value.size and value.min() < 0:
        raise BadDocument(f"field {field!r} holds the negative token id {value.min()}")
    return value
