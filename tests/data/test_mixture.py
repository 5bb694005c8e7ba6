"""The data order: bijective, seeded, apportioned, without repeats, and the same for every world
size.
"""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InputError
from data.config import DataConfig
from data.stream.loader import Loader, compile_plan, find_doc_starts
from data.stream.manifests import open_manifests
from data.stream.mixture import PERIOD, Plan, deal, mix, network, permute, permute_one
from data.tokenizer import EOS
from tests.compose import run_config
from tests.corpus import BLOCK, SOURCES, corpus_config, make_corpus


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_permutation_is_bijective_and_keyed(size: int) -> None:
    images = permute(np.arange(size), size, "0/web/0")
    assert np.array_equal(np.sort(images), np.arange(size))
    # seeking gives the same
    assert np.array_equal(permute(np.array([size - 1]), size, "0/web/0"), images[-1:])
    if size >= 64:
        other = permute(np.arange(size), size, "0/web/1")
        assert (images == other).mean() < 0.1 and (images == np.arange(size)).mean() < 0.1
        assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.35


def test_permutation_seeks_in_a_corpus_of_the_real_size() -> None:
    size = 5_800_000_000_000 // 8192
    images = permute(np.array([0, size // 2, size - 1]), size, "key")
    assert len(set(images.tolist())) == 3 and images.min() >= 0 and images.max() < size


def unpermute(image: int, size: int, key: str) -> int:
    """The network backwards: that it exists is what makes the order visit every block exactly
    once.
    """
    half, keys = network(size, key)
    mask = (1 << half) - 1
    while True:
        left, right = image >> half, image & mask
        for round_key in reversed(keys):
            scrambled = int(mix(np.array([left], dtype=np.uint64) + np.uint64(round_key))[0])
            left, right = right ^ (scrambled & mask), left
        image = (left << half) | right
        if image < size:
            return image


@settings(max_examples=60)
@given(st.integers(1, 2**45), st.data())
def test_every_block_is_visited_once_at_any_size(size: int, data: st.DataObject) -> None:
    """By way back: an order in which every place has one block, and every block one place."""
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    for index in indices:
        image = permute_one(index, size, "7/web/0")
        assert 0 <= image < size and unpermute(image, size, "7/web/0") == index


@settings(max_examples=20)
@given(st.integers(1, 2**45), st.integers(0, 2**32))
def test_one_and_many_are_permuted_alike(size: int, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, size, 40)
    images = permute(indices, size, "key")
    assert images.tolist() == [permute_one(index, size, "key") for index in indices.tolist()]


def test_a_position_of_the_large_run_costs_no_memory() -> None:
    """Any token of 5.8T is found from numbers alone: 10 MB and a millisecond are the bars; time is
    in the benchmark.
    """
    config = run_config("7b").data
    tracemalloc.start()
    plan = Plan(
        config, {name: 6 * 10**12 for name in config.sources}, dict.fromkeys(config.sources, "")
    )
    for token in (0, 1_200_000_000_000, plan.tokens - 1):
        stage = plan.stage_at(token)
        _, block = plan.blocks_of(
            stage, np.array([(token - stage.first_token) // plan.block_tokens])
        )
        assert 0 <= block[0] < 6 * 10**12 // 8192
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "shares", [[1], [50, 40, 10], [0.1, 99.9], [1, 1, 1], [90, 4, 3, 2.5, 0.5]]
)
def test_dealing_keeps_every_prefix_in_proportion(shares: list[float]) -> None:
    owner, turn = deal(shares)
    exact = np.array(shares) / sum(shares)
    for index, share in enumerate(exact):
        had = np.cumsum(owner == index)
        assert np.abs(had - share * np.arange(1, PERIOD + 1)).max() < 1.5
        assert np.array_equal(turn[owner == index], np.arange(had[-1]))


def plan_of(config: DataConfig, blocks: int = 60) -> Plan:
    tokens = {name: blocks * BLOCK + 1 for name in config.sources}
    return Plan(config, tokens, {name: name for name in config.sources})


def all_blocks(plan: Plan) -> list[tuple[int, int]]:
    read = []
    for stage in plan.stages:
        source, block = plan.blocks_of(stage, np.arange(stage.tokens // BLOCK))
        read += list(zip(source.tolist(), block.tolist(), strict=True))
    return read


def test_no_block_is_read_twice_within_an_epoch(tmp_path: Path) -> None:
    plan = plan_of(corpus_config(tmp_path))
    read = all_blocks(plan)
    assert len(read) == plan.tokens // BLOCK == 52
    assert len(set(read)) == len(read)  # cursors carry over from stage to stage
    realised = np.bincount([source for source, _ in read], minlength=2)
    assert dict(zip(SOURCES, realised.tolist(), strict=True)) == plan.read
    assert abs(realised[0] - (15 + 10 + 3)) <= 2  # 3/4 of 20, 1/2 of 20, 1/4 of 12


def test_a_second_epoch_has_another_order(tmp_path: Path) -> None:
    plan = plan_of(corpus_config(tmp_path), blocks=14)
    order = [block for source, block in all_blocks(plan) if source == 0]
    first, second = order[:14], order[14:28]
    assert sorted(first) == list(range(14)) == sorted(second) and first != second


def test_the_hash_knows_what_decides_the_stream(tmp_path: Path) -> None:
    before = plan_of(corpus_config(tmp_path)).hash
    swapped = corpus_config(tmp_path)
    swapped.sources = dict(reversed(swapped.sources.items()))
    resets = corpus_config(tmp_path)
    resets.reset_state = not resets.reset_state
    assert len({before, plan_of(swapped).hash, plan_of(resets).hash}) == 3


def test_a_share_too_small_to_deal_is_refused() -> None:
    with pytest.raises(InputError, match="below 0.01%"):
        deal([1.0, 1e-5])


def test_seed_changes_the_order_and_the_hash(tmp_path: Path) -> None:
    config = corpus_config(tmp_path)
    before = plan_of(config)
    config.seed = 6
    after = plan_of(config)
    assert all_blocks(before) != all_blocks(after) and before.hash != after.hash
    assert plan_of(config).hash == after.hash


def test_too_many_epochs_are_refused_before_training(tmp_path: Path) -> None:
    config = corpus_config(tmp_path)
    config.sources["sums"].max_epochs = 1.0
    with pytest.raises(InputError, match=r"read 1,\d+ tokens of sums, which has 640 .*max_epochs"):
        plan_of(config, blocks=10)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    config = make_corpus(tmp_path_factory.mktemp("corpus"))
    manifests = open_manifests(config)
    return Loader(compile_plan(config, manifests), manifests)


def test_every_world_size_reads_the_same_samples(loader: Loader) -> None:
    """The global batch at any position, over ranks that may hold none, one or many sequences."""
    stage = loader.plan.stages[1]
    for token, sequences in ((0, 5), (stage.first_token, 3), (stage.first_token + 64, 7)):
        expected = next(loader.micro_batches(token, sequences, 0, 1, 1000))[0]
        for ranks in (2, 3, 4, 8, 256):
            for micro_batch in (1, 2):
                batches = [
                    list(loader.micro_batches(token, sequences, rank, ranks, micro_batch))
                    for rank in range(ranks)
                ]
                assert all(batches)  # a rank without a sequence takes part all the same
                counted = [
                    batch for rank in batches for batch, is_padding in rank if not is_padding
                ]
                assert torch.equal(torch.cat([batch.tokens for batch in counted]), expected.tokens)
                assert torch.equal(torch.cat([batch.source for batch in counted]), expected.source)


def test_reading_ahead_in_threads_changes_nothing(loader: Loader) -> None:
    stage = loader.plan.stages[0]
    numbers = [np.arange(i, i + 3) for i in range(40)]
    alone = [loader.read(stage, each).tokens for each in numbers]
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda each: loader.read(stage, each).tokens, numbers))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_longer_contexts_read_the_same_blocks(loader: Loader) -> None:
    """Context growth cuts blocks otherwise and changes neither their order nor their tokens."""
    short, long = loader.plan.stages[0], loader.plan.stages[1]
    number = np.arange(8)
    as_16 = loader.read(short, number).tokens.reshape(-1)
    object.__setattr__(short, "seq_len", 32)
    as_32 = loader.read(short, number[:4]).tokens.reshape(-1)
    object.__setattr__(short, "seq_len", 16)
    assert torch.equal(as_16, as_32)
    assert long.seq_len == 32


def test_targets_are_the_next_tokens(loader: Loader) -> None:
    batch = loader.read(loader.plan.stages[2], np.arange(3))
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    source, block = loader.plan.blocks_of(loader.plan.stages[2], np.arange(1))
    # the lookahead of the first cut
    after = loader.shards[source[0]].read(int(block[0]) * BLOCK + 32, 1)
    assert batch.targets[0, -1] == after[0]


def test_document_starts() -> None:
    tokens = torch.tensor([[EOS, 5, EOS, EOS, 7], [3, 4, 5, 6, EOS]])
    assert find_doc_starts(tokens).tolist() == [[False, True, False, True, True], [False] * 5]
