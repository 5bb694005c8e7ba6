"""Files written by commit bd3e05a are read, verified, resumed and exported (fixtures/README.md)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from core.compose import convert
from core.old_keys import load_config
from core.run import iter_checkpoints
from data.tokenizer import load as load_tokenizer
from eval.export import export
from eval.hf.card import model_card
from eval.hf.tokenizer import ADDS_NOTHING
from eval.hf.transformers_model import load_transformers_model
from model.checkpoint import CheckpointReader, read_state, verify_checkpoint
from model.hf import HfFolder
from tests.distributed import run_ranks
from tests.small import config, evaluation
from tests.train.world import curve, records, train, with_megatron, with_zero_stage
from train.config import RunConfig

FIXTURES = Path(__file__).resolve().parent / "fixtures"
RELATIVE = 2e-4  # between instruction sets
ZERO_STAGES = {"zero0-dp2": 0, "zero1-dp2": 1, "zero2-dp2": 2, "zero3-dp2": 3}
LAYOUTS = (*ZERO_STAGES, "megatron-dp2", "zero1-tp2", "zero1-cp2")


def layout_config(root: Path, name: str) -> RunConfig:
    """Config of the run of a fixture, to be continued below `root`."""
    run = config(
        root,
        name,
        tensor_parallel=2 if name == "zero1-tp2" else 1,
        context_parallel=2 if "cp2" in name else 1,
    )
    run = replace(run, data=replace(run.data, folder=str(FIXTURES / "corpus")))
    return (
        with_megatron(run)
        if name == "megatron-dp2"
        else with_zero_stage(run, ZERO_STAGES.get(name, 1))
    )


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all layouts, resumed from the checkpoints of the fixtures and trained to the end."""
    root = tmp_path_factory.mktemp("resumed")
    for name in LAYOUTS:
        shutil.copytree(FIXTURES / "runs" / name / "checkpoints", root / name / "checkpoints")
    run_ranks(2, [(train, (layout_config(root, name),)) for name in LAYOUTS])
    return root


@pytest.mark.parametrize("name", LAYOUTS)
def test_run_resumes_from_an_old_checkpoint(resumed: Path, name: str) -> None:
    losses = curve(resumed, name)
    expected = curve(FIXTURES / "runs", name)
    assert len(losses) == 15 and len(expected) == 43
    torch.testing.assert_close(losses, expected[28:], rtol=RELATIVE, atol=1e-7)
    assert [r["tokens"] for r in records(resumed, name)] == [
        r["tokens"] for r in records(FIXTURES / "runs", name)
    ][28:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_old_checkpoints_verify_and_have_every_tensor(name: str) -> None:
    (folder,) = iter_checkpoints(FIXTURES / "runs" / name / "checkpoints")
    assert verify_checkpoint(folder) is None and read_state(folder)["step"] == 28
    reader = CheckpointReader(folder)
    assert {kind for kind, _ in reader.where} == {"param", "exp_avg", "exp_avg_sq"}
    assert len(reader.where) == 3 * 23
    assert all(
        torch.isfinite(reader.read_full(kind, tensor)).all() for kind, tensor in reader.where
    )


def test_old_checkpoint_exports_the_same_bytes(tmp_path: Path) -> None:
    old = FIXTURES / "runs" / "zero1-dp2"
    shutil.copytree(old / "checkpoints", tmp_path / "zero1-dp2" / "checkpoints")
    run = layout_config(tmp_path, "zero1-dp2")
    export(evaluation(run), max_bytes=20_000)
    files = {path.name: path.read_bytes() for path in run.run.files.hf.iterdir()}
    assert files.pop("export.json") and files.pop("README.md").startswith(b"---")
    expected = {path.name: path.read_bytes() for path in (old / "hf").iterdir()}
    tokenizer = json.loads(files.pop("tokenizer_config.json"))
    assert tokenizer == json.loads(expected.pop("tokenizer_config.json")) | ADDS_NOTHING
    assert files == expected


def test_old_export_is_read_by_us_and_by_transformers() -> None:
    folder = FIXTURES / "runs" / "zero1-dp2" / "hf"
    ours = HfFolder(folder)
    (step,) = iter_checkpoints(FIXTURES / "runs" / "zero1-dp2" / "checkpoints")
    for name in ours.names:
        assert torch.equal(ours.read_full(name), CheckpointReader(step).read_full("param", name))
    assert sum(p.numel() for p in load_transformers_model(folder).parameters()) == 14_952


def test_config_of_an_old_run_is_read_and_gives_a_model_card() -> None:
    folder = FIXTURES / "runs" / "zero1-dp2"
    record = load_config(folder / "config.yaml")
    assert record.pop("code")["commit"].startswith("bd3e05a")
    run = convert(RunConfig, record)
    expected = config(Path("runs"), "zero1-dp2")
    assert {source.input for source in run.data.sources.values()} == {"host"}, "a value of bd3e05a"
    assert run == replace(
        expected,
        data=replace(expected.data, folder="corpus", sources=run.data.sources),
        health=replace(expected.health, hang_seconds=60.0),
    )
    (step,) = iter_checkpoints(folder / "checkpoints")
    tokenizer = load_tokenizer(folder / "hf" / "tokenizer.json")
    card = model_card(folder, step, run.model, tokenizer)
    assert "14,952 parameters after 816 tokens" in card and "| prose | curated | CC0-1.0 |" in card
    assert "## Results" not in card and "model-index" not in card  # no benchmark was run
    assert json.loads((folder / "outcome.json").read_text())["outcome"] == "finished"


def test_init_from_is_used_if_no_checkpoint_is_complete(tmp_path: Path) -> None:
    """A kill during the first save may leave a folder without a manifest."""
    runs = []
    for name in ("clean", "broken"):
        run = layout_config(tmp_path, name)
        hf = FIXTURES / "runs" / "zero1-dp2" / "hf"
        runs.append(replace(run, run=replace(run.run, init_from=str(hf))))
    (runs[1].run.files.checkpoints / "step-00000010").mkdir(parents=True)
    run_ranks(1, [(train, (run,)) for run in runs])
    clean, broken = (curve(tmp_path, run.run.name) for run in runs)
    assert torch.equal(clean, broken)
    random_init = curve(FIXTURES / "runs", "zero1-dp2")
    assert abs(clean[0, 0] - random_init[0, 0]) > 0.1
