"""Sequences split over 2 and 4 ranks equal one rank: losses, and every gradient summed over
ranks.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.config import Recompute
from model.kernels import CPU, MAMBA_SSM, REFERENCE
from model.parallel.build import build_model
from model.parallel.context import ContextRanks
from tests.distributed import run_ranks
from tests.model.fake_mamba_ssm import fake_mamba_ssm
from tests.tiny import TINY

LENGTH = 32
CASES = [
    (kernels, resets, recompute)
    for kernels in (CPU, REFERENCE)
    for resets in (None, "few", "edges")
    for recompute in (Recompute.none, Recompute.selective)
] + [(MAMBA_SSM, "edges", Recompute.none), (MAMBA_SSM, None, Recompute.selective)]  # on stand-ins


def problem(resets: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return tokens [b, l + 1] and doc_starts, some at and around the edges of chunks."""
    tokens = torch.randint(
        0, TINY.vocab_size, (3, LENGTH + 1), generator=torch.Generator().manual_seed(1)
    )
    if resets is None:
        return tokens, None
    doc_starts = torch.zeros(3, LENGTH, dtype=torch.bool)
    positions = {"few": ([5], [20, 21], []), "edges": ([8, 15, 16], [7, 17, 24], [0, 31])}[resets]
    for row, columns in enumerate(positions):
        doc_starts[row, columns] = True
    return tokens, doc_starts


def results(index: int, context: ContextRanks | None) -> dict[str, torch.Tensor]:
    """Return this rank's summed loss and gradients; slow decays make states reach far."""
    kernels, resets, recompute = CASES[index]
    tokens, doc_starts = problem(resets)
    model = build_model(TINY, kernels, 0, torch.device("cpu"), recompute=recompute)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if context is not None:
        model.set_context(context)
        inputs, targets = context.local_chunk(inputs), context.local_chunk(targets)
        doc_starts = None if doc_starts is None else context.local_chunk(doc_starts)
    with fake_mamba_ssm():
        losses, log_sums = model(inputs, targets, doc_starts)
        loss = (losses + 1e-2 * log_sums.square()).sum()
        loss.backward()
    return {
        "loss": loss.detach(),
        **{name: parameter.grad for name, parameter in model.named_parameters()},
    }


def on_ranks(folder: Path, ranks: int) -> None:
    dist.init_process_group("gloo")
    for index in range(len(CASES)):
        found = results(index, ContextRanks(dist.group.WORLD))
        for tensor in found.values():
            dist.all_reduce(tensor)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{ranks}-{index}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    for ranks in (2, 4):
        run_ranks(ranks, [(on_ranks, (folder, ranks))])
    return folder


@pytest.mark.parametrize(
    "index",
    range(len(CASES)),
    ids=lambda i: f"{CASES[i][0].name}-{CASES[i][1]}-{CASES[i][2].value}",
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_chunks_on_ranks_equal_one_rank(folder: Path, ranks: int, index: int) -> None:
    expected, actual = (
        results(index, None),
        torch.load(folder / f"{ranks}-{index}.pt", weights_only=True),
    )
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= 2e-5 * value.norm(), name


def test_what_comes_before_matters(folder: Path) -> None:
    """The test detects a chunk that starts from a zero state: its loss differs."""
    tokens, _ = problem(None)
    model = build_model(TINY, REFERENCE, 0, torch.device("cpu"))
    halves = [
        model(tokens[:, a:b], tokens[:, a + 1 : b + 1])[0].sum() for a, b in ((0, 16), (16, 32))
    ]
    assert abs(sum(halves) - model(tokens[:, :-1], tokens[:, 1:])[0].sum()) > 1e-4
