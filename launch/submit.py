"""Start runs: checked here first, then by Slurm or one after another on this machine."""

import argparse
import json
import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras, format_commands

explain_missing_extras()

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from core import log
from core.command import config_keys, format_error
from core.errors import InputError, exit_with_error
from core.files import write_json
from launch.config import SubmitConfig
from launch.jobs.local import run_here
from launch.jobs.sweep import SCRIPTS, SWEEP, Job, Sweep, job, sweep
from launch.slurm.script import dependency, render
from train.config import RunConfig
from train.costs.memory import GIB, check_memory

logger = logging.getLogger(__name__)
EXAMPLES = """examples:
  python launch/submit.py +experiment=7b cluster=h100_32n --dry-run
  python launch/submit.py +experiment=7b slurm.partition=h100 --stages prepare,train,export,eval
  python launch/submit.py -m +experiment=130m optim.lr=1e-4,3e-4 schedule.decay_tokens=1e9,2e9
  python launch/submit.py -m +experiment=demo +sweep=norms --local --stages prepare,train
"""


def main() -> int:
    """Check every run, then show, start or submit all of them."""
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
        "--name", help="of the sweep; otherwise its file's, or the keys that it varies"
    )
    parser.add_argument(
        "--stages", default="train", help="of prepare,train,export,eval, each after the one before"
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="on this machine, one after another, instead of by Slurm",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check, and show what would be submitted or run"
    )
    given, overrides = parser.parse_known_args()
    stages = given.stages.split(",")
    if stages != [stage for stage in SCRIPTS if stage in stages]:
        raise InputError(
            f"--stages {given.stages}: name some of {','.join(SCRIPTS)}, in this order"
        )
    if wrong := [word for word in overrides if word.startswith("-")]:
        raise InputError(f"unknown option {wrong[0]}; --help lists them")
    found, jobs = sweep(overrides, given.name) if given.multirun else (None, [job(overrides)])
    for each in jobs:
        check(each)
    logger.info(f"{len(jobs)} {'runs' if len(jobs) > 1 else 'run'} checked")
    if found is not None and not given.dry_run:
        record(found)
    if given.local:
        return run_here(jobs, stages, given.dry_run)
    return submit(jobs, stages, given.dry_run)


def check(each: Job) -> None:
    """What a login node can tell of a run before it waits in a queue."""
    cluster = each.config.cluster
    if cluster.memory_gib is not None:
        device = "cpu" if cluster.device.value == "cpu" else "cuda"
        ranks = cluster.nodes * cluster.ranks_per_node
        check_memory(
            each.config, ranks, cluster.ranks_per_node, device, int(cluster.memory_gib * GIB)
        )


def record(found: Sweep) -> None:
    """sweep.json in the sweep's folder: what tells its runs apart, for launch/collect.py."""
    path = Path(found.folder, SWEEP)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text(encoding="utf-8"))["points"] if path.is_file() else {}
    write_json(path, {"points": known | found.points})


def submit(jobs: list[Job], stages: list[str], dry_run: bool) -> int:
    """Hand every stage of every run to sbatch, each after the one before it."""
    if not dry_run and shutil.which("sbatch") is None:
        raise InputError("sbatch is not here: submit on a login node, or run here with --local")
    prepared: dict[str, str] = {}  # data folder -> its job, which runs of one sweep share
    for each in jobs:
        before = None
        for stage in stages:
            if stage == "prepare" and each.config.data.folder in prepared:
                before = prepared[each.config.data.folder]
                continue
            script = render(each, stage, SCRIPTS[stage])
            command = ["sbatch", "--parsable", *dependency(before)]
            if dry_run:
                print(f"\n# {shlex.join(command)} <<'END'\n{script}END")
                before = f"${stage.upper()}"
            else:
                each.config.run.folder.mkdir(parents=True, exist_ok=True)
                result = subprocess.run(command, input=script, capture_output=True, text=True)
                if result.returncode:
                    raise InputError(
                        f"sbatch refuses {each.config.run.name}: {result.stderr.strip()}"
                    )
                before = result.stdout.strip().split(";")[0]
                logger.info(f"{before}  {each.config.run.name}  {stage}")
            if stage == "prepare":
                prepared[each.config.data.folder] = before
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (InputError, HydraException, OmegaConfBaseException, OSError) as error:
        known = [*config_keys(RunConfig), *config_keys(SubmitConfig)]
        exit_with_error(format_commands(format_error(error, known)))
