"""curves.png: loss per source, rate, batch and context over tokens."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from core.run import RunFiles
from train.metrics.records import Record, read_lines


def draw(folder: Path) -> Path:
    """Loss per source, rate, batch and context over tokens; returns the picture's path."""
    records = [
        record for record in read_lines(RunFiles(folder).metrics) if record["loss"] is not None
    ]
    tokens = [record["tokens"] for record in records]
    figure, axes = pyplot.subplots(4, 1, figsize=(9, 11), sharex=True, height_ratios=[3, 1, 1, 1])
    _losses(axes[0], records, tokens)
    for axis, key, label in zip(
        axes[1:],
        ("lr", "batch", "seq_len"),
        ("lr", "batch, sequences", "context, tokens"),
        strict=True,
    ):
        axis.plot(tokens, [record[key] for record in records], drawstyle="steps-pre")
        axis.set_ylabel(label)
    axes[-1].set_xlabel("tokens")
    for axis in axes:
        axis.grid(alpha=0.3)
        for before, after in zip(records, records[1:], strict=False):
            if before["stage"] != after["stage"]:
                axis.axvline(before["tokens"], color="gray", linestyle=":")
    figure.tight_layout()
    path = RunFiles(folder).curves
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _losses(axis: Any, records: list[Record], tokens: list[int]) -> None:
    for name in sorted({name for record in records for name in record["source_loss"]}):
        rows = [record for record in records if name in record["source_loss"]]
        axis.plot(
            [row["tokens"] for row in rows],
            [row["source_loss"][name] for row in rows],
            linewidth=0.7,
            label=name,
        )
    axis.plot(
        tokens, [record["loss"] for record in records], color="black", linewidth=1.4, label="all"
    )
    axis.set_ylabel("loss, nats per token")
    axis.legend(ncols=3, fontsize="small")
