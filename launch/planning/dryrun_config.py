"""Config of launch/dryrun.py: a planned run and a number of ranks."""

from dataclasses import dataclass, fields, replace
from typing import Any

from launch.planning.estimate import PlannedRun, planned_gpu
from launch.planning.layouts import nearest_layout
from train.config import Ranks


@dataclass
class DryRunSettings:
    """Section `dryrun` of the config."""

    world_size: Ranks | None  # ranks; None takes cluster.nodes x ranks_per_node


@dataclass
class DryRunConfig(PlannedRun):
    """A planned run and the number of simulated ranks."""

    dryrun: DryRunSettings

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"{error}{self.suggestion()}") from error

    @property
    def ranks(self) -> int:
        return self.dryrun.world_size or self.cluster.nodes * self.cluster.ranks_per_node

    def suggestion(self) -> str:
        """End of an error message: the nearest layout that runs; empty if no layout would help."""
        seq_lens = [stage.seq_len for stage in self.data.stages]
        requested = replace(
            self.parallel,
            micro_batch_tokens=max(self.parallel.micro_batch_tokens, *seq_lens),
        )
        one_rank = replace(
            requested, tensor_parallel=1, context_parallel=1, sequence_parallel=False
        )
        sections = {field.name: getattr(self, field.name) for field in fields(PlannedRun)}
        try:
            run = PlannedRun(**{**sections, "parallel": one_rank})
        except ValueError:
            return ""
        if self.ranks < 1:
            return ""
        layout = nearest_layout(run, self.ranks, planned_gpu(self), requested)
        if layout is None:
            return (
                f"; no layout runs on {self.ranks} ranks: python launch/plan.py lists the reasons"
            )
        suggested: dict[str, Any] = {
            "tensor_parallel": layout.tensor_parallel,
            "sequence_parallel": requested.sequence_parallel and layout.tensor_parallel > 1,
            "context_parallel": layout.context_parallel,
            "micro_batch_tokens": requested.micro_batch_tokens,
        }
        changed = [
            f"parallel.{name}={str(value).lower()}"
            for name, value in suggested.items()
            if value != getattr(self.parallel, name)
        ]
        if layout.recompute != self.compute.recompute.value:
            changed.append(f"compute.recompute={layout.recompute}")
        if not changed:
            return ""
        return (
            f"; nearest layout that runs on {self.ranks} ranks: {' '.join(changed)}, "
            f"{layout.memory_gib:.1f} GiB per rank"
        )
