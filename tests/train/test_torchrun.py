"""The demo's command under torchrun resumes after the loss of a rank, the launcher, or the job."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from tests.commands import ROOT, TIMEOUT_SECONDS, wait_until
from tests.distributed import free_ports
from tests.soak import differences
from train.distributed import per_start_store
from train.metrics.records import read_lines
from train.resilience.incidents import read_outcome

STAGES = (
    "data.stages=[{name: short, tokens: 100000, seq_len: 128, mixture: {code: 50, math: 35, web: "
    "15}},{name: decay, tokens: 60000, seq_len: 256, mixture: {code: 35, math: 35, curated: 15, "
    "technical: 15}}]"
)
SHORTER = [
    STAGES,
    "schedule.warmup_tokens=10000",
    "schedule.ramp_tokens=60000",
    "schedule.decay_tokens=60000",
    "checkpoint.every_tokens=12000",
    "metrics.wandb_project=null",
]


class Job:
    """torchrun with two ranks of a run, on one node or simulating two nodes."""

    def __init__(self, run: Path, data: Path, nodes: int = 1, more: tuple[str, ...] = ()) -> None:
        self.folder = run
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        arguments = ["+experiment=demo", f"run.dir={run}", f"data.folder={data}", *SHORTER, *more]
        torchrun = [
            Path(sys.executable).parent / "torchrun",
            "--max-restarts",
            "3",
            "--nproc-per-node",
            str(2 // nodes),
        ]
        if nodes > 1:
            torchrun += [
                "--nnodes",
                str(nodes),
                "--rdzv-backend",
                "c10d",
                "--local-addr",
                "127.0.0.1",
            ]
            torchrun += ["--rdzv-endpoint", f"127.0.0.1:{free_ports(1)[0]}"]
        command = [*torchrun, "train/pretrain.py", *arguments]
        with run.with_name(f"{run.name}.log").open("ab") as log:
            self.launchers = [
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
                for _ in range(nodes)
            ]
        self.known_ranks: set[psutil.Process] = set()

    def steps(self) -> int:
        """Last step in metrics.jsonl."""
        lines = read_lines(self.folder / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def ranks(self) -> list[psutil.Process]:
        """Processes of the ranks."""
        children = [
            child
            for launcher in self.launchers
            for child in psutil.Process(launcher.pid).children()
        ]
        ranks = [child for child in children if "pretrain.py" in " ".join(child.cmdline())]
        self.known_ranks |= set(ranks)
        return ranks

    def wait_until(self, condition: Callable[[], bool], what: str) -> float:
        """Wait for a condition; return the seconds it took."""
        return wait_until(condition, lambda: f"{what}:\n{self.log()[-3000:]}")

    def log(self) -> str:
        """Output of torchrun and the ranks."""
        return self.folder.with_name(f"{self.folder.name}.log").read_text()

    def has_exited(self) -> bool:
        """Whether all ranks have exited."""
        return not any(
            rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in self.known_ranks
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    corpus = [sys.executable, "examples/make_demo_corpus.py", str(folder / "raw")]
    prepare = [
        sys.executable,
        "data/prepare.py",
        "+experiment=demo",
        f"data.folder={folder}",
        STAGES,
    ]
    for command in (corpus, prepare):
        subprocess.run(
            command, cwd=ROOT, check=True, timeout=TIMEOUT_SECONDS, stdout=subprocess.DEVNULL
        )
    return folder


def test_a_start_ignores_store_keys_of_earlier_starts() -> None:
    """Also the request of a rank that died before it read rank 0's answer."""
    store, world_size = dist.HashStore(), 3
    with ThreadPoolExecutor(world_size) as pool:
        store.set("request/1", "a rank that is dead")
        for _ in range(3):
            futures = [pool.submit(per_start_store, store, rank, world_size) for rank in (0, 2)]
            time.sleep(0.1)  # rank 0 has answered the dead rank
            futures.append(pool.submit(per_start_store, store, 1, world_size))
            stores = [future.result(TIMEOUT_SECONDS) for future in futures]
            for rank, start_store in enumerate(stores):
                assert not start_store.check(["address"])
                start_store.set(f"address/{rank}", str(rank))
            assert all(
                start_store.get(f"address/{rank}") == str(rank).encode()
                for start_store in stores
                for rank in range(world_size)
            )
            stores[0].set("address", "of a rank that will be dead")


@pytest.mark.slow
@pytest.mark.fault(
    "torchrun: a rank, the launcher, a rank of two nodes are killed; SIGTERM",
    "the same; no orphans",
)
def test_torchrun_restarts_and_resumes(data: Path, tmp_path: Path, measured: Any) -> None:
    run = tmp_path / "faulty"
    first = Job(run, data)
    first.wait_until(lambda: first.steps() >= 8 and len(first.ranks()) == 2, "the first steps")
    at = first.steps()
    first.ranks()[1].kill()
    restarted = first.wait_until(
        lambda: "continuing from step" in first.log() and first.steps() > at + 4, "a restart"
    )
    assert len(first.ranks()) == 2
    first.launchers[0].kill()
    first.launchers[0].wait()
    left = first.wait_until(first.has_exited, "ranks without a launcher")
    outcome = read_outcome(run)
    assert outcome is not None and outcome.code == 75

    second = Job(run, data, nodes=2)
    at = second.steps()
    second.wait_until(
        lambda: second.steps() > at + 3 and len(second.ranks()) == 2, "the second start"
    )
    at, starts = second.steps(), second.log().count("continuing from step")
    second.ranks()[0].kill()
    second.wait_until(
        lambda: second.log().count("continuing from step") > starts and second.steps() > at + 3,
        "a restart",
    )
    assert len(second.ranks()) == 2
    for launcher in second.launchers:
        launcher.send_signal(signal.SIGTERM)
    ended = second.wait_until(
        lambda: (
            all(launcher.poll() is not None for launcher in second.launchers)
            and second.has_exited()
        ),
        "leaving",
    )
    outcome = read_outcome(run)
    assert outcome is not None and outcome.code == 75

    last = Job(run, data)
    assert last.launchers[0].wait(TIMEOUT_SECONDS) == 0
    outcome = read_outcome(run)
    assert outcome is not None and outcome.code == 0
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))

    clean = Job(tmp_path / "clean", data)
    assert clean.launchers[0].wait(TIMEOUT_SECONDS) == 0
    assert differences(tmp_path / "clean", run, 2) == []
    measured(
        f"bit-identical; rank lost: {restarted:.0f} s to new steps; launcher lost: ranks gone in "
        f"{left:.0f} s; SIGTERM: gone in {ended:.0f} s"
    )


@pytest.mark.slow
@pytest.mark.fault(
    "SIGSTOP of the launcher, then of the whole job, for longer than the limit",
    "ranks go on without the launcher; a job that is continued goes on",
)
def test_a_job_that_is_stopped_and_continued_goes_on(
    data: Path, tmp_path: Path, measured: Any
) -> None:
    limit = 20.0
    job = Job(tmp_path / "run", data, more=(f"health.hang_seconds={limit}",))
    job.wait_until(lambda: job.steps() >= 4 and len(job.ranks()) == 2, "the first steps")
    launcher = job.launchers[0]
    launcher.send_signal(signal.SIGSTOP)
    at = job.steps()
    job.wait_until(lambda: job.steps() > at + 3, "steps without the launcher")
    ranks = job.ranks()
    for rank in ranks:
        rank.suspend()
    at = job.steps()
    time.sleep(1.5 * limit)
    assert job.steps() == at
    for rank in ranks:
        rank.resume()
    job.wait_until(lambda: job.steps() > at + 3, "steps after the stop")
    launcher.send_signal(signal.SIGCONT)
    assert launcher.wait(TIMEOUT_SECONDS) == 0
    lines = read_lines(job.folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert "continuing from step" not in job.log()  # one start
    assert not (job.folder / "incidents.jsonl").exists()
    measured(f"stopped for {1.5 * limit:.0f} s with a limit of {limit:.0f} s: one start")
