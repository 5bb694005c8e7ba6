"""Check runs, then submit them to Slurm or run them on this machine one after another."""

import argparse
import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from core import log
from core.command import CONFIG_ERRORS
from core.config_errors import format_error
from core.errors import InputError, exit_with_error
from core.files import make_folder
from core.overrides import check_config_dir
from core.schema import config_keys
from launch.jobs.local import run_jobs
from launch.jobs.sweep import SCHEMAS, SCRIPTS, Job, compose_job, compose_sweep
from launch.planning.run_checks import data, file_system, preparation, weights
from launch.slurm.script import dependency_options, render
from train.costs.memory import GIB, check_memory

logger = logging.getLogger(__name__)
EXAMPLES = """examples:
  python launch/submit.py +experiment=7b cluster=h100_32n --stages prepare,train --dry-run
  python launch/submit.py +experiment=7b slurm.partition=h100 --stages prepare,train,export,eval
  python launch/submit.py -m +experiment=130m optim.lr=1e-4,3e-4 schedule.decay_tokens=1e9,2e9
  python launch/submit.py -m +experiment=demo +sweep=norms --local --stages prepare,train
"""


def main() -> int:
    """Check every run, then show, run or submit all of them."""
    log.init_logger()
    parser = argparse.ArgumentParser(
        prog=format_commands("python launch/submit.py"),
        description=__doc__,
        epilog=format_commands(EXAMPLES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-m",
        "--multirun",
        action="store_true",
        help="one run per point of a sweep, in runs/sweeps/NAME",
    )
    parser.add_argument(
        "--name", help="name of the sweep; default: the sweep's file, or the swept keys"
    )
    parser.add_argument(
        "--stages",
        default="train",
        help="some of prepare,train,export,eval; each starts after the previous one",
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="run on this machine, one after another, instead of by Slurm",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and print what would be submitted or run"
    )
    parser.add_argument("--config-dir", metavar="FOLDER", help="configs of your own, beside ours")
    args, overrides = parser.parse_known_args()
    check_config_dir(args.config_dir)
    stages = args.stages.split(",")
    if stages != [stage for stage in SCRIPTS if stage in stages]:
        raise InputError(f"--stages {args.stages}: name some of {','.join(SCRIPTS)}, in this order")
    if unknown := [word for word in overrides if word.startswith("-")]:
        raise InputError(f"unknown option {unknown[0]}; --help lists all options")
    sweep = None
    if args.multirun:
        sweep, jobs = compose_sweep(overrides, args.name, args.config_dir)
    else:
        jobs = [compose_job(overrides, args.config_dir)]
    for job in jobs:
        check(job, stages)
    logger.info(f"{len(jobs)} {'runs' if len(jobs) > 1 else 'run'} checked")
    if sweep is not None and not args.dry_run:
        sweep.write()
    if args.local:
        return run_jobs(jobs, stages, args.dry_run)
    return submit(jobs, stages, args.dry_run)


def check(job: Job, stages: list[str]) -> None:
    """Check that a run fits its devices' memory, its folders, initial weights, and its data or
    their preparation.

    Raises InputError with the fix.
    """
    cluster = job.config.cluster
    if cluster.memory_gib is not None:
        device = "cpu" if cluster.device.value == "cpu" else "cuda"
        ranks = cluster.nodes * cluster.ranks_per_node
        available = int(cluster.memory_gib * GIB)
        check_memory(job.config, ranks, cluster.ranks_per_node, device, available)
    findings = [file_system(job.config)]
    if "prepare" in stages:
        preparation(job.config)
    elif stages != ["export"]:
        findings.append(data(job.config))
    if "train" in stages:
        findings.append(weights(job.config))
    for finding in findings:
        if finding.state == "bad":
            raise InputError(f"{job.config.run.name}: {finding.text}: {finding.fix}")
        if finding.state == "note":
            logger.warning(f"{job.config.run.name}: {finding.text}: {finding.fix}")


def submit(jobs: list[Job], stages: list[str], dry_run: bool) -> int:
    """Submit every stage of every run with sbatch, each after the previous stage."""
    if not dry_run and shutil.which("sbatch") is None:
        raise InputError("no sbatch here: submit on a login node, or add --local")
    prepare_jobs: dict[str, str] = {}  # data folder -> job number; runs of a sweep share it
    for job in jobs:
        run = job.config.run
        data_folder = job.config.data.folder
        previous = None
        for stage in stages:
            if stage == "prepare" and data_folder in prepare_jobs:
                previous = prepare_jobs[data_folder]
                continue
            script = render(job, stage, SCRIPTS[stage])
            command = ["sbatch", "--parsable", *dependency_options(previous)]
            if dry_run:
                end = "END"
                while end in script.splitlines():
                    end += "_"
                print(f"\n# {shlex.join(command)} <<'{end}'\n{script}{end}")
                previous = f"${stage.upper()}"
            else:
                make_folder(run.folder)
                result = subprocess.run(command, input=script, capture_output=True, text=True)
                if result.returncode:
                    raise InputError(f"sbatch refuses {run.name}: {result.stderr.strip()}")
                previous = result.stdout.strip().split(";")[0]
                logger.info(f"{previous}  {run.name}  {stage}")
            if stage == "prepare":
                prepare_jobs[data_folder] = previous
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CONFIG_ERRORS as error:
        keys = [key for schema in SCHEMAS for key in config_keys(schema)]
        exit_with_error(format_commands(format_error(error, keys)))
