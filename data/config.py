"""Types and checks of a data set: sources, stages, tokenizer. Values are in configs/data."""

import re
from dataclasses import dataclass, field
from enum import Enum


@dataclass
class Source:
    """One kind of text and the recipe that cleans it."""

    recipe: str  # module of data/recipes
    input: str  # folder or URL of the raw documents
    licence: str
    max_epochs: float  # the mixture refuses to read the source more often than this
    # datatrove tasks; at most the number of input files does work; pinned by the first launch
    tasks: int
    text_key: str = "text"  # column or key of the text in jsonl and parquet
    # MinHash as "<buckets>x<hashes per bucket>": 14x8, 93x15; None keeps them
    near_duplicates: str | None = None
    # runs of this many tokens (words and marks) are kept once; 0 keeps all
    exact_substrings: int = 0
    replace_pii: bool = False  # e-mail and public IP addresses become placeholders
    decontaminate: bool = False  # documents that share 13 words with assets.evaluations are dropped
    expected_tokens: int = 0  # plans a run before the source is prepared
    # command or address that brings the input; said where it is missing
    obtained_by: str | None = None
    # extracting text from a smaller share of the pages is an error, not a filter
    min_yield: float = 0.5

    def __post_init__(self) -> None:
        if self.near_duplicates is not None and not re.fullmatch(
            r"[1-9]\d{0,2}x[1-9]\d{0,2}", self.near_duplicates
        ):
            raise ValueError(
                f"near_duplicates is {self.near_duplicates}: give buckets x hashes per bucket, "
                "as 14x8, or null"
            )
        if self.exact_substrings and self.exact_substrings < 8:
            raise ValueError(
                f"exact_substrings is {self.exact_substrings}: give 8 tokens or more (published: "
                "50), or 0"
            )
        if not 0 <= self.min_yield <= 1:
            raise ValueError(f"min_yield is {self.min_yield}: give a share between 0 and 1")


@dataclass
class Asset:
    """A file that some recipes read and no package brings; `python data/download.py` fetches it."""

    # on this machine; None leaves the step that needs it out where it may be left out
    path: str | None = None
    url: str | None = None  # https://, hf:// or s3://
    sha256: str | None = None  # refused when the file hashes otherwise


@dataclass
class Assets:
    """All of them, by what they are for."""

    # fastText model of languages: lid.176.bin or lid.176.ftz
    language_model: Asset = field(default_factory=Asset)
    # fastText model with the label __label__math
    math_classifier: Asset = field(default_factory=Asset)
    # domains, one a line, in place of datatrove's own lists
    url_blocklist: Asset = field(default_factory=Asset)
    evaluations: Asset = field(default_factory=Asset)  # jsonl of texts that must not be trained on


class Executor(Enum):
    """Where tasks run."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass
class ExecutorConfig:
    """How the tasks of a preparation are run; the outputs are the same."""

    kind: Executor
    workers: int | None  # processes, or tasks at a time on a cluster; None: data.workers
    partition: str | None  # Slurm's
    time: str  # Slurm's limit per task, as 24:00:00
    memory_gib: int  # per task
    tasks_per_job: int  # tasks that one element of a Slurm array runs one after another
    max_array_size: int  # of the Slurm cluster (MaxArraySize)
    poll_seconds: float
    address: str | None  # of a Ray cluster; None starts one on this machine
    account: str | None = None  # Slurm's
    qos: str | None = None  # Slurm's


@dataclass
class Stage:
    """A span of the run with one context length and one mixture."""

    name: str
    tokens: int  # rounded down to whole blocks when the mixture is compiled
    seq_len: int  # tokens; divides block_tokens
    mixture: dict[str, float]  # source -> share of tokens; shares need not sum to 1


@dataclass
class TokenizerConfig:
    """Which vocabulary; trained on the cleaned sources unless a path names one."""

    path: str | None  # an existing tokenizer.json; None trains one of vocab_size
    sha256: str | None  # refused when the file at path hashes otherwise
    vocab_size: int
    train_megabytes: int  # text the trainer reads at most, taken from all sources by turns
    # where data/download.py fetches it from; hf://<repository>/tokenizer.json for the hub
    url: str | None = None


@dataclass
class DataConfig:
    """Everything that data/prepare.py builds and the loader reads."""

    folder: str
    seed: int
    block_tokens: int  # stride that is shuffled; every seq_len divides it
    heldout_percent: float  # share of document groups that is never trained on
    reset_state: bool  # batches carry document starts, and conv and scan forget there
    workers: int  # processes of data/prepare.py
    tokenizer: TokenizerConfig
    sources: dict[str, Source]
    stages: list[Stage]
    assets: Assets = field(default_factory=Assets)
    keep_exclusions: bool = False  # dropped documents are written out with their reason

    def __post_init__(self) -> None:
        if (
            self.block_tokens < 1
            or self.workers < 1
            or any(source.tasks < 1 for source in self.sources.values())
        ):
            raise ValueError(
                "data.block_tokens, data.workers and every source's tasks must be at least 1"
            )
        if not self.stages:
            raise ValueError("data.stages is empty: a run needs at least one stage")
        if not 0 < self.heldout_percent < 100:
            raise ValueError(
                f"data.heldout_percent is {self.heldout_percent}; choose a value between 0 and 100"
            )
        if not 12 <= self.tokenizer.vocab_size <= 65536:
            raise ValueError(
                f"data.tokenizer.vocab_size is {self.tokenizer.vocab_size}; shards hold uint16 "
                "ids and ids 0-11 are special, so choose 12 to 65536"
            )
        for stage in self.stages:
            self._check_stage(stage)

    def tokens_of(self, stage: Stage) -> int:
        """Tokens of a stage in whole blocks."""
        return stage.tokens // self.block_tokens * self.block_tokens

    def _check_stage(self, stage: Stage) -> None:
        if stage.seq_len < 1 or self.block_tokens % stage.seq_len:
            raise ValueError(
                f"stage {stage.name}: seq_len {stage.seq_len} does not divide data.block_tokens "
                f"{self.block_tokens}"
            )
        if stage.tokens < self.block_tokens:
            raise ValueError(
                f"stage {stage.name}: {stage.tokens} tokens are less than one block of "
                f"{self.block_tokens}"
            )
        unknown = sorted(set(stage.mixture) - set(self.sources))
        if unknown:
            raise ValueError(
                f"stage {stage.name}: mixture names {', '.join(unknown)}; data.sources has "
                f"{', '.join(self.sources)}"
            )
        if any(share < 0 for share in stage.mixture.values()) or sum(stage.mixture.values()) <= 0:
            raise ValueError(f"stage {stage.name}: mixture shares must be >= 0 and not all zero")


@dataclass
class PrepareSettings:
    """What this program does besides preparing."""

    # take over a folder of an earlier version as it is, after checking it, and do no more
    adopt: bool
    rebuild: bool  # replace finished data that other versions of recipes or packages made


@dataclass
class PrepareConfig:
    """The sections of the config that this program reads."""

    data: DataConfig
    executor: ExecutorConfig
    prepare: PrepareSettings


@dataclass
class VerifySettings:
    """How much is looked at."""

    samples: int
    hashes: bool


@dataclass
class VerifyConfig:
    """The sections of the config that this program reads."""

    data: DataConfig
    verify: VerifySettings


@dataclass
class BrowseSettings:
    """What is shown."""

    source: str | None
    stage: str | None
    position: int | None  # token of the run
    count: int
    characters: int
    page: str | None
    samples: int

    def __post_init__(self) -> None:
        if (
            self.source is None
            and self.stage is None
            and self.position is None
            and self.page is None
        ):
            raise ValueError(
                "nothing to show: set browse.source, browse.stage, browse.position or browse.page"
            )


@dataclass
class BrowseConfig:
    """The sections of the config that this program reads."""

    data: DataConfig
    browse: BrowseSettings
