"""Text to try things on where there is no corpus: prose, source code, and characters that are hard on a tokenizer."""

PROSE = """\
The ferry left the harbour a little after six, when the lamps along the quay were still burning and the water lay so
flat that each of them had a twin below. There were eleven passengers. Two of them had come to see the seals, one was
going home, and the others did not say. "We shall have wind by noon," said the woman at the wheel, and nobody asked how
she knew. Behind them the town grew small: first the people went, then the windows, and in the end only the church was
left, which stood on its hill as it had for four hundred years and looked at nothing in particular.

By ten o'clock the first clouds had gathered in the west. The captain counted them as other people count coins. It costs
less to turn back early than to turn back late, she used to say; in 31 seasons she had turned back nine times, and she
could name the date of each. The children wanted to know whether seals sleep under water. They do, she told them, and
they come up to breathe without waking, as you turn over in bed.
"""

SOURCE = '''\
import bisect
from collections.abc import Iterable


class Ledger:
    """Amounts by day, kept in order, so that a sum over any stretch of days is two look-ups."""

    def __init__(self, entries: Iterable[tuple[int, float]] = ()):
        self._days: list[int] = []
        self._totals: list[float] = [0.0]
        for day, amount in sorted(entries):
            self._days.append(day)
            self._totals.append(self._totals[-1] + amount)

    def between(self, first: int, last: int) -> float:
        if last < first:
            raise ValueError(f"{last} comes before {first}")
        start = bisect.bisect_left(self._days, first)
        stop = bisect.bisect_right(self._days, last)
        return self._totals[stop] - self._totals[start]


if __name__ == "__main__":
    book = Ledger([(3, 12.5), (1, 4.0), (7, -2.25)])
    assert book.between(1, 3) == 16.5 and book.between(4, 9) == -2.25
    print({"sum": book.between(0, 10), "entries": 3})
'''

_HARD = (
    "",
    " ",
    "  two spaces before,   three within, and some behind  ",
    "tabs\t\tand\r\nline ends\n\n\n",
    "na\u00efve Gr\u00fc\u00dfe,"
    " \u65e5\u672c\u8a9e, \u05e2\u05d1\u05e8\u05d9\u05ea, \U0001f642\U0001f469\u200d\U0001f680",
    "e\u0301 is not \u00e9, \ufb01 is not fi, \uff21 is not A",
    "\u2581 the symbol of a space \u2581\u2581 itself",
    "\ufeffbyte order mark, \u00a0no-break, \u3000wide, \0 and \x7f",
    "aaaaaaa bbbbbb ababababab 0000000 1234567890 ........ ------ ======",
)

SAMPLE_TEXTS = (PROSE, SOURCE, *_HARD)
