"""Which block comes n-th: a pure, seeded function of the data config and the sizes of the sources.

A block is `block_tokens` consecutive tokens of a source, read with one token of lookahead. Inside a
source, blocks come in the order of a keyed permutation, a new key per epoch. Over sources, a
stage's mixture is dealt by low-discrepancy apportionment: after any n blocks a source has had its
share of n, rounded to 1/10,000, to within about one block. Everything is computed from indices: no
shuffled index exists, seeking costs O(1), memory grows with stages x sources only. A source's
cursor carries over from stage to stage, so nothing is read twice before everything was read once.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from core.errors import InputError
from data.config import DataConfig

PERIOD = 10_000  # shares are rounded to 1 / PERIOD, and the dealing repeats after PERIOD blocks
# of the Feistel network; 4 make a pseudorandom permutation (Luby and Rackoff 1988), 2 more for tiny
# domains
ROUNDS = 6
FEW = 12  # indices; up to here the scalar network is the faster one
WORD = 2**64 - 1
Indices = NDArray[np.int64]


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser (Steele et al. 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(indices: Indices, size: int, key: str) -> Indices:
    """Images of `indices`, each in [0, size), under the permutation of [0, size) that `key` names.

    A Feistel network over the next even number of bits; an image outside the range is permuted
    again (cycle walking), which keeps the map bijective and takes less than four passes on average.
    """
    if len(indices) <= FEW:
        return np.array(
            [permute_one(index, size, key) for index in indices.tolist()], dtype=np.int64
        )
    half, round_keys = network(size, key)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    keys = np.array(round_keys, dtype=np.uint64)
    out = indices.astype(np.uint64)
    todo = np.ones(len(out), dtype=bool)
    while todo.any():
        x = out[todo]
        left, right = x >> shift, x & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        out[todo] = (left << shift) | right
        todo = out >= np.uint64(size)
    return out.astype(np.int64)


@lru_cache(maxsize=1024)
def network(size: int, key: str) -> tuple[int, tuple[int, ...]]:
    """Bits of half a block, and the keys of the rounds."""
    digest = hashlib.sha256(key.encode()).digest() + hashlib.sha256(b"2" + key.encode()).digest()
    keys = tuple(int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(ROUNDS))
    return max(1, ((size - 1).bit_length() + 1) // 2), keys


@lru_cache(maxsize=4096)  # the cuts of a block follow each other
def permute_one(index: int, size: int, key: str) -> int:
    """permute for one index, in Python integers, which are faster than arrays of a few elements."""
    half, keys = network(size, key)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            x = (right + round_key) & WORD
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
            left, right = right, left ^ ((x ^ (x >> 31)) & mask)
        index = (left << half) | right
        if index < size:
            return index


def deal(shares: list[float]) -> tuple[NDArray[np.int16], Indices]:
    """One period of the dealing for positive shares: owner [PERIOD], and turn [PERIOD] counting
    each owner's blocks.

    Shares become integers that sum to PERIOD by largest remainder; at each turn the source that
    lags its share most is dealt (the earliest on a tie), which keeps every source within one block
    of its share at every prefix.
    """
    exact = np.array(shares) / sum(shares) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    for index in np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]:
        counts[index] += 1
    if counts.min() == 0:
        raise InputError(
            f"a mixture holds a share below {1 / PERIOD:.2%}: raise it, or leave its source out"
        )
    owner, turn = [], []
    whole = counts.tolist()
    dealt = [0] * len(whole)
    deadlines = [1 / count for count in whole]  # of each source's next block, in periods
    for n in range(PERIOD):
        # among the sources that may be ahead of nobody's deadline, the one whose next deadline
        # comes first
        index, first = -1, math.inf
        for source, deadline in enumerate(deadlines):
            if (
                deadline < first
                and dealt[source] * PERIOD <= n * whole[source]
                and dealt[source] < whole[source]
            ):
                index, first = source, deadline
        owner.append(index)
        turn.append(dealt[index])
        dealt[index] += 1
        deadlines[index] = (dealt[index] + 1) / whole[index]
    return np.array(owner, dtype=np.int16), np.array(turn, dtype=np.int64)


@dataclass(frozen=True)
class PlannedStage:
    """A stage in whole blocks, the order of its sources, and their cursors where it starts."""

    name: str
    seq_len: int
    first_token: int  # of the run
    tokens: int
    owner: NDArray[np.int16]
    turn: Indices
    per_period: Indices  # blocks of each source in one period
    cursor: Indices  # blocks of each source that earlier stages have read

    def counts(self, blocks: int) -> Indices:
        """Blocks of each source among the first `blocks` of this stage."""
        periods, rest = divmod(blocks, PERIOD)
        tail = np.bincount(self.owner[:rest], minlength=len(self.per_period))
        return periods * self.per_period + tail


class Plan:
    """The compiled order of a run's blocks.

    Raises InputError when a stage would read a source more often than its max_epochs allows.
    """

    def __init__(
        self, config: DataConfig, tokens: dict[str, int], fingerprints: dict[str, str]
    ) -> None:
        """`tokens`: train tokens of every source. `fingerprints`: identities in the manifests."""
        self.config = config
        self.seed = config.seed
        self.sources = list(config.sources)
        self.block_tokens = config.block_tokens
        # one token of lookahead: the last target of the last block must exist
        self.blocks = {
            name: max(0, tokens[name] - 1) // config.block_tokens for name in self.sources
        }
        self.stages: list[PlannedStage] = []
        cursor = np.zeros(len(self.sources), dtype=np.int64)
        first = 0
        for stage in config.stages:
            named = [name for name in self.sources if stage.mixture.get(name, 0.0) > 0]
            owner, turn = deal([stage.mixture[name] for name in named])
            owner = np.array([self.sources.index(name) for name in named], dtype=np.int16)[owner]
            length = config.tokens_of(stage) // config.block_tokens
            per_period = np.bincount(owner, minlength=len(self.sources))
            planned = PlannedStage(
                stage.name,
                stage.seq_len,
                first,
                length * config.block_tokens,
                owner,
                turn,
                per_period,
                cursor,
            )
            self.stages.append(planned)
            cursor = cursor + planned.counts(length)
            first += planned.tokens
        self.tokens = first
        self.read = dict(zip(self.sources, (int(blocks) for blocks in cursor), strict=True))
        self._check_epochs()
        self.hash = self._hash(fingerprints)

    def epochs(self) -> dict[str, float]:
        """How often the run reads each source."""
        return {name: self.read[name] / max(1, self.blocks[name]) for name in self.sources}

    def _check_epochs(self) -> None:
        for name, epochs in self.epochs().items():
            limit = self.config.sources[name].max_epochs
            if self.read[name] and (epochs > limit or not self.blocks[name]):
                have = self.blocks[name] * self.block_tokens
                want = self.read[name] * self.block_tokens
                raise InputError(
                    f"the stages read {want:,} tokens of {name}, which has {have:,} "
                    f"({epochs:.2f} epochs); lower its share, prepare more of it, or raise "
                    f"data.sources.{name}.max_epochs above {limit:g}"
                )

    def _hash(self, fingerprints: dict[str, str]) -> str:
        """SHA-256 of all that decides the order of tokens; a resumed run must have the same."""
        facts = {
            "seed": self.seed,
            "block_tokens": self.block_tokens,
            "reset_state": self.config.reset_state,
            "sources": [
                [name, self.blocks[name], fingerprints[name]] for name in self.sources
            ],  # their order decides
            "stages": [
                [s.name, s.seq_len, s.tokens, config.mixture]
                for s, config in zip(self.stages, self.config.stages, strict=True)
            ],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def stage_at(self, token: int) -> PlannedStage:
        """The stage that contains token number `token` of the run; past the end, the last one."""
        for stage in self.stages:
            if token < stage.first_token + stage.tokens:
                return stage
        return self.stages[-1]

    def blocks_of(self, stage: PlannedStage, numbers: Indices) -> tuple[Indices, Indices]:
        """Source index and block index inside the source, per block number; all arrays [count]."""
        place = numbers % PERIOD
        source = stage.owner[place].astype(np.int64)
        nth = (
            stage.cursor[source] + numbers // PERIOD * stage.per_period[source] + stage.turn[place]
        )
        if len(numbers) <= FEW:
            pairs = zip(source.tolist(), nth.tolist(), strict=True)
            return source, np.array([self.block_at(*pair) for pair in pairs], dtype=np.int64)
        block = np.empty_like(nth)
        for index in np.unique(source):
            name, size = self.sources[index], self.blocks[self.sources[index]]
            epoch = nth // size
            for number in np.unique(epoch[source == index]):
                rows = (source == index) & (epoch == number)
                block[rows] = permute(nth[rows] % size, size, f"{self.seed}/{name}/{number}")
        return source, block

    def block_at(self, source: int, nth: int) -> int:
        """The block of a source that is read as its nth."""
        name = self.sources[source]
        epoch, place = divmod(nth, self.blocks[name])
        return permute_one(place, self.blocks[name], f"{self.seed}/{name}/{epoch}")
