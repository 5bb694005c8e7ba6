"""Config section `slurm`: settings of a Slurm submission. Torch-free."""

import re
from dataclasses import dataclass
from typing import Annotated

from core.ranges import Count, Range, Whole

SECRET = re.compile(r"key|token|secret|password", re.I)


@dataclass
class Slurm:
    """Settings of sbatch, restarts and strikes against nodes."""

    partition: str | None
    account: str | None  # Slurm account that is charged
    time: str  # limit of one start, in sbatch's format
    warn_seconds: Annotated[int, Range(1, 65535)]
    gpus: bool
    exclusive: bool  # no other jobs on the nodes of a training
    sbatch_options: list[str]
    env: dict[str, str]
    max_restarts: Whole
    max_crashes: Count
    max_strikes: Count
    bad_nodes_file: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(
                f"slurm.time is {self.time!r}; write DAYS-HOURS:MINUTES:SECONDS, such as 1-00:00:00"
            )
        if invalid := [option for option in self.sbatch_options if not option.startswith("--")]:
            raise ValueError(
                f"slurm.sbatch_options {invalid} are not long options of sbatch; write --name=value"
            )
        if secrets := [name for name in self.env if SECRET.search(name)]:
            raise ValueError(
                f"slurm.env would write {secrets} into a script: export them before sbatch instead"
            )
        if invalid := [name for name in self.env if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"slurm.env {invalid} are not names of environment variables")


@dataclass
class SubmitConfig:
    """The section that only launch/submit.py reads, beside train.config.RunConfig."""

    slurm: Slurm
