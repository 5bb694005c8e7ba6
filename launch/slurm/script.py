"""Render the batch script of a job."""

import re
import shlex
import sys
from pathlib import Path

from core.files import ROOT
from core.quote import sbatch_directive, sbatch_output
from launch.jobs.sweep import Job
from launch.slurm.attempts import excluded_nodes


def dependency_options(previous: str | None) -> list[str]:
    """sbatch options that start a job after `previous` succeeds and cancel it if that fails."""
    if previous is None:
        return []
    return [f"--dependency=afterok:{previous}", "--kill-on-invalid-dep=yes"]


def render(job: Job, stage: str, program: str) -> str:
    """Fill in the batch script of one stage of a run."""
    template = {"prepare": "prepare", "train": "pretrain"}.get(stage, "eval")
    text = (ROOT / "launch" / "slurm" / f"{template}.sbatch").read_text(encoding="utf-8")
    parts = {
        "@OPTIONS@": "\n".join(map(sbatch_directive, sbatch_options(job, stage))),
        "@SETTINGS@": script_variables(job, program),
    }
    return re.sub("|".join(parts), lambda match: parts[match[0]], text)


def sbatch_options(job: Job, stage: str) -> list[str]:
    """Options of sbatch; stages other than training use one node."""
    slurm = job.submit.slurm
    cluster = job.config.cluster
    run = job.config.run
    is_training = stage == "train"
    options = [
        f"--job-name={run.name}-{stage}",
        f"--nodes={cluster.nodes if is_training else 1}",
        f"--time={slurm.time}",
        sbatch_output(run.folder, f"slurm-{stage}-%j.out"),
        "--open-mode=append",  # starts after a requeue append to the same file
    ]
    if is_training:
        options += ["--requeue", f"--signal=B:USR1@{slurm.warn_seconds}"]
    for name, value in (("partition", slurm.partition), ("account", slurm.account)):
        options += [f"--{name}={value}"] if value is not None else []
    if slurm.exclusive and is_training:
        options.append("--exclusive")
    if slurm.gpus and cluster.device.value != "cpu" and stage != "prepare":
        options.append(f"--gpus-per-node={cluster.ranks_per_node if is_training else 1}")
    if bad := excluded_nodes(bad_nodes_file(job), slurm.max_strikes):
        options.append(f"--exclude={','.join(bad)}")
    return [*options, *slurm.sbatch_options]


def script_variables(job: Job, program: str) -> str:
    """Shell variables that a template reads."""
    slurm = job.submit.slurm
    values = {
        "ROOT": str(ROOT),
        "WORKING_FOLDER": str(Path.cwd()),
        "PYTHON": sys.executable,
        "SCRIPT": program,
        "RUN": str(job.config.run.folder.resolve()),
        "LOG_DIR": str(job.config.run.files.logs.resolve()),
        "BAD_NODES": str(bad_nodes_file(job).resolve()),
        "RANKS": str(job.config.cluster.ranks_per_node),
        "TENSOR_PARALLEL": str(job.config.parallel.tensor_parallel),
        "RESTARTS": str(slurm.max_restarts),
        "WARN_SECONDS": str(slurm.warn_seconds),
        "CRASHES": str(slurm.max_crashes),
        "STRIKES": str(slurm.max_strikes),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    lines.append(f"OVERRIDES=({' '.join(shlex.quote(word) for word in job.arguments)})")
    return "\n".join(
        lines + [f"export {name}={shlex.quote(value)}" for name, value in slurm.env.items()]
    )


def bad_nodes_file(job: Job) -> Path:
    """File of strikes against nodes."""
    return Path(job.submit.slurm.bad_nodes_file)
