"""Runs under injected faults, in real processes, compared with clean runs."""

import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from core.records import read_typed_lines
from core.run import RunFiles
from data.stream.manifests import read_manifest, source_folder
from tests.corpus import make_corpus
from tests.injector import Fault, samples
from tests.small import config, health
from tests.soak import Result, differences, in_folder, log_dir, schedule, soak, steps_of
from tests.supervisor import History, start_once, supervise
from train.config import RunConfig
from train.metrics.records import read_lines
from train.resilience.config import VerifyShards
from train.resilience.incidents import read_outcome
from train.schedule import Schedule

SHORT = [
    Fault("kill", 1, 6),
    Fault("kill in save", 0, 9, 4),
    Fault("checkpoint damaged", 0, 16, 8),
    Fault("stop", 1, 21),
    Fault("nan", 0, 24, 1),
    Fault("disk full", 1, 26),
    Fault("SIGTERM", 1, 31),
    Fault("weights flip", 1, 36),
]


def incidents_of(folder: Path) -> list[dict[str, Any]]:
    return list(read_typed_lines(RunFiles(folder).incidents, dict[str, Any]))


def quick(root: Path) -> RunConfig:
    """Config of a small run; tests/injector.py counts hang_seconds only after a hang."""
    run = config(root, "run")
    run.health = replace(health(), hang_seconds=2.0, max_starts=20, spike_window_updates=8)
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus."""
    root = tmp_path_factory.mktemp("faults")
    make_corpus(root / "data")
    return root


@pytest.fixture(scope="module")
def short(root: Path) -> Result:
    folder = root / "short"
    folder.mkdir()
    return soak(quick(root), SHORT, folder)


@pytest.mark.fault("eight faults of eight kinds in one short run", "bit-identical to a clean run")
def test_short_soak_is_bit_identical_to_a_clean_run(short: Result, measured: Any) -> None:
    assert short.differences == []
    assert {fault.name for fault in short.faults} == short.fired
    harmless = {"nan", "disk full"}
    assert short.history.starts == 1 + len({fault.kind for fault in SHORT} - harmless)
    measured(f"{short.repeated} of {short.steps} repeated steps, {short.history.starts} starts")


def test_exit_codes_tell_the_kind_of_end(short: Result) -> None:
    codes = short.history.codes
    assert codes[-1] == [0, 0]
    assert [75, 75] in codes  # one rank got SIGTERM three times
    assert sum(-9 in start for start in codes) >= 4
    assert any(76 in start for start in codes)  # the peer of the stopped rank: a hang
    outcome = read_outcome(short.folder)
    assert outcome is not None and outcome.code == 0


def test_incidents_name_the_rank_and_the_tokens(short: Result) -> None:
    incidents = {entry["incident"]: entry for entry in incidents_of(short.folder)}
    assert incidents["drift"]["ranks"] == [1]
    assert (
        "no heartbeat from rank 1" in incidents["hang"]["text"] and incidents["hang"]["rank"] == 0
    )
    assert (
        incidents["skipped update"]["step"] == 25
        and "loss is nan" in incidents["skipped update"]["text"]
    )
    low, high = incidents["skipped update"]["tokens"]
    lines = read_lines(short.folder / "metrics.jsonl")
    assert [low, high] == [lines[23]["tokens"], lines[24]["tokens"]]
    assert [line["step"] for line in lines if line["skipped"]] == [25]
    assert (short.folder / "heartbeats" / "stacks-00000.txt").read_text().count("File") > 5


@pytest.mark.fault("a secret in the environment", "is in no file and no log")
def test_no_file_contains_a_secret_of_the_environment(short: Result, measured: Any) -> None:
    assert short.secrets == []
    measured(f"0 of {sum(path.is_file() for path in short.folder.parent.rglob('*'))} files")


@pytest.mark.parametrize("stage", [0, 2, 3])
@pytest.mark.fault(
    "ZeRO stages 0, 2, 3: NaN, kill -9, kill -9 in a save, SIGTERM", "bit-identical to a clean run"
)
def test_other_zero_stages_under_faults(root: Path, stage: int, measured: Any) -> None:
    run = config(root, "run")
    folder = root / f"zero-{stage}"
    run.parallel.zero_stage = stage
    folder.mkdir()
    faults = [
        Fault("nan", 1, 8, 1),
        Fault("kill", 1, 13),
        Fault("kill in save", 0, 18, 6),
        Fault("SIGTERM", 0, 30),
    ]
    result = soak(run, faults, folder)
    assert result.differences == [] and {fault.name for fault in faults} == result.fired
    skipped = [
        line["step"] for line in read_lines(result.folder / "metrics.jsonl") if line["skipped"]
    ]
    assert skipped == [9] and result.history.starts == 4 and [75, 75] in result.history.codes
    measured(f"bit-identical; {result.repeated} repeated steps, {result.history.starts} starts")


@dataclass
class Clean:
    """A clean run, with which many tests compare."""

    run: RunConfig
    root: Path
    history: History


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    root = tmp_path_factory.mktemp("clean")
    make_corpus(root / "data")
    run = quick(root)
    history = supervise(in_folder(run, root / "clean"), 2, [], root / "clean-log")
    return Clean(run, root, history)


MATRIX = [
    (
        "kill",
        "all ranks restart from the newest valid checkpoint",
        [Fault("kill", 0, 13), Fault("kill", 1, 29)],
    ),
    (
        "checkpoint damaged",
        "named and renamed; the one before it is loaded",
        [Fault("checkpoint damaged", 0, 9 + 6 * i, 7 * i + i) for i in range(4)],
    ),
    (
        "kill in save",
        "the partial checkpoint is ignored",
        [Fault("kill in save", i % 2, 6 + 6 * i, i) for i in range(6)],
    ),
    (
        "disk full",
        "the save is retried, no step is lost",
        [Fault("disk full", 0, 8), Fault("disk full", 1, 20)],
    ),
    (
        "disk error",
        "the save is retried, no step is lost",
        [Fault("disk error", 1, 8), Fault("disk error", 0, 20)],
    ),
    (
        "SIGTERM",
        "saved within one step, exit 75; a second signal has no effect",
        [Fault("SIGTERM", 0, 9), Fault("SIGTERM", 1, 23)],
    ),
    (
        "SIGTERM during a save",
        "both checkpoints are on disk before the exit",
        [Fault("slow disk", 1, 9), Fault("SIGTERM", 0, 14)],
    ),
    ("SIGUSR1", "saved within one step, exit 75", [Fault("SIGUSR1", 1, 15)]),
    (
        "stop",
        "the hanging rank is named and ended, all restart",
        [Fault("stop", 0, 11), Fault("stop", 1, 22)],
    ),
    (
        "storage hangs",
        "the rank ends itself, all restart",
        [Fault("storage hangs", 0, 11)],
    ),
    (
        "interpreter stuck",
        "the rank is named and ended by its peers, all restart",
        [Fault("interpreter stuck", 1, 11)],
    ),
    (
        "weights flip",
        "the drifting rank is named, all restart",
        [Fault("weights flip", 0, 19)],
    ),
    (
        "loader dies",
        "all restart, no sample is lost or repeated",
        [Fault("loader dies", 1, 17)],
    ),
    (
        "loader hangs",
        "the watchdog ends the rank, no sample is lost or repeated",
        [Fault("loader hangs", 0, 17)],
    ),
    ("slow", "named, the run continues", [Fault("slow", 1, 5, 36)]),
    ("log disk full", "records wait in memory", [Fault("log disk full", 0, 19, 3)]),
    (
        "log disk full, then kill",
        "the checkpoint has the records that wait",
        [Fault("log disk full", 0, 18, 4), Fault("kill", 1, 21)],
    ),
    ("clock jumps", "no effect", [Fault("clock jumps", 0, 9, 1), Fault("clock jumps", 1, 9, 2)]),
    ("second job", "refused", [Fault("second job", 0, 14)]),
]


HANG_TEXTS = {
    "stop": ("no heartbeat from rank 0", "no heartbeat from rank 1"),
    "interpreter stuck": ("no heartbeat from rank 1",),
    # the rank's own word, or that of its peer if that is first
    "storage hangs": ("has not answered for", "no heartbeat from rank 0"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        pytest.param(kind, faults, marks=pytest.mark.fault(kind, promise), id=kind)
        for kind, promise, faults in MATRIX
    ],
)
def test_each_kind_of_fault_is_bit_identical_to_a_clean_run(
    clean: Clean, kind: str, faults: list[Fault], measured: Any
) -> None:
    run = clean.run
    if kind == "slow":  # eight windows in 43 steps
        run = replace(run, health=replace(run.health, straggler_window_steps=4))
    result = soak(run, faults, clean.root, clean=clean.history)
    assert result.differences == [] and {fault.name for fault in faults} == result.fired
    num_signals = sum(fault.kind.startswith("SIG") for fault in faults)
    if num_signals:
        assert result.repeated == 0 and result.history.codes == [[75, 75]] * num_signals + [[0, 0]]
    if kind in ("disk full", "disk error", "slow", "log disk full", "clock jumps", "second job"):
        assert result.repeated == 0 and result.history.starts == 1
    if kind in HANG_TEXTS:
        texts = [e["text"] for e in incidents_of(result.folder) if e["incident"] == "hang"]
        assert any(expected in text for text in texts for expected in HANG_TEXTS[kind]), texts
    if kind == "slow":
        stragglers = {
            entry["rank"]
            for entry in incidents_of(result.folder)
            if entry["incident"] == "straggler"
        }
        assert 1 in stragglers
    measured(f"bit-identical; {result.history.starts} starts, {result.repeated} repeated steps")


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 at 20 random steps, of either rank", "bit-identical to the uninterrupted run"
)
def test_twenty_random_kills(clean: Clean, measured: Any) -> None:
    rng = random.Random(0)
    steps = sorted(rng.sample(range(1, steps_of(clean.run)), 20))
    result = soak(
        clean.run,
        [Fault("kill", rng.randrange(2), step) for step in steps],
        clean.root,
        clean=clean.history,
    )
    assert result.differences == [] and len(result.fired) == 20 and result.history.starts >= 21
    measured(f"bit-identical; {result.repeated} repeated steps")


@pytest.mark.slow
@pytest.mark.fault("52 faults of 34 kinds in one run", "bit-identical to a clean run")
def test_52_faults_of_all_kinds(tmp_path: Path, measured: Any) -> None:
    make_corpus(tmp_path / "data")
    run = quick(tmp_path)
    run.health.max_starts = 60
    faults = schedule(0, 52, steps_of(run), 2)
    result = soak(run, faults, tmp_path)
    assert (
        result.differences == []
        and {fault.name for fault in faults} == result.fired
        and result.secrets == []
    )
    clean, faulty = result.effective
    measured(
        f"bit-identical; {result.history.starts} starts, {result.repeated} repeated steps, "
        f"{faulty / clean:.0%} effective processor time"
    )


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 at every boundary: ramp, context, stage, decay",
    "bit-identical to the uninterrupted run",
)
def test_kills_at_every_boundary(clean: Clean, measured: Any) -> None:
    run = clean.run
    plan = Schedule(run.schedule, run.optim.lr, run.data)
    boundaries = {
        run.schedule.ramp_tokens,
        run.schedule.warmup_tokens,
        plan.total - run.schedule.decay_tokens,
    }
    boundaries |= {end for end, _, _ in plan.stages[:-1]}
    kill_steps = {
        step
        for boundary in boundaries
        for step in (steps_until(plan, boundary) - 1, steps_until(plan, boundary))
    }
    faults = [Fault("kill", step % 2, step) for step in sorted(kill_steps)]
    result = soak(run, faults, clean.root, clean=clean.history)
    assert result.differences == [] and len(result.fired) == len(faults) >= 8
    measured(f"bit-identical; {len(faults)} kills at {len(boundaries)} boundaries")


def steps_until(plan: Schedule, tokens: int) -> int:
    """Number of steps after which a run has read at least `tokens`."""
    total = 0
    steps = 0
    while total < tokens:
        total += plan.at(total).tokens
        steps += 1
    return steps


@pytest.mark.slow
@pytest.mark.fault(
    "another world size: 2, then 1, then 2 ranks", "the same samples, losses to 1e-6"
)
def test_another_number_of_ranks_reads_the_same_samples(clean: Clean, measured: Any) -> None:
    run = in_folder(clean.run, clean.root / "elastic")
    log = clean.root / "elastic-log"
    log.mkdir()
    assert start_once(run, 2, [Fault("SIGTERM", 0, 12)], log) == [75, 75]
    assert start_once(run, 1, [Fault("SIGUSR1", 0, 26)], log) == [75]
    assert start_once(run, 2, [], log) == [0, 0]
    hashes = samples(log / "faults", 2)
    assert hashes and all(hashes.values())
    assert hashes == samples(log_dir(clean.root / "clean") / "faults", 2)
    curves = [
        torch.tensor(
            [line["loss"] for line in read_lines(folder / "metrics.jsonl")], dtype=torch.float64
        )
        for folder in (run.run.folder, clean.root / "clean")
    ]
    max_error = float(((curves[0] - curves[1]) / curves[1]).abs().max())
    assert len(curves[0]) == len(curves[1]) and max_error < 1e-6
    measured(f"{sum(map(len, hashes.values()))} samples equal, losses to {max_error:.1e}")


@pytest.mark.fault(
    "a persistent loss spike",
    "rollback to a checkpoint before it, its data skipped; too often: exit 2",
)
def test_persistent_spike_is_rolled_back_and_its_data_skipped(
    tmp_path: Path, measured: Any
) -> None:
    make_corpus(tmp_path / "data")
    run = in_folder(quick(tmp_path), tmp_path / "rollback")
    spike = Fault("spike", 0, 28, run.health.spike_patience_updates)
    assert supervise(run, 1, [spike], tmp_path / "rollback-log").codes == [[0]]
    rollbacks = [entry for entry in incidents_of(run.run.folder) if entry["incident"] == "rollback"]
    lines = read_lines(run.run.folder / "metrics.jsonl")
    assert len(rollbacks) == 1 and rollbacks[0]["tokens"][1] == lines[30]["tokens"]
    assert [line["step"] for line in lines if line["skipped"]] == [29, 30, 31]
    # killed during the spike and right after the rollback
    again = in_folder(run, tmp_path / "again")
    faults = [spike, Fault("kill", 0, 29), Fault("kill", 0, 31)]
    assert supervise(again, 1, faults, tmp_path / "again-log").starts == 3
    assert differences(run.run.folder, again.run.folder, 1) == []
    low, high = rollbacks[0]["tokens"]
    endless = in_folder(run, tmp_path / "endless")
    endless.health = replace(endless.health, max_rollbacks=1)
    assert supervise(
        endless, 1, [Fault("spike", 0, 28, 10_000)], tmp_path / "endless-log"
    ).codes == [[2]]
    outcome = read_outcome(endless.run.folder)
    assert outcome is not None and "spiked again" in outcome.reason
    measured(f"{high - low} tokens skipped, reproducible under kill -9")


@pytest.mark.slow
@pytest.mark.fault("every start crashes at the same step", "stops with exit code 2 and the reason")
def test_crash_loop_stops(clean: Clean, measured: Any) -> None:
    run = in_folder(clean.run, clean.root / "loop")
    run.health = replace(run.health, max_starts=3)
    history = supervise(
        run, 2, [Fault("loader dies", 0, 2, number) for number in range(9)], clean.root / "loop-log"
    )
    assert history.codes[-1] == [2, 2] and history.starts == 4
    outcome = read_outcome(run.run.folder)
    assert (
        outcome is not None
        and "3 starts from 0 tokens" in outcome.reason
        and "injected" in outcome.reason
    )
    measured(f"exit 2 at start {history.starts}")


@pytest.mark.fault(
    "a shard that is corrupted, truncated, missing or swapped",
    "named, exit code 2, before or during training",
)
def test_bad_shards_are_named(tmp_path: Path, measured: Any) -> None:
    make_corpus(tmp_path / "data")
    run = quick(tmp_path)
    folder = source_folder(run.data, "prose")
    files = [folder / file.name for file in read_manifest(folder).splits["train"]]
    good = [path.read_bytes() for path in files]
    flipped = bytearray(good[1])
    flipped[1001] ^= 4
    cases = {
        "corrupted": (good[0], bytes(flipped)),
        "truncated": (good[0], good[1][:-2]),
        "missing": (good[0], None),
        "swapped": (good[1], good[0]),
    }
    for name, contents in cases.items():
        for path, content in zip(files, contents, strict=True):
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        log = tmp_path / f"{name}-log"
        log.mkdir()
        assert start_once(in_folder(run, tmp_path / name), 2, [], log) == [2, 2], name
        output = (log / "rank-0.log").read_text()
        assert f"shard {files[0 if name == 'swapped' else 1]}" in output and "error: " in output
        assert not (tmp_path / name / "metrics.jsonl").exists()
    files[0].write_bytes(good[0])
    files[1].write_bytes(flipped)
    background = in_folder(run, tmp_path / "background")
    background.health = replace(background.health, verify_shards=VerifyShards.background)
    (tmp_path / "background-log").mkdir()
    assert start_once(background, 2, [], tmp_path / "background-log") == [2, 2]
    reason = json.loads((tmp_path / "background" / "outcome.json").read_text())["reason"]
    assert str(files[1]) in reason
    steps = len(read_lines(tmp_path / "background" / "metrics.jsonl"))
    measured(f"4 of 4 before the first step; in the background after {steps}")


@pytest.mark.slow
@pytest.mark.fault("a rank hangs", "detected within the limit")
def test_hang_is_detected_within_the_limit(clean: Clean, measured: Any) -> None:
    run = in_folder(clean.run, clean.root / "hang")
    log = clean.root / "hang-log"
    log.mkdir()
    stop = Fault("stop", 1, 10)
    codes = start_once(run, 2, [stop], log)
    seconds = time.time() - (log / "faults" / stop.name).stat().st_mtime
    assert codes == [76, -9]
    measured(
        f"{seconds:.1f} s from the stop to the end of the ranks, limit "
        f"{run.health.hang_seconds:.0f} s"
    )
    assert seconds < 30 * run.health.hang_seconds
