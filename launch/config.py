"""Settings of a Slurm submission, torch-free; values are section `slurm` of configs/config.yaml."""

import re
from dataclasses import dataclass

SECRET = re.compile(r"key|token|secret|password", re.I)


@dataclass
class Slurm:
    """How jobs are put to Slurm."""

    partition: str | None
    account: str | None  # that is charged
    time: str  # of one start, as sbatch writes it
    warn_seconds: int
    gpus: bool
    exclusive: bool  # no other jobs on the run's nodes
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
        if wrong := [
            option for option in self.options if not option.startswith("--") or "\n" in option
        ]:
            raise ValueError(
                f"slurm.options {wrong} are no long options of sbatch; write them as --name=value"
            )
        if wrong := [name for name in self.env if SECRET.search(name)]:
            raise ValueError(
                f"slurm.env would write {wrong} into a script: export them before sbatch instead"
            )
        if wrong := [name for name in self.env if not re.fullmatch(r"[A-Za-z_]\w*", name)]:
            raise ValueError(f"slurm.env {wrong} are no names of environment variables")


@dataclass
class SubmitConfig:
    """The section that only a submission reads; the rest is train.config.RunConfig."""

    slurm: Slurm
