"""What a layout of ranks must not change for those who read a run: exported bytes, held-out
losses.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.stream.manifests import tokenizer_path
from eval.export import TOKENIZER_FILES, export
from tests.small import config, evaluation
from tests.train.world import records


def exported(root: Path, name: str) -> dict[str, str]:
    """SHA-256 of every file of a run's export, by the real command's function: it also compares
    with transformers.
    """
    run = config(root, name)
    data = replace(run.data, folder=str(root / "vocabulary"))  # the corpus has none
    tokenizer_path(data).parent.mkdir(parents=True, exist_ok=True)
    for file in TOKENIZER_FILES:  # copied, and read by nobody here
        (tokenizer_path(data).parent / file).write_text("{}")
    export(evaluation(replace(run, data=data)), max_bytes=20_000)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.run.files.hf.iterdir()
    }


@pytest.mark.parametrize(
    ("written_by", "and_by"),
    [
        ("tp2", "tp2-as-dp2"),  # tensor parallel, data parallel with ZeRO-1
        ("dp1", "dp1-as-tp2"),  # one rank, tensor parallel
        ("dp2", "dp2-as-dp1"),
        ("zero0-to-zero3", "zero3-as-zero0"),  # ZeRO-3, no ZeRO
        ("zero3-to-zero2", "zero2-as-zero3"),  # ZeRO-2, ZeRO-3
        ("dp1-to-tp2", "sequence-as-dp2"),  # sequence parallel, data parallel
        ("megatron", "megatron-as-zero3"),  # megatron-core's optimizer, DeepSpeed's
    ],
)
def test_checkpoints_of_any_layout_export_the_same_bytes(
    world: Path, written_by: str, and_by: str
) -> None:
    one, other = exported(world, written_by), exported(world, and_by)
    assert one == other and sum(name.endswith(".safetensors") for name in one) > 1


def test_different_weights_export_different_bytes(world: Path) -> None:
    assert exported(world, "dp1") != exported(world, "tp2")  # equal to rounding alone


@pytest.mark.parametrize(
    "layout", ["dp2", "tp2", "cp2", "dp1-to-tp2", "zero0-to-zero3", "megatron"]
)
def test_validation_is_the_same_in_any_layout(world: Path, layout: str) -> None:
    """Under context parallelism too, where training cuts sequences over ranks and validation does
    not.
    """

    def validations(name: str) -> dict[int, dict[str, dict[str, float]]]:
        return {r["tokens"]: r["validation"] for r in records(world, name) if "validation" in r}

    found, expected = validations(layout), validations("dp1")
    assert len(found) >= 2 and set(found) <= set(expected)
    for tokens, sources in found.items():
        assert set(sources) == {"prose", "sums"}
        for name, values in sources.items():
            wanted = expected[tokens][name]
            torch.testing.assert_close(values["loss"], wanted["loss"], rtol=3e-5, atol=0)
            torch.testing.assert_close(
                values["bits_per_byte"], wanted["bits_per_byte"], rtol=3e-5, atol=0
            )
