"""A planned run, and on how many ranks it is tried."""

from dataclasses import dataclass, fields, replace
from typing import Any

from launch.planning.estimate import PlannedRun, planned_gpu
from launch.planning.layouts import nearest


@dataclass
class DryRunSettings:
    """What launch/dryrun.py tries."""

    world_size: int | None  # ranks; None takes cluster.nodes x ranks_per_node

    def __post_init__(self) -> None:
        if self.world_size is not None and self.world_size < 1:
            raise ValueError(f"dryrun.world_size is {self.world_size}; give the number of ranks")


@dataclass
class DryRun(PlannedRun):
    """A planned run, and on how many ranks it is tried."""

    dryrun: DryRunSettings

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ValueError(f"{error}{self.way_out()}") from error

    @property
    def ranks(self) -> int:
        """Ranks that the run is tried on."""
        return self.dryrun.world_size or self.cluster.nodes * self.cluster.ranks_per_node

    def way_out(self) -> str:
        """Nearest layout that works, to end a refusal; empty if the layout is not at fault."""
        asked = replace(
            self.parallel,
            micro_batch_tokens=max(
                self.parallel.micro_batch_tokens, *(stage.seq_len for stage in self.data.stages)
            ),
        )
        simple = replace(asked, tensor_parallel=1, context_parallel=1, sequence_parallel=False)
        try:
            sections = {field.name: getattr(self, field.name) for field in fields(PlannedRun)}
            run = PlannedRun(**{**sections, "parallel": simple})
        except ValueError:
            return ""
        if self.ranks < 1:
            return ""
        layout = nearest(run, self.ranks, planned_gpu(self), asked)
        if layout is None:
            return (
                f"; no layout works on {self.ranks} ranks: python launch/plan.py says what each "
                "lacks"
            )
        wanted: dict[str, Any] = {
            "tensor_parallel": layout.tensor_parallel,
            "sequence_parallel": asked.sequence_parallel and layout.tensor_parallel > 1,
            "context_parallel": layout.context_parallel,
            "micro_batch_tokens": asked.micro_batch_tokens,
        }
        changed = [
            f"parallel.{name}={str(value).lower()}"
            for name, value in wanted.items()
            if value != getattr(self.parallel, name)
        ]
        if layout.recompute != self.compute.recompute.value:
            changed.append(f"compute.recompute={layout.recompute}")
        changes = " ".join(changed)
        fits = f"which needs {layout.memory_gib:.1f} GiB of a rank"
        return (
            f"; the nearest layout that works on {self.ranks} ranks: {changes}, {fits}"
            if changes
            else ""
        )
