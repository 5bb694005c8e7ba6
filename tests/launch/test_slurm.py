"""Training under a real Slurm: two nodes, a warning, a lost node, a preemption; what comes out is
what would have been.

One run is left alone, one is interrupted in every way; their losses and final checkpoints are
compared bit for bit.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import BLOCK, make_corpus
from tests.launch.slurm import Slurm, installed

ROOT = Path(__file__).resolve().parent.parent.parent
pytestmark = pytest.mark.slurm
TOKENS = 1000 * BLOCK
MODEL = [
    "model.vocab_size=96",
    "model.d_model=24",
    "model.n_layer=2",
    "model.d_inner=48",
    "model.d_state=6",
    "model.dt_rank=5",
]
SOURCE = "{recipe: curated, input: raw, licence: CC0-1.0, max_epochs: 40, tasks: 1}"
DATA = [
    *(f"~data.sources.{name}" for name in ("web", "code", "technical", "curated", "math")),
    *(f"+data.sources.{name}={SOURCE}" for name in ("prose", "sums")),
    f"data.stages=[{{name: only, tokens: {TOKENS}, seq_len: 16, mixture: {{prose: 1, sums: 1}}}}]",
    f"data.block_tokens={BLOCK}",
    "data.seed=5",
    "data.tokenizer.vocab_size=96",
    "data.tokenizer.train_megabytes=1",
]
REST = [
    "schedule.warmup_tokens=1000",
    "schedule.ramp_tokens=8000",
    "schedule.decay_tokens=20000",
    "schedule.batch_start_sequences=2",
    "schedule.batch_end_sequences=4",
    "checkpoint.every_tokens=6000",
    "checkpoint.keep_last=3",
    "parallel.micro_batch_tokens=64",
    "cluster.device=cpu",
    "cluster.nodes=2",
    "cluster.ranks_per_node=1",
    "cluster.peak_tflops=1",
    "metrics.wandb_project=null",
    "validation.every_tokens=1_000_000",
    "slurm.warn_seconds=30",
    "slurm.exclusive=true",
    "slurm.time=1:00:00",
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if why := installed():
        pytest.skip(why)
    # not in pytest's folder, which is closed to others: munged refuses a socket that they cannot
    # reach
    with tempfile.TemporaryDirectory(prefix="slurm-") as home, Slurm(Path(home)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, tokens=60 * BLOCK + 6)
    return folder


def submit(slurm: Slurm, data: Path, run: Path, *more: str) -> str:
    """The number of the job, as submit.py prints it."""
    words = [
        sys.executable,
        "launch/submit.py",
        "+experiment=demo",
        *MODEL,
        *DATA,
        *REST,
        f"data.folder={data}",
    ]
    words += [
        f"run.name={run.name}",
        f"run.dir={run}",
        f"slurm.bad_nodes={run.parent / 'bad_nodes.txt'}",
        *more,
    ]
    result = subprocess.run(
        words, cwd=ROOT, env=slurm.environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()[-1].split()[0]


def checkpoints(run: Path) -> list[Path]:
    return sorted(path.parent for path in run.glob("checkpoints/step-*/manifest.json"))


def attempts(run: Path, event: str) -> list[dict[str, Any]]:
    lines = (run / "attempts.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def finished(slurm: Slurm, job: str, run: Path) -> None:
    """Wait for the end of a job, and show its log when it is a bad one."""
    slurm.until(
        lambda: slurm.state(job) not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), 400
    )
    logs = "".join(
        path.read_text() for path in [*run.glob("slurm-*.out"), *run.glob("logs/*/*.log")]
    )
    assert slurm.state(job) == "COMPLETED", logs[-6000:]


@pytest.fixture(scope="module")
def alone(slurm: Slurm, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two nodes that nothing happens to."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    finished(slurm, submit(slurm, data, run), run)
    return run


def test_two_nodes_train(alone: Path) -> None:
    steps = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["tokens"] == TOKENS and steps[0]["loss"] - steps[-1]["loss"] > 0.5
    assert len({path.stem for path in alone.glob("logs/*/n*.log")}) == 2
    manifest = json.loads((checkpoints(alone)[-1] / "manifest.json").read_text())
    assert {"rank-00000.safetensors", "rank-00001.safetensors"} <= set(manifest["files"])


def test_what_interrupts_a_run_leaves_no_trace_in_it(slurm: Slurm, data: Path, alone: Path) -> None:
    run = alone.parent / "interrupted"
    job = submit(slurm, data, run)
    slurm.until(lambda: len(checkpoints(run)) > 0, 300)
    # as before the time limit: save, leave, requeue
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.until(lambda: len(attempts(run, "end")) == 1, 120)
    newest = checkpoints(run)[-1]
    slurm.until(lambda: slurm.state(job) == "RUNNING" and checkpoints(run)[-1] != newest, 300)

    lost = attempts(run, "begin")[-1]["nodes"][0]  # where the batch script is
    slurm.lose_node(lost)
    starts = len(attempts(run, "begin"))
    slurm.until(lambda: len(attempts(run, "begin")) > starts, 200)
    assert lost not in attempts(run, "begin")[-1]["nodes"]
    assert lost in (run.parent / "bad_nodes.txt").read_text()
    slurm.start_node(lost)
    newest = checkpoints(run)[-1]
    slurm.until(lambda: checkpoints(run)[-1] != newest, 300)

    urgent = slurm.run(
        "sbatch",
        "--parsable",
        "-p",
        "urgent",
        "-N",
        "4",
        "--exclusive",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 1",
    )
    finished(slurm, urgent.strip(), run)  # it preempts the run, which goes on afterwards
    finished(slurm, job, run)
    assert int(slurm.job(job)["Restarts"]) == 3
    assert_same(run, alone)


def assert_same(run: Path, other: Path) -> None:
    """Losses, norms and every tensor file."""
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


def fake_job(slurm: Slurm, folder: Path, ranks: str, *options: str) -> tuple[str, Path]:
    """The batch script of training with a shell script in torchrun's place; returns the job and its
    run's folder.
    """
    run, fake, script = folder / "run", folder / "python", folder / "job.sh"
    run.mkdir()
    fake.write_text(
        f'#!/usr/bin/env bash\n[ "$1" = {ROOT}/launch/attempt.py ] && exec {sys.executable} '
        f'"$@"\n{ranks}\n'
    )
    fake.chmod(0o755)
    values = {"ROOT": ROOT, "WORKING_FOLDER": ROOT, "PYTHON": fake,
              "RUN": run, "LOGS_OF_STARTS": run / "logs", "BAD_NODES": folder / "bad_nodes.txt",
              "RANKS": 1, "RESTARTS": 0, "WARN_SECONDS": 5, "CRASHES": 3, "STRIKES": 1}  # fmt: skip
    settings = "\n".join(f"{key}={value}" for key, value in values.items()) + "\nOVERRIDES=()"
    lines = "\n".join(
        f"#SBATCH --{option}" for option in (f"output={folder}/out", "open-mode=append", *options)
    )
    text = (ROOT / "launch" / "slurm" / "pretrain.sbatch").read_text()
    script.write_text(text.replace("@OPTIONS@", lines).replace("@SETTINGS@", settings))
    return slurm.run("sbatch", "--parsable", str(script)).strip(), run


def test_a_requeued_job_is_kept_from_bad_nodes(slurm: Slurm, tmp_path: Path) -> None:
    """The crash of a rank strikes its node; with as many strikes as the limit the requeued job
    starts elsewhere.
    """
    crash = (
        '{"time": "9999", "incident": "crash", "text": "rank 0 on \'"$SLURMD_NODENAME"\': boom"}'
    )
    ranks = f"""[ "$SLURM_RESTART_COUNT" = 1 ] && exit 0
[ "$SLURM_NODEID" = 0 ] || {{ sleep 60; exit 0; }}
echo '{crash}' >> {tmp_path}/run/incidents.jsonl
exit 1"""
    job, run = fake_job(slurm, tmp_path, ranks, "nodes=2", "exclusive", "requeue")
    finished(slurm, job, run)
    first, second = (entry["nodes"] for entry in attempts(run, "begin"))
    assert first[0] not in second and (tmp_path / "bad_nodes.txt").read_text().startswith(first[0])
    log = (tmp_path / "out").read_text()
    assert "requeue crash" in log and f"kept from {first[0]}" in log and "done the ranks" in log


def test_the_time_limit_requeues_and_a_cancelled_job_stays_so(slurm: Slurm, tmp_path: Path) -> None:
    """Slurm's own warning reaches the ranks, and the next start goes on; scancel means what it
    says.
    """
    ranks = f"""trap 'echo "{{\\"code\\": 75, \\"reason\\": \\"asked\\"}}" \
    > {tmp_path}/run/outcome.json; exit 1' TERM
touch {tmp_path}/run/started-$SLURM_RESTART_COUNT
while :; do sleep 0.2; done"""
    job, run = fake_job(slurm, tmp_path, ranks, "nodes=1", "requeue", "time=1", "signal=B:USR1@30")
    slurm.until(lambda: (run / "started-1").is_file(), 150)
    assert (
        attempts(run, "end")[0]["verdict"] == "requeue"
        and "time limit is near" in (tmp_path / "out").read_text()
    )
    slurm.run("scancel", job)
    slurm.until(lambda: slurm.state(job) == "CANCELLED", 60)
    assert slurm.job(job)["Restarts"] == "1" and len(attempts(run, "begin")) == 2


def test_a_chain_waits_for_success(slurm: Slurm, data: Path, tmp_path: Path) -> None:
    """A first job without a place for its data fails, and the one behind it ends instead of waiting
    for ever.
    """
    submit(
        slurm, data, tmp_path / "chain", "--stages", "prepare,train", "data.folder=/dev/null/none"
    )
    jobs = [line.split() for line in slurm.run("squeue", "-h", "-o", "%i %j").splitlines()]
    numbers = sorted(number for number, name in jobs if name.startswith("chain-"))
    assert len(numbers) == 2
    slurm.until(lambda: slurm.state(numbers[1]) == "CANCELLED", 120)
    assert slurm.state(numbers[0]) == "FAILED"


def hashes(folder: Path) -> dict[str, str]:
    """Of all that is built, but the logs, which hold times."""
    files = [
        path
        for path in (folder / "shards").rglob("*")
        if path.is_file() and "logs" not in path.parts
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_data_is_prepared_by_arrays_as_it_is_by_processes(slurm: Slurm, tmp_path: Path) -> None:
    """A job that submits datatrove's arrays and waits for them gives the bytes of a preparation
    without Slurm.
    """
    data = ["data.tokenizer.vocab_size=300", "model.vocab_size=300"]
    for name in ("prose", "sums"):
        raw = tmp_path / name
        raw.mkdir()
        for part in range(2):
            texts = [
                f"{name}: {part} and {i} make {part + i}, and {part * i} when multiplied. " * 9
                for i in range(40)
            ]
            (raw / f"{part}.jsonl").write_text(
                "".join(json.dumps({"text": text}) + "\n" for text in texts)
            )
        data += [f"data.sources.{name}.input={raw}", f"data.sources.{name}.tasks=2"]
    arrays = [
        "executor=slurm",
        "executor.partition=main",
        "executor.workers=3",
        "executor.tasks_per_job=1",
        "executor.memory_gib=1",
        "executor.time=10:00",
        "executor.poll_seconds=0.5",
    ]
    run = tmp_path / "run"
    job = submit(slurm, tmp_path / "arrays", run, "--stages", "prepare", *data, *arrays)
    finished(slurm, job, run)
    log = next(run.glob("slurm-prepare-*.out")).read_text()
    assert "Slurm partition main, 3 tasks at a time" in log
    numbers = (tmp_path / "arrays" / "slurm" / "jobs.txt").read_text().split()
    assert numbers and all(slurm.state(number) == "COMPLETED" for number in numbers)
    words = [sys.executable, "data/prepare.py", "+experiment=demo", *MODEL, *DATA, *data]
    words.append(f"data.folder={tmp_path / 'here'}")
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=300)
    assert hashes(tmp_path / "arrays") == hashes(tmp_path / "here")
    assert {path.suffix for path in (tmp_path / "arrays" / "shards" / "sums").iterdir()} >= {
        ".ds",
        ".json",
    }
