"""Data order: bijective, seeded, apportioned, without repeats, equal for every world size."""

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
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
from data.stream.mixture import (
    PERIOD,
    Plan,
    apportion,
    feistel_network,
    permute,
    permute_one,
    splitmix64,
)
from data.tokenizer import EOS
from tests.compose import run_config
from tests.corpus import BLOCK, SOURCES, corpus_config, make_corpus


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000, 4097])
def test_permutation_is_bijective_and_keyed(size: int) -> None:
    images = permute(np.arange(size), size, "0/web/0")
    assert np.array_equal(np.sort(images), np.arange(size))
    # seeking a single index gives the same image
    assert np.array_equal(permute(np.array([size - 1]), size, "0/web/0"), images[-1:])
    if size >= 64:
        other = permute(np.arange(size), size, "0/web/1")
        assert (images == other).mean() < 0.1 and (images == np.arange(size)).mean() < 0.1
        assert abs(np.corrcoef(np.arange(size), images)[0, 1]) < 0.35


def test_permutation_seeks_in_a_corpus_of_full_size() -> None:
    size = 5_800_000_000_000 // 8192
    images = permute(np.array([0, size // 2, size - 1]), size, "key")
    assert len(set(images.tolist())) == 3 and images.min() >= 0 and images.max() < size


def unpermute(image: int, size: int, key: str) -> int:
    """Inverse of `permute_one`; its existence proves that the order visits every block once."""
    half_bits, keys = feistel_network(size, key)
    mask = (1 << half_bits) - 1
    while True:
        left, right = image >> half_bits, image & mask
        for round_key in reversed(keys):
            hashed = int(splitmix64(np.array([left], dtype=np.uint64) + np.uint64(round_key))[0])
            left, right = right ^ (hashed & mask), left
        image = (left << half_bits) | right
        if image < size:
            return image


@settings(max_examples=60)
@given(st.integers(1, 2**45), st.data())
def test_permutation_is_invertible_at_any_size(size: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    for index in indices:
        image = permute_one(index, size, "7/web/0")
        assert 0 <= image < size and unpermute(image, size, "7/web/0") == index


@settings(max_examples=20)
@given(st.integers(1, 2**45), st.integers(0, 2**32))
def test_scalar_and_array_permutation_agree(size: int, seed: int) -> None:
    indices = np.random.default_rng(seed).integers(0, size, 40)
    images = permute(indices, size, "key")
    assert images.tolist() == [permute_one(index, size, "key") for index in indices.tolist()]


def test_seeking_in_the_7b_run_needs_little_memory() -> None:
    """Seeking any of 5.8T tokens takes less than 10 MB; benchmarks/data.py measures the time."""
    config = run_config("7b").data
    tracemalloc.start()
    plan = Plan(
        config, {name: 6 * 10**12 for name in config.sources}, dict.fromkeys(config.sources, "")
    )
    for token in (0, 1_200_000_000_000, plan.tokens - 1):
        stage = plan.stage_at(token)
        _, block = plan.find_blocks(
            stage, np.array([(token - stage.first_token) // plan.block_tokens])
        )
        assert 0 <= block[0] < 6 * 10**12 // 8192
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    "shares", [[1], [50, 40, 10], [0.1, 99.9], [1, 1, 1], [90, 4, 3, 2.5, 0.5]]
)
def test_apportionment_keeps_every_prefix_in_proportion(shares: list[float]) -> None:
    slot_source, slot_offset = apportion(shares)
    exact = np.array(shares) / sum(shares)
    for index, share in enumerate(exact):
        assigned = np.cumsum(slot_source == index)
        assert np.abs(assigned - share * np.arange(1, PERIOD + 1)).max() < 1.5
        assert np.array_equal(slot_offset[slot_source == index], np.arange(assigned[-1]))


def make_plan(config: DataConfig, blocks: int = 60) -> Plan:
    tokens = {name: blocks * BLOCK + 1 for name in config.sources}
    return Plan(config, tokens, {name: name for name in config.sources})


def all_blocks(plan: Plan) -> list[tuple[int, int]]:
    read = []
    for stage in plan.stages:
        source, block = plan.find_blocks(stage, np.arange(stage.tokens // BLOCK))
        read += list(zip(source.tolist(), block.tolist(), strict=True))
    return read


def test_no_block_is_read_twice_within_an_epoch(tmp_path: Path) -> None:
    plan = make_plan(corpus_config(tmp_path))
    read = all_blocks(plan)
    assert len(read) == plan.tokens // BLOCK == 52
    assert len(set(read)) == len(read)  # cursors carry over from stage to stage
    blocks_read = np.bincount([source for source, _ in read], minlength=2)
    assert dict(zip(SOURCES, blocks_read.tolist(), strict=True)) == plan.blocks_read
    assert abs(blocks_read[0] - (15 + 10 + 3)) <= 2  # 3/4 of 20, 1/2 of 20, 1/4 of 12


def test_a_second_epoch_has_another_order(tmp_path: Path) -> None:
    plan = make_plan(corpus_config(tmp_path), blocks=14)
    order = [block for source, block in all_blocks(plan) if source == 0]
    first, second = order[:14], order[14:28]
    assert sorted(first) == list(range(14)) == sorted(second) and first != second


def test_plan_hash_covers_source_order_and_state_resets(tmp_path: Path) -> None:
    swapped = corpus_config(tmp_path)
    swapped.sources = dict(reversed(swapped.sources.items()))
    resets = corpus_config(tmp_path)
    resets.reset_state = not resets.reset_state
    plans = [make_plan(config) for config in (corpus_config(tmp_path), swapped, resets)]
    assert len({plan.hash_at(BLOCK) for plan in plans}) == 3
    assert len({plan.old_hash for plan in plans}) == 3


def test_a_hash_covers_what_has_been_read_and_no_more(tmp_path: Path) -> None:
    """The future may change: longer, other or more stages, and sources that only they read."""
    plan = make_plan(corpus_config(tmp_path))
    other = corpus_config(tmp_path)
    other.stages[1] = replace(other.stages[1], name="stable", tokens=30 * BLOCK)
    other.stages[2] = replace(other.stages[2], seq_len=16, mixture={"more": 1})
    other.sources = {"more": other.sources["sums"], **other.sources}
    other.stages[0] = replace(other.stages[0], mixture={"sums": 10, "prose": 30})  # the same shares
    sizes = {name: 60 * BLOCK + 6 for name in other.sources}
    changed = Plan(other, sizes, {name: name for name in sizes})
    first = all_blocks(plan)[:40]
    named = [(plan.sources[source], block) for source, block in first]
    assert named == [(changed.sources[s], block) for s, block in all_blocks(changed)[:40]]
    for blocks in (0, 1, 20, 21, 40):
        assert plan.hash_at(blocks * BLOCK) == changed.hash_at(blocks * BLOCK)
    assert plan.hash_at(41 * BLOCK) != changed.hash_at(41 * BLOCK)
    hashes = [plan.hash_at(blocks * BLOCK) for blocks in range(53)]
    assert len(set(hashes)) == 53 and plan.old_hash != changed.old_hash


@pytest.mark.parametrize("change", ["mixture", "seq_len", "shorter", "shards", "size", "seed"])
def test_a_changed_past_changes_the_hash(tmp_path: Path, change: str) -> None:
    config = corpus_config(tmp_path)
    tokens = dict.fromkeys(SOURCES, 60 * BLOCK + 6)
    fingerprints = {name: name for name in SOURCES}
    before = Plan(config, tokens, fingerprints).hash_at(40 * BLOCK)
    if change == "mixture":
        config.stages[0].mixture = {"prose": 3, "sums": 1.1}
    elif change == "seq_len":
        config.stages[0].seq_len = 32
    elif change == "shorter":
        config.stages[0].tokens -= BLOCK
    elif change == "shards":
        fingerprints["sums"] = "others"
    elif change == "size":
        tokens["prose"] += BLOCK
    else:
        config.seed += 1
    assert Plan(config, tokens, fingerprints).hash_at(40 * BLOCK) != before


def test_a_share_below_the_resolution_is_refused() -> None:
    with pytest.raises(InputError, match="below 0.01%"):
        apportion([1.0, 1e-5])


def test_seed_changes_the_order_and_the_hash(tmp_path: Path) -> None:
    config = corpus_config(tmp_path)
    before = make_plan(config)
    config.seed = 6
    after = make_plan(config)
    assert all_blocks(before) != all_blocks(after) and before.hash_at(BLOCK) != after.hash_at(BLOCK)
    assert make_plan(config).hash_at(BLOCK) == after.hash_at(BLOCK)


def test_too_many_epochs_are_refused_before_training(tmp_path: Path) -> None:
    config = corpus_config(tmp_path)
    config.sources["sums"].max_epochs = 1.0
    with pytest.raises(InputError, match=r"read 1,\d+ tokens of sums, which has 640 .*max_epochs"):
        make_plan(config, blocks=10)


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    config = make_corpus(tmp_path_factory.mktemp("corpus"))
    manifests = open_manifests(config)
    return Loader(compile_plan(config, manifests), manifests)


def test_every_world_size_reads_the_same_samples(loader: Loader) -> None:
    """The global batch at any position, on ranks with no, one or many sequences."""
    stage = loader.plan.stages[1]
    for token, sequences in ((0, 5), (stage.first_token, 3), (stage.first_token + 64, 7)):
        expected = next(loader.micro_batches(token, sequences, 0, 1, 1000))[0]
        for ranks in (2, 3, 4, 8, 256):
            for micro_batch in (1, 2):
                batches = [
                    list(loader.micro_batches(token, sequences, rank, ranks, micro_batch))
                    for rank in range(ranks)
                ]
                assert all(batches)  # a rank without data gets a padding sequence
                real = [batch for rank in batches for batch, is_padding in rank if not is_padding]
                assert torch.equal(torch.cat([batch.tokens for batch in real]), expected.tokens)
                assert torch.equal(torch.cat([batch.source for batch in real]), expected.source)


def test_reading_in_threads_gives_the_same_tokens(loader: Loader) -> None:
    stage = loader.plan.stages[0]
    requests = [np.arange(i, i + 3) for i in range(40)]
    expected = [loader.read(stage, indices).tokens for indices in requests]
    with ThreadPoolExecutor(8) as pool:
        tokens = list(pool.map(lambda indices: loader.read(stage, indices).tokens, requests))
    assert all(torch.equal(one, other) for one, other in zip(expected, tokens, strict=True))


def test_longer_contexts_read_the_same_blocks(loader: Loader) -> None:
    """A longer context keeps the order of blocks and their tokens."""
    stage_16 = loader.plan.stages[0]
    assert stage_16.seq_len == 16
    stage_32 = replace(stage_16, seq_len=32)
    tokens_16 = loader.read(stage_16, np.arange(8)).tokens
    tokens_32 = loader.read(stage_32, np.arange(4)).tokens
    assert torch.equal(tokens_16.reshape(-1), tokens_32.reshape(-1))


def test_targets_are_the_next_tokens(loader: Loader) -> None:
    stage = loader.plan.stages[2]
    batch = loader.read(stage, np.arange(3))
    assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])
    source, block = loader.plan.find_blocks(stage, np.arange(1))
    lookahead = loader.shards[source[0]].read(int(block[0]) * BLOCK + stage.seq_len, 1)
    assert batch.targets[0, -1] == lookahead[0]


def test_find_doc_starts() -> None:
    tokens = torch.tensor([[EOS, 5, EOS, EOS, 7], [3, 4, 5, 6, EOS]])
    assert find_doc_starts(tokens, EOS).tolist() == [[False, True, False, True, True], [False] * 5]
