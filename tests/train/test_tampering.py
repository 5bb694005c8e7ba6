"""Checkpoints that somebody or something changed: refused in one line, or loaded as they are."""

import errno
import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import model.checkpoint
from core.errors import InputError
from core.files import write_json
from core.records import DamagedRecord
from model.checkpoint import CheckpointReader, read_model, read_state, verify_checkpoint
from model.checkpoint_records import SpikeState
from model.flops import parameter_shapes
from tests.distributed import run_ranks
from tests.mutations import damage_json, edit_json, fresh_copy
from tests.test_fixtures import FIXTURES, layout_config
from tests.train.world import train
from train.checkpoint.writer import manifest_entry
from train.checkpoints import main as inspect
from train.config import RunConfig
from train.resilience.health import SpikeDetector

STEP = "step-00000028"
CHECKPOINT = FIXTURES / "runs" / "zero1-tp2" / "checkpoints" / STEP
PLAIN = FIXTURES / "runs" / "zero0-dp2" / "checkpoints" / STEP
MANIFEST, STATE, INDEX, TENSORS = (
    *("manifest.json", "state.json"),
    *("rank-00000.json", "rank-00000.safetensors"),
)
MUTATIONS = 150


def rehash(folder: Path) -> None:
    """Write a manifest that the files match."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    entries = {
        name: manifest_entry(folder / name)
        if (folder / name).is_file() and (folder / name).stat().st_size
        else {"bytes": 0, "sha256": "0" * 64}
        for name in names
    }
    write_json(folder / MANIFEST, {"files": entries})


def tensors_of(folder: Path) -> dict[tuple[str, str], Tensor]:
    """Load a checkpoint as a start does; raises DamagedRecord."""
    reader = CheckpointReader(folder)
    reader.require(parameter_shapes(read_model(folder)))
    return {key: reader.read_full(*key) for key in reader.where}


def test_every_mutation_is_refused_in_one_line_or_loads_the_same_values(tmp_path: Path) -> None:
    rng = random.Random(18)
    expected = tensors_of(CHECKPOINT)
    refused = 0
    for _ in range(MUTATIONS):
        folder = fresh_copy(CHECKPOINT, tmp_path / STEP)
        name = rng.choice([MANIFEST, INDEX, "rank-00001.json", STATE])
        what = damage_json(folder / name, rng)
        if name != MANIFEST:
            rehash(folder)
        why = verify_checkpoint(folder)
        if why is None:
            try:
                found = tensors_of(folder)
            except DamagedRecord as error:
                why = str(error)
            else:
                assert found.keys() == expected.keys(), what
                assert all(torch.equal(found[key], expected[key]) for key in found), what
                written = json.loads((folder / STATE).read_text())
                state = read_state(folder)
                assert all(state[key] == value for key, value in written.items()), what
        if why is not None:
            assert "\n" not in why and len(why) < 400, (what, why)
            # indices that differ: which one is wrong is open
            names = "rank-0000" if name.startswith("rank") else name
            assert names in why or "the folder is a copy" in why or "the model's is" in why
            refused += 1
    assert MUTATIONS * 0.6 < refused < MUTATIONS


def retensor(change: Callable[[str, Tensor], Tensor | None], kind: str = "") -> Any:
    """Return a change of every tensor of a kind in the first rank's file."""

    def apply(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        for key, value in list(tensors.items()):
            if key.startswith(kind):
                changed = change(key, value)
                tensors[key] = value if changed is None else changed
        save_file(tensors, folder / TENSORS)

    return apply


def of_index(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / INDEX, change)


def of_state(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / STATE, lambda raw: raw.update(values))


def two_ranks_hold_the_same(folder: Path) -> None:
    (folder / "rank-00001.json").write_bytes((folder / INDEX).read_bytes())
    (folder / "rank-00001.safetensors").write_bytes((folder / TENSORS).read_bytes())


def rename_tensor(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors["param/other/0/0"] = tensors.pop("param/final_norm.weight/0/0")
    save_file(tensors, folder / TENSORS)


TAMPERS: tuple[tuple[Callable[[Path], Any], str], ...] = (
    (of_index(lambda raw: raw[0].update(numel=10**15)), "rank-00000.json: param/embedding.weight"),
    (of_index(lambda raw: raw[0].update(numel=-5)), "rank-00000.json: 0.numel is -5"),
    (of_index(lambda raw: raw[0].update(numel=5)), "overlap or are missing"),
    (of_index(lambda raw: raw[0].update(start=-5)), "rank-00000.json: 0.start is -5"),
    (of_index(lambda raw: raw[0].update(shape=[10**9, 10**9])), ", the shard in rank-00000.json"),
    (of_index(lambda raw: raw[0].update(shape=[])), "rank-00000.json: 0.shape is []"),
    (of_index(lambda raw: raw[0].update(tp_size=0)), "0.tp_size is 0"),
    (of_index(lambda raw: [entry.update(tp_size=3) for entry in raw] and raw), "rank-00000.json"),
    (of_index(lambda raw: raw[0].update(tp_rank=1)), "tp_rank 0, where those from 0"),
    (of_index(lambda raw: raw[0].update(kind="moment")), "0.kind is 'moment'"),
    (of_index(lambda raw: raw + raw), "overlap or are missing"),
    (of_index(lambda raw: [*raw, {**raw[0], "start": 1, "numel": 9}]), "overlap or are missing"),
    (of_index(lambda raw: raw[1:]), "where those from 0"),
    (of_index(lambda raw: {"a": 1}), "rank-00000.json: it is {'a': 1}"),
    (two_ranks_hold_the_same, "rank-00001.json: param/embedding.weight/0/0"),
    (lambda folder: (folder / TENSORS).write_bytes(b"x" * 4), "is not a safetensors file"),
    (
        lambda folder: (folder / TENSORS).write_bytes(struct.pack("<Q", 2**63) + b"x" * 100),
        "rank-00000.safetensors is not a safetensors file",
    ),
    (retensor(lambda _, value: value.double()), "is ('F64'"),
    (retensor(lambda _, value: value.half()), "is ('F16'"),
    (retensor(lambda _, value: value.bool()), "is ('BOOL'"),
    (retensor(lambda _, value: value[:, None].contiguous()), ", 1)), its index says ('F32'"),
    (retensor(lambda _, value: torch.cat([value, value])), "its index says ('F32'"),
    (rename_tensor, "param/final_norm.weight/0/0 is missing"),
    (of_state(tokens="abc"), "state.json: tokens is 'abc'"),
    (of_state(tokens=float("nan")), "state.json: tokens is nan"),
    (of_state(tokens=-1024), "state.json: tokens is -1024"),
    (of_state(tokens=27), "state.json: step is 28, more than tokens, 27"),
    (of_state(step=27), "state.json: updates is 28, more than step, 27"),
    (of_state(step=29), "state.json is of step 29: the folder is a copy"),
    (of_state(step=10**30), "state.json: step is 1000"),
    (of_state(updates=-1), "state.json: updates is -1"),
    (of_state(model=None), "state.json: model is None"),
    (of_state(plan=5), "state.json: plan is 5"),
    (of_state(health=[1]), "state.json: health is [1]"),
    (of_state(health={"window": [1.0, float("inf")]}), "health: window.1 is inf"),
    (of_state(health={"mood": 1}), "mood is no key"),
    (of_state(config=[]), "state.json: config is []"),
    (of_state(tokenizer="x"), "state.json: tokenizer is 'x'"),
    (of_state(format=2), "state.json: format is 2"),
    (of_state(zzz=1), "zzz is no key of this file"),
    (lambda folder: (folder / STATE).write_text("[" * 100_000), "state.json: Invalid JSON"),
)


@pytest.mark.parametrize(("tamper", "words"), TAMPERS, ids=[words for _, words in TAMPERS])
def test_a_tampered_checkpoint_does_not_verify(
    tmp_path: Path, capsys: Any, tamper: Callable[[Path], Any], words: str
) -> None:
    """Hashes match. `ls`, `verify` and `diff` say it in one line or a row too."""
    folder = fresh_copy(PLAIN, tmp_path / "checkpoints" / STEP)
    tamper(folder)
    rehash(folder)
    why = verify_checkpoint(folder)
    assert why is not None and words in why and "\n" not in why
    assert inspect(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out == f"{STEP}: {why}\n"
    assert inspect(["ls", str(tmp_path)]) == 0
    assert inspect(["diff", str(tmp_path), str(PLAIN)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ("param", float("nan"), "values that are not finite"),
        ("exp_avg", float("-inf"), "values that are not finite"),
        ("exp_avg_sq", -1.0, "has -1.0; a mean of squares is not negative"),
    ],
)
def test_values_that_no_training_has_are_refused(
    tmp_path: Path, kind: str, value: float, words: str
) -> None:
    """They are found by what reads them; a copy without a name of ours may have any step."""
    folder = fresh_copy(PLAIN, tmp_path / "copy")
    retensor(lambda _, tensor: tensor[-1:].fill_(value) and None, f"{kind}/lm_head")(folder)
    rehash(folder)
    assert verify_checkpoint(folder) is None
    with pytest.raises(DamagedRecord, match=rf"{TENSORS}: {kind}/lm_head.weight/0/0 has"):
        tensors_of(folder)
    with pytest.raises(DamagedRecord, match=words):
        CheckpointReader(folder).read_full(kind, "lm_head.weight")
    torch.testing.assert_close(
        CheckpointReader(folder).read_full("param", "embedding.weight"),
        CheckpointReader(PLAIN).read_full("param", "embedding.weight"),
        rtol=0,
        atol=0,
    )


def resume(config: RunConfig, words: str) -> None:
    with pytest.raises(InputError, match=words):
        train(config)


def test_a_fault_that_one_rank_reads_ends_the_start_on_every_rank(tmp_path: Path) -> None:
    """Also tensors of another shape than the model's, and a record of settings that is none."""
    source = FIXTURES / "runs" / "zero1-dp2" / "checkpoints" / STEP
    works: list[tuple[Any, tuple[Any, ...]]] = []
    for name, change, words in (
        ("nan", None, r"rank-00001.safetensors: exp_avg/.* not finite.*move it away"),
        ("more", of_state(tokens=10**15), "more than the .* of the stages"),
        ("odd", of_state(tokens=817), "other shards|no step of the plan"),
        (
            "config",
            of_state(config={"schedule": 5}),
            "state.json has no record of a start: config has no run",
        ),
    ):
        run = layout_config(tmp_path, "zero1-dp2")
        run.run.name, run.run.dir = name, str(tmp_path / name)
        folder = fresh_copy(source, tmp_path / name / "checkpoints" / STEP)
        if change is None:
            tensors = load_file(folder / "rank-00001.safetensors")
            key = next(key for key in tensors if key.startswith("exp_avg/"))
            tensors[key][0] = float("nan")
            save_file(tensors, folder / "rank-00001.safetensors")
        else:
            change(folder)
        rehash(folder)
        works.append((resume, (run, words)))
    run_ranks(2, works)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOMEM])
def test_a_file_that_cannot_be_read_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, code: int
) -> None:
    folder = fresh_copy(PLAIN, tmp_path / "checkpoints" / STEP)

    def fail(path: Path, *arguments: object) -> str:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(model.checkpoint, "sha256_of", fail)
    with pytest.raises(InputError, match=f"{os.strerror(code)}.*may be intact and is left"):
        verify_checkpoint(folder)
    assert inspect(["verify", str(tmp_path)]) == 1
    assert os.strerror(code) in capsys.readouterr().out


def test_the_state_of_the_spike_detector_is_typed() -> None:
    names = {field.name for field in fields(SpikeState)}
    assert names == set(SpikeDetector.SAVED_AS.values())
