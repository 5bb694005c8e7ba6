"""From a checked run to the text that sbatch is given."""

import shlex
import sys
from pathlib import Path

from core.files import ROOT
from launch.jobs.sweep import Job
from launch.slurm.attempts import excluded


def dependency(before: str | None) -> list[str]:
    """Options that let a job wait for the success of another, and end it when that cannot come."""
    return [] if before is None else [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]


def render(each: Job, stage: str, program: str) -> str:
    """The batch script of one stage of a run."""
    template = {"prepare": "prepare", "train": "pretrain"}.get(stage, "eval")
    text = (ROOT / "launch" / "slurm" / f"{template}.sbatch").read_text(encoding="utf-8")
    options = "\n".join(f"#SBATCH {option}" for option in options_of(each, stage))
    return text.replace("@OPTIONS@", options).replace("@SETTINGS@", settings(each, program))


def options_of(each: Job, stage: str) -> list[str]:
    """Options of sbatch: as many machines as the run's cluster, or one for what is not training."""
    slurm, cluster, run = each.submit.slurm, each.config.cluster, each.config.run
    train = stage == "train"
    options = [
        f"--job-name={run.name}-{stage}",
        f"--nodes={cluster.nodes if train else 1}",
        f"--time={slurm.time}",
        f"--output={run.folder.resolve()}/slurm-{stage}-%j.out",
        "--open-mode=append",  # a start after a requeue goes on in the same file
    ]
    if train:
        options += ["--requeue", f"--signal=B:USR1@{slurm.warn_seconds}"]
    for name, value in (("partition", slurm.partition), ("account", slurm.account)):
        options += [f"--{name}={value}"] if value is not None else []
    if slurm.exclusive and train:
        options.append("--exclusive")
    if slurm.gpus and cluster.device.value != "cpu" and stage != "prepare":
        options.append(f"--gpus-per-node={cluster.ranks_per_node if train else 1}")
    if bad := excluded(bad_nodes(each), slurm.strikes):
        options.append(f"--exclude={','.join(bad)}")
    return [*options, *slurm.options]


def settings(each: Job, program: str) -> str:
    """The shell variables that a template reads."""
    slurm = each.submit.slurm
    values = {
        "ROOT": str(ROOT),
        "WORKING_FOLDER": str(Path.cwd()),
        "PYTHON": sys.executable,
        "SCRIPT": program,
        "RUN": str(each.config.run.folder.resolve()),
        "LOGS_OF_STARTS": str(each.config.run.files.logs.resolve()),
        "BAD_NODES": str(bad_nodes(each).resolve()),
        "RANKS": str(each.config.cluster.ranks_per_node),
        "TENSOR_PARALLEL": str(each.config.parallel.tensor_parallel),
        "RESTARTS": str(slurm.restarts),
        "WARN_SECONDS": str(slurm.warn_seconds),
        "CRASHES": str(slurm.crashes),
        "STRIKES": str(slurm.strikes),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(f"OVERRIDES=({' '.join(shlex.quote(word) for word in each.overrides)})")
    return "\n".join(
        lines + [f"export {name}={shlex.quote(value)}" for name, value in slurm.env.items()]
    )


def bad_nodes(each: Job) -> Path:
    """The file of strikes against nodes."""
    return Path(each.submit.slurm.bad_nodes)
