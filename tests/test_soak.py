"""`make soak` with a fault of every kind in a short run."""

from pathlib import Path

from tests.commands import Result, forked
from tests.corpus import BLOCK, make_corpus
from tests.small import overrides
from tests.soak import KINDS
from train.resilience.incidents import INTERRUPTED

SHORT = [
    *overrides(60 * BLOCK),
    *("schedule.warmup_tokens=200", "schedule.ramp_tokens=600", "schedule.decay_tokens=1500"),
    *(
        "schedule.batch_start_sequences=2",
        "schedule.batch_end_sequences=4",
        "parallel.micro_batch_tokens=64",
    ),
    *("checkpoint.every_tokens=400", "checkpoint.retry_seconds=0", "checkpoint.keep_last=3"),
    *(
        "health.hang_seconds=2",
        "health.spike_window_updates=8",
        "health.check_replicas_every_steps=5",
    ),
    *("metrics.wandb_project=null", "validation.every_tokens=1_000_000"),
]


def soak(folder: Path, *options: object) -> Result:
    words = ("--faults", len(KINDS), "--home", folder / "soak", "--data", folder / "data")
    return forked("-m", "tests.soak", *words, *options, *SHORT)


def test_faults_of_all_kinds_change_nothing_and_a_paused_soak_continues(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data")
    paused = soak(tmp_path, "--seconds", 3)
    assert paused.returncode == INTERRUPTED, paused.stdout + paused.stderr
    assert "run the same command to continue" in paused.stdout
    resumed = soak(tmp_path)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert ", continuing" in resumed.stdout and "did not fire" not in resumed.stdout
    assert all(kind in resumed.stdout for kind, _ in KINDS)
    assert "bit-identical to the clean run" in resumed.stdout
