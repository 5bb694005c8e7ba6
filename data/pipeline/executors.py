"""Where the tasks of a preparation run: processes of this machine, a Slurm cluster, a Ray cluster;
the outputs are the same. A job is (function, *arguments) and gives what JSON can write.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from datatrove.executor.slurm import SlurmPipelineExecutor

from core.errors import InputError
from core.files import ROOT, write_text
from data.config import Executor, ExecutorConfig
from data.pipeline.workers import HEARTBEAT_SECONDS, Job, Workers, say

logger = logging.getLogger(__name__)

# looks at an empty queue before results count as lost: a shared file system may show them late
PATIENCE = 3
Finished = Callable[[str, list[Any]], None]


class Tasks(Protocol):
    """What prepare needs of a place to run."""

    def describe(self) -> str:
        """Where it runs, for the first line of a preparation."""

    def run(self, stage: str, jobs: dict[str, list[Job]], finished: Finished) -> None:
        """Run the jobs of all names; `finished(name, results)` is called here when a name's are all
        done.
        """

    def close(self) -> None:
        """End what was started."""


def open_executor(cfg: ExecutorConfig | None, workers: int, folder: Path) -> Tasks:
    """The place that the config names; processes of this machine without one."""
    count = workers if cfg is None or cfg.workers is None else cfg.workers
    if cfg is None or cfg.kind is Executor.local:
        return Workers(count, folder)
    return SlurmTasks(cfg, count, folder) if cfg.kind is Executor.slurm else RayTasks(cfg, count)


class Jobs:
    """A datatrove pipeline of one step: task `rank` runs job `rank` and leaves its result as
    JSON.
    """

    def __init__(self, jobs: list[Job], results: Path) -> None:
        self.jobs = jobs
        self.results = results

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        function, *arguments = self.jobs[rank]
        result = json.dumps(function(*arguments))
        write_text(self.results / f"{rank:06d}.json", result)


class SlurmArray(SlurmPipelineExecutor):
    """datatrove's array jobs, with requeueing; its job that merges statistics is left out, ours are
    merged here.
    """

    def launch_merge_stats(self) -> None:
        """Nothing."""

    def save_executor_as_json(self, indent: int = 4) -> None:
        """Nothing: jobs are functions."""


class SlurmTasks:
    """One array per stage, watched from here; arrays of a launch that was killed are cancelled
    first.
    """

    def __init__(self, cfg: ExecutorConfig, workers: int, folder: Path) -> None:
        if cfg.partition is None:
            raise InputError("executor=slurm needs executor.partition")
        self.cfg = cfg
        self.workers = workers
        self.folder = folder.resolve()
        self.ids: list[str] = []
        self.record = self.folder / "slurm" / "jobs.txt"
        self.end_orphans()

    def end_orphans(self) -> None:
        """Cancel the arrays of a launch that was killed: they would write the same files as
        ours.
        """
        if self.record.is_file():
            self.ids = self.record.read_text(encoding="utf-8").split()
            self.close()
            while self.running():
                time.sleep(self.cfg.poll_seconds)
            self.record.unlink()
            self.ids = []

    def describe(self) -> str:
        """Where it runs."""
        return f"Slurm partition {self.cfg.partition}, {self.workers} tasks at a time"

    def run(self, stage: str, jobs: dict[str, list[Job]], finished: Finished) -> None:
        """Submit what has no result yet and wait for it."""
        flat = [job for group in jobs.values() for job in group]
        if not flat:
            return
        home = self.folder / "slurm" / stage.replace("/", "-") / f"{time.time_ns()}"
        results = home / "results"
        results.mkdir(parents=True)
        self.submit(stage, flat, home, results)
        started = spoke = time.monotonic()
        done: list[str] = []
        first, past = {}, 0
        for name, group in jobs.items():
            first[name], past = past, past + len(group)
        quiet = 0
        while len(done) < len(jobs):
            quiet = 0 if self.running() else quiet + 1
            here = {int(path.stem) for path in results.glob("*.json")}
            for name in [name for name in jobs if name not in done]:
                ranks = range(first[name], first[name] + len(jobs[name]))
                if here.issuperset(ranks):
                    finished(
                        name,
                        [json.loads((results / f"{rank:06d}.json").read_text()) for rank in ranks],
                    )
                    done.append(name)
            if len(done) < len(jobs) and quiet > PATIENCE:
                missing = sorted(set(range(len(flat))) - here)
                raise InputError(
                    f"{stage}: {len(missing)} of {len(flat)} tasks ended without a result, the "
                    f"first is {missing[0]}; see {home / 'logs'} and {home / 'slurm_logs'}, then "
                    "start the same command again"
                )
            if time.monotonic() - spoke > HEARTBEAT_SECONDS:
                spoke = time.monotonic()
                logger.info(f"  {stage}: {len(here)}/{len(flat)} tasks; {spoke - started:.0f} s")
            time.sleep(self.cfg.poll_seconds if len(done) < len(jobs) else 0)

    def submit(self, stage: str, flat: list[Job], home: Path, results: Path) -> None:
        """Hand the jobs to Slurm as an array."""

        def remember(output: str) -> str:
            self.ids.append(output.split()[-1])
            self.record.write_text("\n".join(self.ids), encoding="utf-8")
            return self.ids[-1]

        array = SlurmArray(
            [Jobs(flat, results)],
            tasks=len(flat),
            time=self.cfg.time,
            partition=str(self.cfg.partition),
            mem_per_cpu_gb=self.cfg.memory_gib,
            workers=self.workers,
            job_name=f"data-{stage.replace('/', '-')}",
            env_command=f"export PYTHONPATH={ROOT} PATH={Path(sys.executable).parent}:$PATH",
            max_array_size=self.cfg.max_array_size,
            tasks_per_job=self.cfg.tasks_per_job,
            logging_dir=str(home),
            qos=self.cfg.qos,
            sbatch_args={"account": self.cfg.account} if self.cfg.account else None,
            requeue=True,
        )
        array.job_id_retriever = remember
        try:
            array.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"sbatch failed ({error}): run this on a login node of the cluster"
            ) from error

    def running(self) -> bool:
        """Whether Slurm still has one of our arrays; an answer of squeue other than a list counts
        as yes.
        """
        if not self.ids:
            return False
        command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(self.ids)}"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if "Invalid job id" in answer.stderr:
            return False
        return answer.returncode != 0 or bool(answer.stdout.strip())

    def close(self) -> None:
        """Cancel what is left of our arrays."""
        if self.ids:
            subprocess.run(["scancel", *self.ids], capture_output=True)


class RayTasks:
    """Remote functions on a Ray cluster that sees the same folder."""

    def __init__(self, cfg: ExecutorConfig, workers: int) -> None:
        import ray

        self.ray = ray
        self.workers = workers
        # no runtime_env: its agent needs ray[default], and every machine has this package installed
        local = {"num_cpus": workers, "include_dashboard": False} if cfg.address is None else {}
        ray.init(address=cfg.address, log_to_driver=False, **local)

    def describe(self) -> str:
        """Where it runs."""
        return f"Ray, {self.workers} tasks at a time"

    def run(self, stage: str, jobs: dict[str, list[Job]], finished: Finished) -> None:
        """Submit all jobs and hand their results over as each name's are complete."""
        run_one = self.ray.remote(max_retries=3)(run_job)
        started = spoke = time.monotonic()
        futures = {name: [run_one.remote(job) for job in group] for name, group in jobs.items()}
        left = list(jobs)
        while left:
            pending = [future for name in left for future in futures[name]]
            done, _ = self.ray.wait(pending, num_returns=len(pending), timeout=1.0)
            for name in [name for name in left if set(futures[name]) <= set(done)]:
                try:
                    results = self.ray.get(futures[name])
                except self.ray.exceptions.RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                finished(name, results)
                left.remove(name)
            if time.monotonic() - spoke > HEARTBEAT_SECONDS:
                spoke = time.monotonic()
                tasks = {
                    name: (len(set(futures[name]) & set(done)), len(futures[name])) for name in left
                }
                say(stage, tasks, None, spoke - started)

    def close(self) -> None:
        """Leave the cluster."""
        self.ray.shutdown()


def run_job(job: Job) -> Any:
    """Call a job."""
    function, *arguments = job
    return function(*arguments)
