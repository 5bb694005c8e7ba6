"""launch/submit.py: checks before submission, batch scripts, sweeps, and local runs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.errors import InputError
from core.quote import hydra_override
from launch import submit
from launch.jobs import local
from launch.jobs.sweep import compose_job, compose_sweep
from launch.planning.checks import Finding
from launch.slurm.script import render
from tests.commands import TIMEOUT_SECONDS
from tests.core.test_quote import words_of_sbatch

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = [
    "+experiment=7b",
    "cluster=h100_32n",
    "data.folder=/data",
    "data.tokenizer.path=/data/t.json",
]


def call_submit(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch/submit.py", *overrides])
    return submit.main()


def test_a_batch_script_follows_the_config(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text(
        "# two strikes, and one\nn7 2026-01-01 7b crash\nn7 2026-01-02 7b crash\nn8 2026-01-02 "
        "7b crash\n"
    )
    quoted = "run.dir='/tmp/a b$(touch x)'"
    overrides = [
        *CLUSTER,
        "slurm.partition=h100",
        f"slurm.bad_nodes_file={bad}",
        "slurm.sbatch_options=['--qos=long']",
        quoted,
    ]
    text = render(compose_job(overrides), "train", "train/pretrain.py")
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
    assert shown.stdout.splitlines() == [*overrides, "/tmp/a b$(touch x)"]
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    assert "@" not in [line[:1] for line in text.splitlines()]


FOLDERS = (
    "/tmp/a b$(touch x)",
    "/tmp/50%j # 'x' \"y\"",
    "/tmp/@SETTINGS@/`touch x`",
    "/tmp/Größe;touch x",
    "/tmp/${a}/{b,c}=!!",
)


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("stage", ["prepare", "train", "export"])
def test_a_batch_script_takes_a_folder_as_text(folder: str, stage: str, tmp_path: Path) -> None:
    """sbatch reads the folder of the log, bash that of the run and the overrides; none is run."""
    overrides = [*CLUSTER, hydra_override("run.dir", folder), f"slurm.bad_nodes_file={tmp_path}/b"]
    job = compose_job([*overrides, hydra_override("slurm.account", f"x{folder}")])
    script = render(job, stage, "train/pretrain.py")
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    options = [word for line in lines for word in words_of_sbatch(line)]
    output = folder.replace("%", "%%")
    assert f"--output={output}/slurm-{stage}-%j.out" in options
    assert f"--account=x{folder}" in options
    settings = script.split("\ncd ")[0] + '\nprintf "%s\\0" "$RUN" "${OVERRIDES[@]}"'
    shown = subprocess.run(["bash", "-c", settings], cwd=tmp_path, capture_output=True, text=True)
    assert shown.stdout.split("\0")[:-1] == [folder, *job.arguments] and shown.stderr == ""
    assert list(tmp_path.iterdir()) == []
    assert compose_job(job.arguments).config.run.dir == folder


def test_a_printed_script_ends_where_its_marker_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A text may have a line that is the marker of the end; the script is only printed here."""
    prompt = f"generate.prompt='a\nEND\ntouch {tmp_path}/x\n'"
    words = ["+experiment=demo", f"run.dir={tmp_path}/run", prompt, "--dry-run"]
    assert call_submit(monkeypatch, *words, "--stages", "prepare") == 0
    shown = capsys.readouterr().out.partition("\n\n")[2].strip()
    assert shown.startswith("# sbatch --parsable <<'END_'\n") and shown.endswith("\nEND_")
    command = shown.replace("# sbatch --parsable <<", "cat <<", 1)
    read = subprocess.run(["bash", "-c", command], check=True, capture_output=True, text=True)
    assert read.stdout == shown.partition("\n")[2].removesuffix("END_")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["slurm.time=soon"], "write DAYS-HOURS"),
        (["+slurm.env.WANDB_API_KEY=1"], "export them before sbatch"),
        (["schedule.min_lr=1"], "exceeds the peak optim.lr"),
        (["parallel.micro_batch_tokens=1"], "is below the longest sequence"),
        (["compute.recompute=none", "parallel.micro_batch_tokens=65536"], "do not fit"),
    ],
)
def test_errors_are_found_before_submission(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        call_submit(monkeypatch, *CLUSTER, *overrides, "--dry-run")


def test_a_chain_of_stages_is_printed_in_order(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*CLUSTER, "data.tokenizer.path=null", "--dry-run"]
    assert call_submit(monkeypatch, *words, "--stages", "prepare,train,export,eval") == 0
    text = capsys.readouterr().out
    for previous, script in (("PREPARE", "pretrain"), ("TRAIN", "export"), ("EXPORT", "run")):
        assert f"afterok:${previous}" in text and f"{script}.py" in text
    with pytest.raises(InputError, match="in this order"):
        call_submit(monkeypatch, *CLUSTER, "--stages", "eval,train")


def test_a_run_without_its_data_is_not_submitted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    demo = ["+experiment=demo", f"run.dir={tmp_path}/run", f"data.folder={tmp_path}/data"]
    for stages in ("train", "eval", "train,eval"):
        with pytest.raises(InputError, match="demo: no tokenizer at .*data/prepare.py"):
            call_submit(monkeypatch, *demo, "--dry-run", "--local", "--stages", stages)
    assert call_submit(monkeypatch, *demo, "--dry-run", "--local", "--stages", "prepare,train") == 0
    for wrong, reason in (
        (f"data.tokenizer.path={tmp_path}/none.json", "no tokenizer at .*none.json"),
        ("data.sources.web.recipe=wed", "wed"),
        ("data.sources.math.expected_tokens=1000", "tokens of math, which has"),
    ):
        with pytest.raises(InputError, match=reason):
            call_submit(monkeypatch, *demo, wrong, "--dry-run", "--stages", "prepare,train")
    assert call_submit(monkeypatch, *demo, "--dry-run", "--local", "--stages", "export") == 0
    monkeypatch.setattr(
        submit, "file_system", lambda config: Finding("bad", "run.dir is on tmpfs", "share it")
    )
    with pytest.raises(InputError, match="demo: run.dir is on tmpfs: share it"):
        call_submit(monkeypatch, *demo, "--dry-run", "--stages", "prepare,train")


def test_a_sweep_has_one_run_per_point() -> None:
    overrides = ["+experiment=130m", "data.folder=/data", "data.tokenizer.path=/t.json"]
    sweep, jobs = compose_sweep(
        [*overrides, "optim.lr=1e-3,3e-3", "schedule.decay_tokens=1e9,2e9"], None
    )
    assert (
        sweep.folder == "runs/sweeps/130m-decay_tokens-lr" and len(jobs) == len(sweep.points) == 4
    )
    points = {(job.config.optim.lr, job.config.schedule.decay_tokens) for job in jobs}
    assert points == {(rate, decay) for rate in (1e-3, 3e-3) for decay in (10**9, 2 * 10**9)}
    assert "lr-0.001_decay_tokens-1e9" in sweep.points
    folders = {job.config.run.dir for job in jobs}
    assert folders == {f"{sweep.folder}/{label}" for label in sweep.points}
    with pytest.raises(InputError, match="several values"):
        compose_sweep(overrides, None)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_named_sweeps_compose(path: Path) -> None:
    overrides = [
        "+experiment=130m",
        f"+sweep={path.stem}",
        "data.folder=/data",
        "data.tokenizer.path=/t.json",
    ]
    sweep, jobs = compose_sweep(overrides, None)
    assert sweep.folder == f"runs/sweeps/{path.stem}" and len(jobs) >= 2
    assert all(job.config.run.name.startswith(f"{path.stem}.") for job in jobs)


def test_local_runs_continue_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def wait(command: list[str]) -> tuple[int, bool]:
        commands.append(command)
        return int("optim.clip_norm=1.0" in command), False

    monkeypatch.setattr(local, "wait", wait)
    overrides = [
        "-m",
        "+experiment=demo",
        f"hydra.sweep.dir={tmp_path}",
        "optim.clip_norm=0.5,1.0,2.0",
        "--name",
        "clip",
    ]
    assert call_submit(monkeypatch, *overrides, "--local", "--stages", "prepare,train") == 1
    scripts = [next(word for word in command if word.endswith(".py")) for command in commands]
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


def fake_torchrun(folder: Path, text: str) -> list[str]:
    """A script in place of torchrun that appends to `starts` and can write outcome.json."""
    path = folder / "torchrun.py"
    prelude = f"import json, os, pathlib, signal, sys, time\nrun = pathlib.Path({str(folder)!r})\n"
    prelude += "open(run / 'starts', 'a').write('x')\n"
    prelude += (
        "def finish(code): (run / 'outcome.json').write_text(json.dumps("
        "{'outcome': 'by test', 'code': code, 'reason': 'requested'}))\n"
    )
    path.write_text(prelude + text)
    return [sys.executable, str(path)]


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


def test_a_requeued_training_is_started_again_locally(tmp_path: Path) -> None:
    """torchrun exits with 1 throughout: code 75 twice and then 0 is done; code 2, and a crash with
    an outcome of an earlier start, are failures.
    """
    requeue_twice = (
        "n = len((run / 'starts').read_text())\nif n < 3: finish(75); sys.exit(1)\nfinish(0)"
    )
    assert (
        local.run_until_done(fake_torchrun(tmp_path, requeue_twice), tmp_path) == "done"
        and starts(tmp_path) == 3
    )
    (tmp_path / "starts").unlink()
    assert (
        local.run_until_done(fake_torchrun(tmp_path, "finish(2); sys.exit(1)"), tmp_path)
        == "failed"
        and starts(tmp_path) == 1
    )
    (tmp_path / "outcome.json").write_text('{"code": 75, "reason": "of an earlier start"}')
    assert (
        local.run_until_done(fake_torchrun(tmp_path, "sys.exit(1)"), tmp_path) == "failed"
        and starts(tmp_path) == 2
    )


def test_ctrl_c_waits_for_the_ranks_to_save(tmp_path: Path) -> None:
    """SIGINT reaches launcher and training, as from a terminal; nothing is started again."""
    ranks = """def save(*_):
    time.sleep(1)
    finish(75)
    sys.exit(1)
signal.signal(signal.SIGINT, save)
(run / 'ready').touch()
time.sleep(3600)"""
    command = fake_torchrun(tmp_path, ranks)
    call = f"print(local.run_until_done({command}, Path({str(tmp_path)!r})))"
    # background jobs ignore SIGINT
    foreground = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"from pathlib import Path; from launch.jobs import local; {foreground}; {call}"
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
        assert (
            process.communicate(timeout=TIMEOUT_SECONDS)[0] == "interrupted\n"
            and process.returncode == 0
        )
    assert (
        starts(tmp_path) == 1 and json.loads((tmp_path / "outcome.json").read_text())["code"] == 75
    )
