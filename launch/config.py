"""Config section `slurm`: settings of a Slurm submission. Torch-free."""

import re
from dataclasses import dataclass

SECRET = re.compile(r"key|token|secret|password", re.I)


@dataclass
class Slurm:
    """Settings of sbatch, restarts and strikes against nodes."""

    partition: str | None
    account: str | None
    time: str  # limit of one start, in sbatch's format
    warn_seconds: int
    gpus: bool
    exclusive: bool  # no other jobs on the nodes of a training
    options: list[str]
    env: dict[str, str]
    restarts: int
    crashes: int
    strikes: int
    bad_nodes: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            raise ValueError(
                f"slurm.time is {self.time!r}; write DAYS-HOURS:MINUTES:SECONDS, such as 1-00:00:00"
            )
        if min(self.warn_seconds, self.crashes, self.strikes) < 1 or self.restarts < 0:
            raise ValueError(
                "slurm.warn_seconds, crashes and strikes must be at least 1, restarts not negative"
            )
        if invalid := [
            option for option in self.options if not option.startswith("--") or "\n" in option
        ]:
            raise ValueError(
                f"slurm.options {invalid} are not long options of sbatch; write --name=value"
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
