"""Executors of a preparation's jobs: local processes, a Slurm cluster, a Ray cluster.

A job is (function, *arguments) and returns a value that JSON can hold. Every executor gives the
same outputs.
"""

import json
import logging
import multiprocessing
import os
import re
import shlex
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
from core.files import ROOT, make_folder, write_text
from core.records import read_required
from data.config import Executor, ExecutorConfig
from data.pipeline.workers import init_worker

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
# polls of an empty queue before results count as lost: a shared file system may show them late
MAX_EMPTY_POLLS = 3
Job = tuple[Any, ...]  # function and its arguments
DoneAndPending = tuple["set[Future[Any]]", "set[Future[Any]]"]


def open_executor(cfg: ExecutorConfig | None, workers: int, folder: Path) -> "TaskExecutor":
    """The executor that the config names; local processes if there is no config."""
    count = workers if cfg is None or cfg.workers is None else cfg.workers
    if cfg is None or cfg.kind is Executor.local:
        return LocalExecutor(count, folder)
    if cfg.kind is Executor.slurm:
        return SlurmExecutor(cfg, count, folder)
    return RayExecutor(cfg, count)


class TaskExecutor(ABC):
    """Runs jobs, and logs a line of progress at least every ten seconds."""

    build_dir: Path | None = None  # its size is part of the progress line
    hint = ""  # note added to a job's error

    def __init__(self) -> None:
        self.started_at = time.monotonic()

    @abstractmethod
    def describe(self) -> str:
        """Where jobs run, for the first line of a preparation."""

    @abstractmethod
    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        """Submit at least one job."""

    @abstractmethod
    def close(self) -> None:
        """Stop what this executor started."""

    def wait(self, pending: "set[Future[Any]]", seconds: float) -> DoneAndPending:
        """Wait until a job ends, at most about `seconds`."""
        return wait(pending, seconds, FIRST_COMPLETED)

    def log(self, stage: str, message: str) -> None:
        """Log one line of progress with the seconds since the start."""
        logger.info(f"{stage:<10} {message}  ({time.monotonic() - self.started_at:.1f} s)")

    def run(self, stage: str, jobs: dict[str, list[Job]]) -> Iterator[tuple[str, list[Any]]]:
        """Run the jobs of all names together; yields a name and its results when all are complete.

        The first error of a job cancels the jobs that have not started, and is raised.
        """
        flat = [job for group in jobs.values() for job in group]
        futures = iter(self.submit(stage, flat) if flat else ())
        groups = {name: [next(futures) for _ in group] for name, group in jobs.items()}
        pending = {future for group in groups.values() for future in group}
        logged_at = time.monotonic()
        while groups:
            elapsed = time.monotonic() - logged_at
            done, pending = self.wait(pending, max(0.0, HEARTBEAT_SECONDS - elapsed))
            self.raise_first_error(done, pending)
            for name in [name for name in groups if not pending.intersection(groups[name])]:
                yield name, [future.result() for future in groups.pop(name)]
                logged_at = time.monotonic()
            if time.monotonic() >= logged_at + HEARTBEAT_SECONDS:
                self.log_progress(stage, groups)
                logged_at = time.monotonic()

    def raise_first_error(self, done: "set[Future[Any]]", pending: "set[Future[Any]]") -> None:
        """Raise the first error of the finished jobs, after cancelling the pending jobs."""
        for error in filter(None, (future.exception() for future in done)):
            for future in pending:
                future.cancel()
            if self.hint:
                error.add_note(self.hint)
            raise error

    def log_progress(self, stage: str, groups: "dict[str, list[Future[Any]]]") -> None:
        """Log finished and all tasks per name, and the bytes on disk so far."""
        done = ", ".join(
            f"{name} {sum(future.done() for future in group)}/{len(group)}"
            for name, group in groups.items()
        )
        size = ""
        if self.build_dir is not None:
            files = (
                Path(root, name) for root, _, names in os.walk(self.build_dir) for name in names
            )
            size = f"; {sum(file.stat().st_size for file in files if file.exists()) / 1e6:.1f} MB"
        logger.info(f"  {stage}: {done} tasks{size}; {time.monotonic() - self.started_at:.0f} s")


class LocalExecutor(TaskExecutor):
    """Forked processes, which inherit the parent's imports: these take seconds."""

    def __init__(self, workers: int, folder: Path) -> None:
        super().__init__()
        logs = folder / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        self.workers = workers
        self.build_dir = folder / "building"
        self.hint = f"the workers' logs are in {logs}"
        self.pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("fork"),
            initializer=init_worker,
            initargs=(str(logs),),
        )

    def describe(self) -> str:
        return f"{self.workers} workers"

    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        return [self.pool.submit(*job) for job in jobs]

    def close(self) -> None:
        """Stop the processes and drop the jobs that have not started."""
        self.pool.shutdown(cancel_futures=True)


class JobRunner:
    """A one-step datatrove pipeline: task `rank` runs job `rank` and saves its result as JSON."""

    def __init__(self, jobs: list[Job], results: Path) -> None:
        self.jobs = jobs
        self.results = results

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        write_text(self.results / f"{rank:06d}.json", json.dumps(run_job(self.jobs[rank])))


class SlurmArray(SlurmPipelineExecutor):
    """datatrove's job array with requeueing, without its job that merges statistics."""

    def launch_merge_stats(self) -> None:
        """Do nothing: accounting.py merges statistics."""

    def save_executor_as_json(self, indent: int = 4) -> None:
        """Do nothing: jobs are functions, which JSON cannot hold."""


class SlurmExecutor(TaskExecutor):
    """One job array per stage, polled from this process."""

    def __init__(self, cfg: ExecutorConfig, workers: int, folder: Path) -> None:
        super().__init__()
        if cfg.partition is None:
            raise InputError("executor=slurm needs executor.partition")
        self.cfg = cfg
        self.workers = workers
        self.folder = folder.resolve()
        self.check_texts()
        self.job_ids: list[str] = []
        self.job_ids_file = self.folder / "slurm" / "jobs.txt"
        self.unfinished: dict[int, Future[Any]] = {}  # by task of the array
        self.cancel_orphans()

    def check_texts(self) -> None:
        """Raise InputError for a text that datatrove's batch scripts, which quote none, change."""
        texts = {"data.folder": str(self.folder)}
        for name in ("partition", "time", "account", "qos"):
            texts[f"executor.{name}"] = getattr(self.cfg, name) or ""
        for key, text in texts.items():
            if not re.fullmatch(r"[\w./:=,@+-]*", text, re.A):
                raise InputError(
                    f"{key} is {text!r}: with executor=slurm set one of letters, digits and "
                    "_./:=,@+-"
                )

    def cancel_orphans(self) -> None:
        """Cancel the arrays of a killed launch, which would write the same files."""
        if self.job_ids_file.is_file():
            self.job_ids = self.job_ids_file.read_text(encoding="utf-8").split()
            self.close()
            while self.is_running():
                time.sleep(self.cfg.poll_seconds)
            self.job_ids_file.unlink()
            self.job_ids = []

    def describe(self) -> str:
        return f"Slurm partition {self.cfg.partition}, {self.workers} tasks at a time"

    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        """Submit the jobs as one array."""
        self.array_dir = self.folder / "slurm" / stage.replace("/", "-") / f"{time.time_ns()}"
        self.results = self.array_dir / "results"
        make_folder(self.results)
        self.stage = stage
        self.empty_polls = 0
        futures: list[Future[Any]] = [Future() for _ in jobs]
        self.unfinished = dict(enumerate(futures))
        try:
            self.make_array(stage, jobs).run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"sbatch failed ({error}): run this on a login node of the cluster"
            ) from error
        return futures

    def make_array(self, stage: str, jobs: list[Job]) -> SlurmArray:
        """The array of a stage; records its job id when it is submitted."""

        def record_job_id(output: str) -> str:
            self.job_ids.append(output.split()[-1])
            write_text(self.job_ids_file, "\n".join(self.job_ids))
            return self.job_ids[-1]

        array = SlurmArray(
            [JobRunner(jobs, self.results)],
            tasks=len(jobs),
            time=self.cfg.time,
            partition=str(self.cfg.partition),
            mem_per_cpu_gb=self.cfg.memory_gib,
            workers=self.workers,
            job_name=f"data-{stage.replace('/', '-')}",
            env_command=(
                f"export PYTHONPATH={shlex.quote(str(ROOT))} "
                f"PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
            ),
            max_array_size=self.cfg.max_array_size,
            tasks_per_job=self.cfg.tasks_per_job,
            logging_dir=str(self.array_dir),
            qos=self.cfg.qos,
            sbatch_args={"account": self.cfg.account} if self.cfg.account else None,
            requeue=True,
        )
        array.job_id_retriever = record_job_id
        return array

    def wait(self, pending: "set[Future[Any]]", seconds: float) -> DoneAndPending:
        """Collect results, then wait `poll_seconds` if there are none."""
        self.collect_results()
        return super().wait(pending, self.cfg.poll_seconds)

    def collect_results(self) -> None:
        """Complete the futures of finished tasks.

        Raises InputError if the array has ended without all results.
        """
        self.empty_polls = 0 if self.is_running() else self.empty_polls + 1
        paths = self.results.glob("*.json")
        finished = {int(path.stem) for path in paths if path.stem.isdecimal()}
        for rank in sorted(finished & self.unfinished.keys()):
            path = self.results / f"{rank:06d}.json"
            result: Any = read_required(path, object, "remove it and run the same command again")
            self.unfinished.pop(rank).set_result(result)
        if self.unfinished and self.empty_polls > MAX_EMPTY_POLLS:
            raise InputError(
                f"{self.stage}: {len(self.unfinished)} of {len(finished) + len(self.unfinished)} "
                f"tasks ended without a result, first task {min(self.unfinished)}; see "
                f"{self.array_dir / 'logs'} and {self.array_dir / 'slurm_logs'}, then run the "
                "same command again"
            )

    def is_running(self) -> bool:
        """Whether Slurm still lists one of the arrays; a failed query counts as yes."""
        if not self.job_ids:
            return False
        command = ["squeue", "--noheader", "--format=%i", f"--jobs={','.join(self.job_ids)}"]
        answer = subprocess.run(command, capture_output=True, text=True)
        if "Invalid job id" in answer.stderr:
            return False
        return answer.returncode != 0 or bool(answer.stdout.strip())

    def close(self) -> None:
        """Cancel all arrays."""
        if self.job_ids:
            subprocess.run(["scancel", *self.job_ids], capture_output=True)


class RayExecutor(TaskExecutor):
    """Remote functions on a Ray cluster whose machines share the data folder."""

    def __init__(self, cfg: ExecutorConfig, workers: int) -> None:
        super().__init__()
        import ray

        self.ray = ray
        self.workers = workers
        # no runtime_env: its agent needs ray[default], and every machine has this package installed
        local = {"num_cpus": workers, "include_dashboard": False} if cfg.address is None else {}
        ray.init(address=cfg.address, log_to_driver=False, **local)

    def describe(self) -> str:
        return "Ray, one task per CPU at a time"

    def submit(self, stage: str, jobs: list[Job]) -> "list[Future[Any]]":
        """Submit the jobs; Ray retries a job up to three times if its machine fails."""
        remote_job = self.ray.remote(max_retries=3)(run_job)
        return [remote_job.remote(job).future() for job in jobs]

    def close(self) -> None:
        """Disconnect from the cluster."""
        self.ray.shutdown()


def run_job(job: Job) -> Any:
    """Call a job's function with its arguments."""
    function, *arguments = job
    return function(*arguments)
