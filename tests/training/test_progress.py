"""Progress: a bar on a terminal, plain lines elsewhere."""

import io

from latentjax.training.progress import TrainProgress

LINE = {"step": 20, "loss": 2.5, "tokens_per_second": 12345.6, "mfu": 0.4567}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_line_has_everything():
    stream = io.StringIO()
    evaluation = {"eval_loss": 2.25, "eval_bits_per_byte": 1.5, "thought_residual": 0.02}
    TrainProgress(0, 100, stream).show(LINE | evaluation, 3725)
    text = stream.getvalue()
    assert "\r" not in text
    for part in ("20/100", "2.5000", "2.2500", "1.5000 bits/byte", "0.020", "12,346 tokens/s", "45.7%", "1:02:05 left"):
        assert part in text


def test_terminal_gets_a_bar_and_keeps_evaluations():
    stream = Terminal()
    progress = TrainProgress(19, 100, stream)
    progress.advance()
    progress.show(LINE | {"eval_loss": 2.25, "eval_bits_per_byte": 1.5}, 80.0)
    progress.close()
    text = stream.getvalue()
    assert "20/100 steps" in text
    assert "MFU 45.7%" in text
    assert "eval loss 2.2500" in text
    assert "\r" in text
