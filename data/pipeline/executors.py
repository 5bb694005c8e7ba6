"""Where the tasks of a preparation run: processes of this machine, a Slurm cluster, a Ray cluster;
the outputs are the same. A job is (function, *arguments) and gives what JSON can write.
"""

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from datatrove.executor.slurm import SlurmPipelineExecutor

from core.errors import InputError
from core.files import ROOT, write_text
from data.config import Executor, ExecutorConfig
from data.pipeline.workers import start_worker

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
# looks at an empty queue before results count as lost: a shared file system may show them late
PATIENCE = 3
Job = tuple[Any, ...]  # function and its arguments
Split = tuple["set[Future[Any]]", "set[Future[Any]]"]  # those that have ended, and the others


def open_executor(cfg: ExecutorConfig | None, workers: int, folder: Path) -> "Tasks":
    """The place that the config names; processes of this machine without one."""
    count = workers if cfg is None or cfg.workers is None else cfg.workers
    if cfg is None or cfg.kind is Executor.local:
        return Workers(count, folder)
    return SlurmTasks(cfg, count, folder) if cfg.kind is Executor.slurm else RayTasks(cfg, count)


class Tasks(ABC):
    """A place to run, with a line on the terminal at least every ten seconds."""

    building: Path | None = None  # whose size is a sign of life
    hint = ""  # for whoever reads the traceback of a job's error

    def __init__(self) -> None:
        self.started = time.monotonic()

    @abstractmethod
    def describe(self) -> str:
        """Where it runs, for the first line of a preparation."""

    @abstractmethod
    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        """Begin jobs, of which there is at least one."""

    @abstractmethod
    def close(self) -> None:
        """End what was started."""

    def wait(self, pending: "set[Future[Any]]", seconds: float) -> Split:
        """Wait for a job to end, about so long."""
        return wait(pending, seconds, FIRST_COMPLETED)

    def say(self, stage: str, line: str) -> None:
        """One line of progress with the seconds since the start."""
        logger.info(f"{stage:<10} {line}  ({time.monotonic() - self.started:.1f} s)")

    def run(self, stage: str, jobs: dict[str, list[Job]]) -> Iterator[tuple[str, list[Any]]]:
        """Run the jobs of all names together; yields each name with its results when all are there.

        The first error cancels what has not begun, and is raised as it was.
        """
        flat = [job for group in jobs.values() for job in group]
        futures = iter(self.submit(stage, flat) if flat else ())
        groups = {name: [next(futures) for _ in group] for name, group in jobs.items()}
        pending = {future for group in groups.values() for future in group}
        spoke = time.monotonic()
        while groups:
            silent = time.monotonic() - spoke
            done, pending = self.wait(pending, max(0.0, HEARTBEAT_SECONDS - silent))
            self.raise_error(done, pending)
            for name in [name for name in groups if not pending.intersection(groups[name])]:
                yield name, [future.result() for future in groups.pop(name)]
                spoke = time.monotonic()
            if time.monotonic() >= spoke + HEARTBEAT_SECONDS:
                self.show(stage, groups)
                spoke = time.monotonic()

    def raise_error(self, done: "set[Future[Any]]", pending: "set[Future[Any]]") -> None:
        """Raise the first error of finished jobs, after cancelling what has not begun."""
        for error in filter(None, (future.exception() for future in done)):
            for other in pending:
                other.cancel()
            if self.hint:
                error.add_note(self.hint)
            raise error

    def show(self, stage: str, groups: "dict[str, list[Future[Any]]]") -> None:
        """One line: tasks done of all per name, and bytes on disk so far."""
        done = ", ".join(
            f"{name} {sum(future.done() for future in group)}/{len(group)}"
            for name, group in groups.items()
        )
        size = ""
        if self.building is not None:
            files = (
                Path(root, name) for root, _, names in os.walk(self.building) for name in names
            )
            size = f"; {sum(file.stat().st_size for file in files if file.exists()) / 1e6:.1f} MB"
        logger.info(f"  {stage}: {done} tasks{size}; {time.monotonic() - self.started:.0f} s")


class Workers(Tasks):
    """Forked processes: they inherit the parent's imports, which take seconds."""

    def __init__(self, count: int, folder: Path) -> None:
        super().__init__()
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.count, self.building = count, folder / "building"
        self.hint = f"the workers' logs are in {logs}"
        context = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(
            count, context, initializer=start_worker, initargs=(str(logs),)
        )

    def describe(self) -> str:
        """Where it runs."""
        return f"{self.count} workers"

    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        """Queue the jobs."""
        return [self.pool.submit(*job) for job in jobs]

    def close(self) -> None:
        """End the processes; jobs that have not begun are dropped."""
        self.pool.shutdown(cancel_futures=True)


class Jobs:
    """A one-step datatrove pipeline: task `rank` runs job `rank` and saves its result as JSON."""

    def __init__(self, jobs: list[Job], results: Path) -> None:
        self.jobs = jobs
        self.results = results

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        write_text(self.results / f"{rank:06d}.json", json.dumps(run_job(self.jobs[rank])))


class SlurmArray(SlurmPipelineExecutor):
    """datatrove's array jobs, with requeueing, without its merging of statistics: we merge them."""

    def launch_merge_stats(self) -> None:
        """Nothing."""

    def save_executor_as_json(self, indent: int = 4) -> None:
        """Nothing: jobs are functions."""


class SlurmTasks(Tasks):
    """One array per stage, watched from here; cancels the arrays of a killed launch first."""

    def __init__(self, cfg: ExecutorConfig, workers: int, folder: Path) -> None:
        super().__init__()
        if cfg.partition is None:
            raise InputError("executor=slurm needs executor.partition")
        self.cfg = cfg
        self.workers = workers
        self.folder = folder.resolve()
        self.ids: list[str] = []
        self.left: dict[int, Future[Any]] = {}  # by task of the array
        self.record = self.folder / "slurm" / "jobs.txt"
        self.end_orphans()

    def end_orphans(self) -> None:
        """Cancel the arrays of a killed launch, which would write the same files as ours."""
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

    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        """Hand the jobs to Slurm as an array."""
        self.home = self.folder / "slurm" / stage.replace("/", "-") / f"{time.time_ns()}"
        self.results = self.home / "results"
        self.results.mkdir(parents=True)
        self.stage, self.quiet = stage, 0
        futures: list[Future[Any]] = [Future() for _ in jobs]
        self.left = dict(enumerate(futures))
        try:
            self.array(stage, jobs).run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"sbatch failed ({error}): run this on a login node of the cluster"
            ) from error
        return futures

    def array(self, stage: str, jobs: list[Job]) -> SlurmArray:
        """The array of a stage, which notes its ids when it is submitted."""

        def remember(output: str) -> str:
            self.ids.append(output.split()[-1])
            self.record.write_text("\n".join(self.ids), encoding="utf-8")
            return self.ids[-1]

        array = SlurmArray(
            [Jobs(jobs, self.results)],
            tasks=len(jobs),
            time=self.cfg.time,
            partition=str(self.cfg.partition),
            mem_per_cpu_gb=self.cfg.memory_gib,
            workers=self.workers,
            job_name=f"data-{stage.replace('/', '-')}",
            env_command=f"export PYTHONPATH={ROOT} PATH={Path(sys.executable).parent}:$PATH",
            max_array_size=self.cfg.max_array_size,
            tasks_per_job=self.cfg.tasks_per_job,
            logging_dir=str(self.home),
            qos=self.cfg.qos,
            sbatch_args={"account": self.cfg.account} if self.cfg.account else None,
            requeue=True,
        )
        array.job_id_retriever = remember
        return array

    def wait(self, pending: "set[Future[Any]]", seconds: float) -> Split:
        """Look for results, and give Slurm its time where there are none."""
        self.take_results()
        return super().wait(pending, self.cfg.poll_seconds)

    def take_results(self) -> None:
        """Complete futures of ended jobs; raises InputError if the array ended without all."""
        self.quiet = 0 if self.running() else self.quiet + 1
        here = {int(path.stem) for path in self.results.glob("*.json")}
        for rank in sorted(here & self.left.keys()):
            result = json.loads((self.results / f"{rank:06d}.json").read_text(encoding="utf-8"))
            self.left.pop(rank).set_result(result)
        if self.left and self.quiet > PATIENCE:
            raise InputError(
                f"{self.stage}: {len(self.left)} of {len(here) + len(self.left)} tasks ended "
                f"without a result, the first is {min(self.left)}; see {self.home / 'logs'} and "
                f"{self.home / 'slurm_logs'}, then start the same command again"
            )

    def running(self) -> bool:
        """Whether Slurm still lists one of our arrays; an answer that is no list counts as yes."""
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


class RayTasks(Tasks):
    """Remote functions on a Ray cluster that sees the same folder."""

    def __init__(self, cfg: ExecutorConfig, workers: int) -> None:
        super().__init__()
        import ray

        self.ray = ray
        self.workers = workers
        # no runtime_env: its agent needs ray[default], and every machine has this package installed
        local = {"num_cpus": workers, "include_dashboard": False} if cfg.address is None else {}
        ray.init(address=cfg.address, log_to_driver=False, **local)

    def describe(self) -> str:
        """Where it runs."""
        return "Ray, as many tasks at a time as it has processors for"

    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        """Queue the jobs; one whose machine dies is tried three times more."""
        run_one = self.ray.remote(max_retries=3)(run_job)
        return [run_one.remote(job).future() for job in jobs]

    def close(self) -> None:
        """Leave the cluster."""
        self.ray.shutdown()


def run_job(job: Job) -> Any:
    """Call a job."""
    function, *arguments = job
    return function(*arguments)
