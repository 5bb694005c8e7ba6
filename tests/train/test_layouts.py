"""Exported bytes and held-out losses do not depend on the layout of ranks."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.stream.manifests import tokenizer_path
from data.tokenizer import (
    EOS_TOKEN,
    SPECIAL_TOKENS,
    untrained_tokenizer,
    write_transformers_files,
)
from eval.export import export
from tests.small import config, evaluation
from tests.train.world import records


def export_hashes(root: Path, name: str) -> dict[str, str]:
    """Export a run, which also compares with transformers; return SHA-256 of every file.

    Without the record and the card, which name the checkpoint.
    """
    run = config(root, name)
    data = replace(run.data, folder=str(root / "vocabulary"))  # the corpus has no tokenizer
    tokenizer_path(data).parent.mkdir(parents=True, exist_ok=True)
    vocabulary = untrained_tokenizer()
    vocabulary.add_special_tokens(list(SPECIAL_TOKENS))
    vocabulary.save(str(tokenizer_path(data)))
    write_transformers_files(tokenizer_path(data).parent, vocabulary, EOS_TOKEN)
    export(evaluation(replace(run, data=data)), max_bytes=20_000)
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.run.files.hf.iterdir()
        if path.name not in ("export.json", "README.md")
    }


@pytest.mark.parametrize(
    ("source", "other"),
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
    world: Path, source: str, other: str
) -> None:
    hashes = export_hashes(world, source)
    assert hashes == export_hashes(world, other)
    assert sum(name.endswith(".safetensors") for name in hashes) > 1


def test_different_weights_export_different_bytes(world: Path) -> None:
    assert export_hashes(world, "dp1") != export_hashes(world, "tp2")  # equal only to rounding


@pytest.mark.parametrize(
    "layout", ["dp2", "tp2", "cp2", "dp1-to-tp2", "zero0-to-zero3", "megatron"]
)
def test_validation_is_the_same_in_any_layout(world: Path, layout: str) -> None:
    """Also under context parallelism, where training shards sequences and validation does not."""

    def validations(name: str) -> dict[int, dict[str, dict[str, float]]]:
        return {r["tokens"]: r["validation"] for r in records(world, name) if "validation" in r}

    actual, expected = validations(layout), validations("dp1")
    assert len(actual) >= 2 and set(actual) <= set(expected)
    for tokens, sources in actual.items():
        assert set(sources) == {"prose", "sums"}
        for name, values in sources.items():
            for key in ("loss", "bits_per_byte"):
                torch.testing.assert_close(
                    values[key], expected[tokens][name][key], rtol=3e-5, atol=0
                )
