"""`make soak` in small: the same command, with a fault of every kind in a run of seconds."""

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


def test_every_kind_of_fault_leaves_no_trace_and_a_pause_goes_on(tmp_path: Path) -> None:
    make_corpus(tmp_path / "data")
    paused = soak(tmp_path, "--seconds", 3)
    assert paused.returncode == INTERRUPTED, paused.stdout + paused.stderr
    assert "the same command goes on" in paused.stdout
    whole = soak(tmp_path)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert ", going on" in whole.stdout and "did not happen" not in whole.stdout
    assert all(kind in whole.stdout for kind, _ in KINDS)
    assert "bit-identical to the clean run" in whole.stdout
