"""Data order: which block of which source comes n-th, a pure function of config and source sizes.

A block is `block_tokens` consecutive tokens of a source, read with one token of lookahead. Inside a
source, blocks come in the order of a keyed permutation with a new key per epoch. Over sources, a
stage's mixture is apportioned with low discrepancy: among any first n blocks a source has its
share of n, rounded to 1/10,000, to within about one block. The order is computed from indices: no
shuffled index exists, seeking costs O(1), and memory grows with stages x sources only. A source's
cursor carries over from stage to stage, so no block is read twice before every block was read once.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from data.config import DataConfig, Stage

PERIOD = 10_000  # blocks after which a mixture repeats; shares are rounded to 1 / PERIOD
# Of the Feistel network: 4 make a pseudorandom permutation (Luby and Rackoff 1988), 2 more are for
# tiny domains.
ROUNDS = 6
MAX_SCALAR_INDICES = 12  # up to this many indices the scalar permutation is faster
UINT64_MAX = 2**64 - 1
Indices = NDArray[np.int64]


def sha256_json(value: Any) -> str:
    """SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def splitmix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash integers with splitmix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: Indices, size: int, key: str) -> Indices:
    """Apply the permutation of [0, size) with this key to `indices`, each in [0, size).

    A Feistel network over the next even number of bits. An image outside the range is permuted
    again (cycle walking), which keeps the map bijective and takes less than four passes on average.
    """
    if len(indices) <= MAX_SCALAR_INDICES:
        return np.array(
            [permute_one(index, size, key) for index in indices.tolist()], dtype=np.int64
        )
    half_bits, round_keys = feistel_network(size, key)
    mask = np.uint64((1 << half_bits) - 1)
    shift = np.uint64(half_bits)
    keys = np.array(round_keys, dtype=np.uint64)
    out = indices.astype(np.uint64)
    pending = np.ones(len(out), dtype=bool)
    while pending.any():
        x = out[pending]
        left, right = x >> shift, x & mask
        for round_key in keys:
            left, right = right, left ^ (splitmix64(right + round_key) & mask)
        out[pending] = (left << shift) | right
        pending = out >= np.uint64(size)
    return out.astype(np.int64)


@lru_cache(maxsize=1024)
def feistel_network(size: int, key: str) -> tuple[int, tuple[int, ...]]:
    """Return the bits of half an index and the round keys."""
    digest = hashlib.sha256(key.encode()).digest() + hashlib.sha256(b"2" + key.encode()).digest()
    keys = tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))
    return max(1, ((size - 1).bit_length() + 1) // 2), keys


@lru_cache(maxsize=4096)  # the sequences of a block come one after another
def permute_one(index: int, size: int, key: str) -> int:
    """`permute` for one index, in Python integers, which are faster than arrays of few elements."""
    half_bits, keys = feistel_network(size, key)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for round_key in keys:
            x = (right + round_key) & UINT64_MAX
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & UINT64_MAX
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & UINT64_MAX
            left, right = right, left ^ ((x ^ (x >> 31)) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


def apportion(shares: list[float]) -> tuple[NDArray[np.int16], Indices]:
    """Assign the PERIOD slots of a period to sources in proportion to positive shares.

    Returns slot_source [PERIOD], the source of each slot, and slot_offset [PERIOD], the number of
    earlier slots of the same source.

    Shares become integers that sum to PERIOD by largest remainder. Slots are assigned by earliest
    deadline first (the lower index on a tie) to sources that are not ahead of their share, which
    keeps every source within about one block of its share at every prefix.
    """
    exact = np.array(shares) / sum(shares) * PERIOD
    rounded = np.floor(exact).astype(np.int64)
    for index in np.argsort(rounded - exact, kind="stable")[: PERIOD - rounded.sum()]:
        rounded[index] += 1
    if rounded.min() == 0:
        raise InputError(
            f"a mixture has a share below {1 / PERIOD:.2%}: raise it or remove the source"
        )
    slot_source = []
    slot_offset = []
    quotas = rounded.tolist()
    assigned = [0] * len(quotas)
    deadlines = [1 / quota for quota in quotas]  # of each source's next block, in periods
    for slot in range(PERIOD):
        chosen = -1
        earliest = math.inf
        for source, deadline in enumerate(deadlines):
            if (
                deadline < earliest
                and assigned[source] * PERIOD <= slot * quotas[source]
                and assigned[source] < quotas[source]
            ):
                chosen = source
                earliest = deadline
        slot_source.append(chosen)
        slot_offset.append(assigned[chosen])
        assigned[chosen] += 1
        deadlines[chosen] = (assigned[chosen] + 1) / quotas[chosen]
    return np.array(slot_source, dtype=np.int16), np.array(slot_offset, dtype=np.int64)


@dataclass(frozen=True)
class PlannedStage:
    """A stage in whole blocks, with its order of sources and their cursors at its start."""

    name: str
    seq_len: int
    first_token: int  # position in the run
    tokens: int
    slot_source: NDArray[np.int16]  # [PERIOD] index into Plan.sources
    slot_offset: Indices  # [PERIOD] earlier slots of the same source
    blocks_per_period: Indices  # [sources]
    cursor: Indices  # [sources] blocks that earlier stages have read

    def source_blocks(self, num_blocks: int) -> Indices:
        """Blocks of each source among the first `num_blocks` of this stage [sources]."""
        periods, rest = divmod(num_blocks, PERIOD)
        tail = np.bincount(self.slot_source[:rest], minlength=len(self.blocks_per_period))
        return periods * self.blocks_per_period + tail


def check_expected_plan(config: DataConfig) -> None:
    """Raise InputError if a plan does not fit the sources' expected_tokens; 0 counts as enough."""
    enough = 2 * sum(stage.tokens for stage in config.stages)
    tokens = {name: source.expected_tokens or enough for name, source in config.sources.items()}
    Plan(config, tokens, dict.fromkeys(tokens, "expected"))


class Plan:
    """The compiled order of a run's blocks.

    Raises InputError if the stages read a source more often than its max_epochs.
    """

    def __init__(
        self, config: DataConfig, tokens: dict[str, int], fingerprints: dict[str, str]
    ) -> None:
        """`tokens`: train tokens by source. `fingerprints`: hashes of the shards by source."""
        self.config = config
        self.seed = config.seed
        self.sources = list(config.sources)
        self.block_tokens = config.block_tokens
        # one token of lookahead: the last target of the last block must exist
        self.num_blocks = {
            name: max(0, tokens[name] - 1) // config.block_tokens for name in self.sources
        }
        self.stages: list[PlannedStage] = []
        cursor = np.zeros(len(self.sources), dtype=np.int64)
        first_token = 0
        for stage in config.stages:
            planned = self._plan_stage(stage, first_token, cursor)
            self.stages.append(planned)
            cursor = cursor + planned.source_blocks(planned.tokens // config.block_tokens)
            first_token += planned.tokens
        self.tokens = first_token
        self.blocks_read = dict(zip(self.sources, map(int, cursor), strict=True))
        self._check_epochs()
        self.shard_hashes = {name: sha256_json(fingerprints[name]) for name in self.sources}
        self.old_hash = self._hash_of_version_1(fingerprints)

    def _plan_stage(self, stage: Stage, first_token: int, cursor: Indices) -> PlannedStage:
        names = [name for name in self.sources if stage.mixture.get(name, 0.0) > 0]
        indices = np.array([self.sources.index(name) for name in names], dtype=np.int16)
        slot_source, slot_offset = apportion([stage.mixture[name] for name in names])
        slot_source = indices[slot_source]
        return PlannedStage(
            name=stage.name,
            seq_len=stage.seq_len,
            first_token=first_token,
            tokens=self.config.tokens_of(stage) // self.block_tokens * self.block_tokens,
            slot_source=slot_source,
            slot_offset=slot_offset,
            blocks_per_period=np.bincount(slot_source, minlength=len(self.sources)),
            cursor=cursor,
        )

    def epochs(self) -> dict[str, float]:
        """How often the run reads each source."""
        return {
            name: self.blocks_read[name] / max(1, self.num_blocks[name]) for name in self.sources
        }

    def _check_epochs(self) -> None:
        for name, epochs in self.epochs().items():
            limit = self.config.sources[name].max_epochs
            if self.blocks_read[name] and (epochs > limit or not self.num_blocks[name]):
                available = self.num_blocks[name] * self.block_tokens
                needed = self.blocks_read[name] * self.block_tokens
                raise InputError(
                    f"the stages read {needed:,} tokens of {name}, which has {available:,} "
                    f"({epochs:.2f} epochs): lower its share or data.stages.N.tokens, prepare more "
                    f"of it, or raise data.sources.{name}.max_epochs above {limit:g}"
                )

    def hash_at(self, tokens: int) -> str:
        """SHA-256 of all that decides the order of the first `tokens` tokens of the run.

        A chain over the stages up to there: later stages, and sources that only they read, may
        change. A resumed run must have the hash of its checkpoint.
        """
        chain = sha256_json([self.seed, self.block_tokens, self.config.reset_state])
        for stage in self.stages:
            read = min(tokens - stage.first_token, stage.tokens)
            if read > 0:
                sources = [
                    [name, self.num_blocks[name], self.shard_hashes[name], quota]
                    for name, quota in zip(
                        self.sources, stage.blocks_per_period.tolist(), strict=True
                    )
                    if quota
                ]
                chain = sha256_json([chain, stage.seq_len, read, sources])
        return chain

    def _hash_of_version_1(self, fingerprints: dict[str, str]) -> str:
        """SHA-256 of the whole plan, as checkpoints before version 0.3 have it."""
        facts = {
            "seed": self.seed,
            "block_tokens": self.block_tokens,
            "reset_state": self.config.reset_state,
            # a list, since the order of the sources matters
            "sources": [[name, self.num_blocks[name], fingerprints[name]] for name in self.sources],
            "stages": [
                [planned.name, planned.seq_len, planned.tokens, stage.mixture]
                for planned, stage in zip(self.stages, self.config.stages, strict=True)
            ],
        }
        return sha256_json(facts)

    def stage_at(self, token: int) -> PlannedStage:
        """Return the stage at position `token` of the run; past the end, the last stage."""
        for stage in self.stages:
            if token < stage.first_token + stage.tokens:
                return stage
        return self.stages[-1]

    def find_blocks(self, stage: PlannedStage, indices: Indices) -> tuple[Indices, Indices]:
        """Map block indices of a stage to (source index, block index in the source), all [n]."""
        slot = indices % PERIOD
        source = stage.slot_source[slot].astype(np.int64)
        nth = (
            stage.cursor[source]
            + indices // PERIOD * stage.blocks_per_period[source]
            + stage.slot_offset[slot]
        )
        if len(indices) <= MAX_SCALAR_INDICES:
            pairs = zip(source.tolist(), nth.tolist(), strict=True)
            return source, np.array([self.find_block(*pair) for pair in pairs], dtype=np.int64)
        block = np.empty_like(nth)
        for index in np.unique(source):
            name = self.sources[index]
            size = self.num_blocks[name]
            epochs = nth // size
            for epoch in np.unique(epochs[source == index]):
                selected = (source == index) & (epochs == epoch)
                block[selected] = permute(nth[selected] % size, size, f"{self.seed}/{name}/{epoch}")
        return source, block

    def find_block(self, source: int, nth: int) -> int:
        """Return the block of a source that is read as its nth."""
        name = self.sources[source]
        epoch, index = divmod(nth, self.num_blocks[name])
        return permute_one(index, self.num_blocks[name], f"{self.seed}/{name}/{epoch}")
