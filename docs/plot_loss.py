"""Draws held-out bits per byte and training loss of runs side by side, from their metrics.jsonl.

python docs/plot_loss.py runs/quickstart runs/quickstart-vanilla --output docs/quickstart.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from latentjax.training.metrics import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--labels", nargs="+", help="one per run (default: their directories' names)")
    parser.add_argument("--output", type=Path, required=True)
    flags = parser.parse_args()
    labels = flags.labels or [run.name for run in flags.runs]

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for run, label, colour in zip(flags.runs, labels, plt.cm.tab10.colors, strict=False):
        lines = read_metrics(run / "metrics.jsonl")
        left.plot([line["step"] for line in lines], [line["loss"] for line in lines], color=colour, label=label)
        evaluated = [line for line in lines if "eval_loss" in line]
        steps, bits = zip(*((line["step"], line["eval_bits_per_byte"]) for line in evaluated), strict=True)
        right.plot(steps, bits, "o-", color=colour, label=f"{label}: {bits[-1]:.3f} at the end")
    left.set(xlabel="step", ylabel="training loss (nats per token)", title="training batches")
    right.set(xlabel="step", ylabel="bits per byte", title="held-out files")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(flags.output, dpi=120)


if __name__ == "__main__":
    main()
