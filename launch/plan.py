"""What a run needs, before anything is allocated: `python launch/plan.py +experiment=7b`."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.table import Table

from data.command import command
from model.flops import parameter_count, train_flops_per_token
from train.config import RunConfig
from train.plan import GIB, days, needs
from train.schedule import Schedule

MFU = (0.2, 0.4, 0.6)  # the published run's, a good transformer's, and near this model's roofline


@command(RunConfig)
def main(config: RunConfig) -> None:
    """Print size, memory, compute, time and the stages' edges."""
    cluster = config.cluster
    ranks = cluster.nodes * cluster.ranks_per_node
    need = needs(config, ranks)
    rows = Table(title=f"{config.run.name} on {ranks} ranks", show_header=False)
    rows.add_row("parameters", f"{parameter_count(config.model):,}")
    rows.add_row("tokens", f"{config.tokens:,}")
    rows.add_row("training FLOPs per token", f"{train_flops_per_token(config.model):.4g}")
    rows.add_row("training FLOPs", f"{train_flops_per_token(config.model) * config.tokens:.3g}")
    for name in ("parameters", "gradients", "optimizer", "activations", "buffers", "total"):
        rows.add_row(f"memory of a rank, {name}", f"{getattr(need, name) / GIB:.1f} GiB")
    if cluster.memory_gib is not None:
        rows.add_row("memory of a rank, present", f"{cluster.memory_gib:.0f} GiB")
    rows.add_row(
        "checkpoint", f"{12 * parameter_count(config.model) / GIB:.1f} GiB, {config.checkpoint.keep_last} kept"
    )
    if cluster.peak_tflops is not None:
        for mfu in MFU:
            rows.add_row(f"days at {mfu:.0%} MFU", f"{days(config, ranks, mfu, cluster.peak_tflops):.1f}")
    Console().print(rows)
    Console().print(stages(config))


def stages(config: RunConfig) -> Table:
    """Where each stage begins, and what its first step does."""
    schedule = Schedule(config.schedule, config.data)
    grid = Table("stage", "from token", "context", "batch", "lr")
    begin = 0
    for end, seq_len, name in schedule.edges:
        now = schedule.at(begin)
        grid.add_row(name, f"{begin:,}", f"{seq_len:,}", f"{now.batch:,}", f"{now.lr:.3g}")
        begin = end
    return grid


if __name__ == "__main__":
    main()
