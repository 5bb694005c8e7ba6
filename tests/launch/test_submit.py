"""A submission is checked before it waits in a queue; scripts say what the config says; sweeps are
named runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import InputError
from launch import submit
from launch.jobs import local
from launch.jobs.sweep import job, sweep
from launch.slurm.script import render
from tests.commands import PATIENCE

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = [
    "+experiment=7b",
    "cluster=h100_32n",
    "data.folder=/data",
    "data.tokenizer.path=/data/t.json",
]


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch/submit.py", *words])
    return submit.main()


def test_a_script_says_what_the_config_says(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text(
        "# two strikes, and one\nn7 2026-01-01 7b crash\nn7 2026-01-02 7b crash\nn8 2026-01-02 "
        "7b crash\n"
    )
    odd = "run.dir='/tmp/a b$(touch x)'"
    words = [
        *CLUSTER,
        "slurm.partition=h100",
        f"slurm.bad_nodes={bad}",
        "slurm.options=['--qos=long']",
        odd,
    ]
    text = render(job(words), "train", "train/pretrain.py")
    for line in (
        "--nodes=32",
        "--gpus-per-node=8",
        "--partition=h100",
        "--requeue",
        "--signal=B:USR1@900",
        "--exclude=n7",
        "--qos=long",
        "--open-mode=append",
    ):
        assert f"\n#SBATCH {line}\n" in text
    shown = subprocess.run(
        ["bash", "-c", text.split("cd ")[0] + '\nprintf "%s\\n" "${OVERRIDES[@]}" "$RUN"'],
        capture_output=True,
        text=True,
    )
    assert shown.stdout.splitlines() == [*words, "/tmp/a b$(touch x)"]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "@" not in [line[:1] for line in text.splitlines()]


@pytest.mark.parametrize(
    "words, message",
    [
        (["slurm.time=soon"], "write DAYS-HOURS"),
        (["+slurm.env.WANDB_API_KEY=1"], "export them before sbatch"),
        (["schedule.min_lr=1"], "exceeds the peak optim.lr"),
        (["parallel.micro_batch_tokens=1"], "is below the longest sequence"),
        (["compute.recompute=none", "parallel.micro_batch_tokens=65536"], "do not fit: "),
    ],
)
def test_mistakes_are_said_on_the_login_node(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call(monkeypatch, *CLUSTER, *words, "--dry-run")


def test_a_chain_is_shown_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *CLUSTER, "--dry-run", "--stages", "prepare,train,export,eval") == 0
    text = capsys.readouterr().out
    for before, script in (("PREPARE", "pretrain"), ("TRAIN", "export"), ("EXPORT", "run")):
        assert f"afterok:${before}" in text and f"{script}.py" in text
    with pytest.raises(InputError, match="in this order"):
        call(monkeypatch, *CLUSTER, "--stages", "eval,train")


def test_a_sweep_is_a_run_per_point_of_hydras_syntax() -> None:
    words = ["+experiment=130m", "data.folder=/data", "data.tokenizer.path=/t.json"]
    found, jobs = sweep([*words, "optim.lr=1e-3,3e-3", "schedule.decay_tokens=1e9,2e9"], None)
    assert (
        found.folder == "runs/sweeps/130m-decay_tokens-lr" and len(jobs) == len(found.points) == 4
    )
    values = {(each.config.optim.lr, each.config.schedule.decay_tokens) for each in jobs}
    assert values == {(rate, decay) for rate in (1e-3, 3e-3) for decay in (10**9, 2 * 10**9)}
    assert "lr-0.001_decay_tokens-1e9" in found.points
    folders = {each.config.run.dir for each in jobs}
    assert folders == {f"{found.folder}/{label}" for label in found.points}
    with pytest.raises(InputError, match="several values"):
        sweep(words, None)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_named_sweeps_compose(path: Path) -> None:
    words = [
        "+experiment=130m",
        f"+sweep={path.stem}",
        "data.folder=/data",
        "data.tokenizer.path=/t.json",
    ]
    found, jobs = sweep(words, None)
    assert found.folder == f"runs/sweeps/{path.stem}" and len(jobs) >= 2
    assert all(each.config.run.name.startswith(f"{path.stem}.") for each in jobs)


def test_local_runs_go_on_after_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def wait(command: list[str]) -> tuple[int, bool]:
        seen.append(command)
        return int("optim.clip_norm=1.0" in command), False

    monkeypatch.setattr(local, "wait", wait)
    words = [
        "-m",
        "+experiment=demo",
        f"hydra.sweep.dir={tmp_path}",
        "optim.clip_norm=0.5,1.0,2.0",
        "--name",
        "clip",
    ]
    assert call(monkeypatch, *words, "--local", "--stages", "prepare,train") == 1
    scripts = [next(word for word in command if word.endswith(".py")) for command in seen]
    scripts = [str(Path(script).relative_to(ROOT)) for script in scripts]
    assert scripts == [
        "data/prepare.py",
        "train/pretrain.py",
        "data/prepare.py",
        "data/prepare.py",
        "train/pretrain.py",
    ]
    assert "clip.clip_norm-1 (prepare)" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "clip" / "sweep.json").read_text())["points"]) == 3


def script(folder: Path, text: str) -> list[str]:
    """A program that stands for torchrun: it notes its start, and turns every exit code into 1."""
    path = folder / "torchrun.py"
    note = f"import json, os, pathlib, signal, sys, time\nrun = pathlib.Path({str(folder)!r})\n"
    note += "open(run / 'starts', 'a').write('x')\n"
    note += (
        "def leave(code): (run / 'outcome.json').write_text(json.dumps({'code': code, 'reason': "
        "'asked'}))\n"
    )
    path.write_text(note + text)
    return [sys.executable, str(path)]


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def test_a_start_that_saved_and_left_is_started_again_here_too(tmp_path: Path) -> None:
    """Twice code 75 behind torchrun's 1, then the end; a stop, and a crash that left an old
    outcome, are failures.
    """
    again = "n = len((run / 'starts').read_text())\nif n < 3: leave(75); sys.exit(1)\nleave(0)"
    assert local.through(script(tmp_path, again), tmp_path) == "done" and starts(tmp_path) == 3
    (tmp_path / "starts").unlink()
    assert (
        local.through(script(tmp_path, "leave(2); sys.exit(1)"), tmp_path) == "failed"
        and starts(tmp_path) == 1
    )
    (tmp_path / "outcome.json").write_text('{"code": 75, "reason": "of an earlier start"}')
    assert (
        local.through(script(tmp_path, "sys.exit(1)"), tmp_path) == "failed"
        and starts(tmp_path) == 2
    )


def test_ctrl_c_waits_for_the_ranks_to_save(tmp_path: Path) -> None:
    """SIGINT reaches both, as from a terminal; the run leaves in its own time, and nothing is
    started again.
    """
    ranks = """def save(*_):
    time.sleep(1)
    leave(75)
    sys.exit(1)
signal.signal(signal.SIGINT, save)
(run / 'ready').touch()
time.sleep(3600)"""
    command = script(tmp_path, ranks)
    through = f"print(local.through({command}, Path({str(tmp_path)!r})))"
    # a job of `&` ignores it
    foreground = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"from pathlib import Path; from launch.jobs import local; {foreground}; {through}"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while not (tmp_path / "ready").is_file():
            assert process.poll() is None, process.returncode
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=PATIENCE)[0] == "left\n" and process.returncode == 0
    assert (
        starts(tmp_path) == 1 and json.loads((tmp_path / "outcome.json").read_text())["code"] == 75
    )
