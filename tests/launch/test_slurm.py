"""Training under a real Slurm on two nodes, with a time limit, a lost node and a preemption.

One run is interrupted in every way, one is not; losses and final checkpoints must be equal bit for
bit. All other jobs are submitted first and run in parallel.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, TIMEOUT_SECONDS, python
from tests.corpus import BLOCK, make_corpus
from tests.launch.slurm import Slurm, install_slurm
from tests.small import overrides

pytestmark = pytest.mark.slurm
TOKENS = 600 * BLOCK
SMALL = overrides(TOKENS)
CLUSTER = [
    "schedule.warmup_tokens=1000",
    "schedule.ramp_tokens=8000",
    "schedule.decay_tokens=20000",
    "schedule.batch_start_sequences=2",
    "schedule.batch_end_sequences=4",
    "checkpoint.every_tokens=3000",
    "checkpoint.keep_last=3",
    "parallel.micro_batch_tokens=64",
    "cluster.device=cpu",
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "metrics.wandb_project=null",
    "validation.every_tokens=1_000_000",
    "slurm.warn_seconds=300",
    "slurm.exclusive=true",
    "slurm.time=1:00:00",
]


@dataclass
class Job:
    """One job or a chain of jobs, and the folder of its run."""

    numbers: list[str]
    run: Path

    @property
    def number(self) -> str:
        return self.numbers[-1]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := install_slurm():
        pytest.skip(reason)
    # not in pytest's folder, which other users cannot read: munged refuses such a socket
    with tempfile.TemporaryDirectory(prefix="slurm-") as runs, Slurm(Path(runs)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, tokens=60 * BLOCK + 6)
    return folder


def submit(slurm: Slurm, data: Path, run: Path, *extra: str) -> list[str]:
    """Submit a run and return its job numbers."""
    command = [
        sys.executable,
        "launch/submit.py",
        "+experiment=demo",
        *SMALL,
        *CLUSTER,
        f"data.folder={data}",
    ]
    command += [
        f"run.name={run.name}",
        f"run.dir={run}",
        f"slurm.bad_nodes_file={run.parent / 'bad_nodes.txt'}",
        *extra,
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=slurm.environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    return [fields[0] for fields in lines if fields[1:2] == [run.name]]


def checkpoints(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob("checkpoints/step-*/manifest.json"))


def attempts(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (run / "attempts.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def finished(slurm: Slurm, job: Job) -> Path:
    """Wait for a job, assert that it completed, and return its run's folder."""
    active = ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
    slurm.wait_until(lambda: slurm.state(job.number) not in active)
    logs = "".join(
        path.read_text() for path in [*job.run.glob("slurm-*.out"), *job.run.glob("logs/*/*.log")]
    )
    assert slurm.state(job.number) == "COMPLETED", logs[-6000:]
    return job.run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


ARRAYS = (
    "executor=slurm",
    "executor.partition=main",
    "executor.workers=3",
    "executor.tasks_per_job=1",
    "executor.memory_gib=1",
    "executor.time=10:00",
    "executor.poll_seconds=0.5",
)


@pytest.fixture(scope="module")
def raw(runs: Path) -> list[str]:
    """Two sources of two files, as overrides that read them."""
    overrides = ["data.tokenizer.vocab_size=300", "model.vocab_size=300"]
    for name in ("prose", "sums"):
        (runs / "raw" / name).mkdir(parents=True)
        for part in range(2):
            texts = [
                f"{name}: {part} and {i} make {part + i}, and {part * i} when multiplied. " * 9
                for i in range(40)
            ]
            (runs / "raw" / name / f"{part}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts)
            )
        overrides += [
            f"data.sources.{name}.input={runs / 'raw' / name}",
            f"data.sources.{name}.tasks=2",
        ]
    return overrides


@pytest.fixture(scope="module")
def jobs(slurm: Slurm, data: Path, raw: list[str], runs: Path) -> dict[str, Job]:
    """All jobs except the interrupted run."""
    chain = ("--stages", "prepare,train", "data.folder=/dev/null/none")
    arrays = ("--stages", "prepare", *raw, *ARRAYS)
    return {
        "uninterrupted": Job(submit(slurm, data, runs / "uninterrupted"), runs / "uninterrupted"),
        "limit": fake_job(slurm, runs / "limit", AT_THE_LIMIT, *LIMIT),
        "strike": fake_job(slurm, runs / "strike", CRASHING, "nodes=2", "exclusive", "requeue"),
        "chain": Job(submit(slurm, data, runs / "chain", *chain), runs / "chain"),
        "arrays": Job(submit(slurm, runs / "built", runs / "arrays", *arrays), runs / "arrays"),
    }


def test_an_interrupted_run_equals_an_uninterrupted_one(
    slurm: Slurm, data: Path, runs: Path, jobs: dict[str, Job]
) -> None:
    run = runs / "interrupted"
    job = Job(submit(slurm, data, run), run)
    slurm.wait_until(lambda: len(checkpoints(run)) > 0)
    # the warning before the time limit: save, stop, requeue
    slurm.run("scancel", "--batch", "--signal=USR1", job.number)
    slurm.wait_until(lambda: len(attempts(run, "end")) == 1)
    newest = checkpoints(run)[-1]
    slurm.wait_until(
        lambda: slurm.state(job.number) == "RUNNING" and checkpoints(run)[-1] != newest
    )

    lost = attempts(run, "begin")[-1]["nodes"][0]  # the node of the batch script
    slurm.lose_node(lost)
    starts = len(attempts(run, "begin"))
    slurm.wait_until(lambda: len(attempts(run, "begin")) > starts)
    assert lost not in attempts(run, "begin")[-1]["nodes"]
    assert lost in (runs / "bad_nodes.txt").read_text()
    slurm.start_node(lost)
    newest = checkpoints(run)[-1]
    slurm.wait_until(lambda: checkpoints(run)[-1] != newest)

    nodes = ",".join(attempts(run, "begin")[-1]["nodes"])
    options = ("-p", "urgent", "-w", nodes, "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    urgent = slurm.run("sbatch", "--parsable", *options).strip()
    finished(slurm, Job([urgent], run))  # preempts the run, which continues afterwards
    finished(slurm, job)
    assert int(slurm.job(job.number)["Restarts"]) == 3
    assert_same(run, finished(slurm, jobs["uninterrupted"]))


def assert_same(run: Path, other: Path) -> None:
    """Compare metrics and every tensor file."""
    keys = ("step", "tokens", "loss", "source_loss", "grad_norm", "lr", "skipped")
    curves = []
    for folder in (run, other):
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curves.append([{key: step[key] for key in keys} for step in steps])
    assert curves[0] == curves[1]
    files = [
        json.loads((checkpoints(folder)[-1] / "manifest.json").read_text())["files"]
        for folder in (run, other)
    ]
    weights = [
        {name: entry for name, entry in each.items() if name.endswith(".safetensors")}
        for each in files
    ]
    assert weights[0] == weights[1] and len(weights[0]) == 2


def test_two_nodes_train(slurm: Slurm, jobs: dict[str, Job]) -> None:
    uninterrupted = finished(slurm, jobs["uninterrupted"])
    steps = [
        json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps[-1]["tokens"] == TOKENS and steps[0]["loss"] - steps[-1]["loss"] > 0.5
    assert len({path.stem for path in uninterrupted.glob("logs/*/n*.log")}) == 2
    manifest = json.loads((checkpoints(uninterrupted)[-1] / "manifest.json").read_text())
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= set(manifest["files"])


def fake_job(slurm: Slurm, folder: Path, ranks: str, *options: str) -> Job:
    """Submit the batch script of training with a shell script in place of torchrun."""
    run = folder / "run"
    fake_python = folder / "python"
    script = folder / "job.sh"
    run.mkdir(parents=True)
    fake_python.write_text(
        f'#!/usr/bin/env bash\n[ "$1" = {ROOT}/launch/attempt.py ] && exec {sys.executable} '
        f'"$@"\nRUN={run}\n{ranks}\n'
    )
    fake_python.chmod(0o755)
    values = {"ROOT": ROOT, "WORKING_FOLDER": ROOT, "PYTHON": fake_python,
              "RUN": run, "LOG_DIR": run / "logs", "BAD_NODES": folder / "bad_nodes.txt",
              "RANKS": 1, "RESTARTS": 0, "WARN_SECONDS": 5, "CRASHES": 3, "STRIKES": 1}  # fmt: skip
    settings = "\n".join(f"{key}={value}" for key, value in values.items()) + "\nOVERRIDES=()"
    lines = "\n".join(
        f"#SBATCH --{option}" for option in (f"output={folder}/out", "open-mode=append", *options)
    )
    text = (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text()
    script.write_text(text.replace("@OPTIONS@", lines).replace("@SETTINGS@", settings))
    return Job([slurm.run("sbatch", "--parsable", str(script)).strip()], run)


CRASH = '{"time": "9999", "incident": "crash", "text": "rank 0 on \'"$SLURMD_NODENAME"\': boom"}'
CRASHING = f"""[ "$SLURM_RESTART_COUNT" = 1 ] && exit 0
[ "$SLURM_NODEID" = 0 ] || {{ sleep 3600; exit 0; }}
echo '{CRASH}' >> "$RUN/incidents.jsonl"
exit 1"""


def test_a_requeued_job_avoids_bad_nodes(slurm: Slurm, jobs: dict[str, Job]) -> None:
    """A rank's crash is a strike against its node; at the limit the job restarts elsewhere."""
    run = finished(slurm, jobs["strike"])
    first, second = (entry["nodes"] for entry in attempts(run, "begin"))
    assert first[0] not in second
    assert (run.parent / "bad_nodes.txt").read_text().startswith(first[0])
    log = (run.parent / "out").read_text()
    assert (
        "requeue crash" in log and f"excluded nodes: {first[0]}" in log and "done all ranks" in log
    )


LIMIT = ("nodes=1", "requeue", "time=1", "signal=B:USR1@30")
AT_THE_LIMIT = """trap 'echo "{\\"code\\": 75, \\"reason\\": \\"asked\\"}" \
    > "$RUN/outcome.json"; exit 1' TERM
# the second start runs until it is cancelled
[ "$SLURM_RESTART_COUNT" = 1 ] && scontrol update JobId="$SLURM_JOB_ID" TimeLimit=UNLIMITED
touch "$RUN/started-$SLURM_RESTART_COUNT"
while :; do sleep 0.2; done"""


def test_the_time_limit_requeues_and_scancel_does_not(slurm: Slurm, jobs: dict[str, Job]) -> None:
    """Slurm's warning reaches the ranks and the job restarts; a cancelled job does not."""
    job = jobs["limit"]
    slurm.wait_until(lambda: (job.run / "started-1").is_file())
    assert attempts(job.run, "end")[0]["verdict"] == "requeue"
    assert "time limit is near" in (job.run.parent / "out").read_text()
    slurm.run("scancel", job.number)
    slurm.wait_until(lambda: slurm.state(job.number) == "CANCELLED")
    assert slurm.job(job.number)["Restarts"] == "1" and len(attempts(job.run, "begin")) == 2


def test_a_chain_waits_for_success(slurm: Slurm, jobs: dict[str, Job]) -> None:
    """The first job fails, and the second is cancelled instead of waiting forever."""
    first, second = jobs["chain"].numbers
    slurm.wait_until(lambda: slurm.state(second) == "CANCELLED")
    assert slurm.state(first) == "FAILED"


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the built files, without logs, which contain times."""
    files = [
        path
        for path in (folder / "shards").rglob("*")
        if path.is_file() and "logs" not in path.parts
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_slurm_arrays_prepare_the_same_data_as_processes(
    slurm: Slurm, jobs: dict[str, Job], raw: list[str], runs: Path, tmp_path: Path
) -> None:
    """A job that submits datatrove's arrays builds the same bytes as a local preparation."""
    run = finished(slurm, jobs["arrays"])
    built = runs / "built"
    log = next(run.glob("slurm-prepare-*.out")).read_text()
    assert "Slurm partition main, 3 tasks at a time" in log
    numbers = (built / "slurm" / "jobs.txt").read_text().split()
    assert numbers and all(slurm.state(number) == "COMPLETED" for number in numbers)
    arguments = ["+experiment=demo", *SMALL, *raw]
    local = python("data/prepare.py", *arguments, f"data.folder={tmp_path / 'local'}")
    assert local.returncode == 0, local.stdout + local.stderr
    assert hashes(built) == hashes(tmp_path / "local")
    assert {path.suffix for path in (built / "shards" / "sums").iterdir()} >= {".ds", ".json"}
