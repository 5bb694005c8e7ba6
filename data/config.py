"""Config of a data set: sources, stages, tokenizer. Values are in configs/data."""

import os
import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated

from omegaconf import OmegaConf

from core.ranges import (
    Count,
    NotNegative,
    PositiveOrInf,
    PositiveSeconds,
    Range,
    Seed,
    Share,
    Whole,
)
from data import own

OmegaConf.register_new_resolver("own", own.value)
Workers = Annotated[int, Range(1, 2**16)]


@dataclass
class Source:
    """One kind of text and the recipe that cleans it."""

    recipe: str  # module of data/recipes
    input: str  # folder or URL of the raw documents
    licence: str
    max_epochs: PositiveOrInf  # a plan that reads the source more often is an error
    # datatrove tasks; more than there are input files have no effect; pinned by the first launch
    tasks: Annotated[int, Range(1, 10**6)]
    text_key: str = "text"  # column or key of the text in jsonl and parquet
    # MinHash as "<buckets>x<hashes per bucket>": 14x8, 93x15; None keeps near duplicates
    near_duplicates: str | None = None
    # keep runs of this many tokens (words and punctuation marks) once; 0 keeps all
    exact_substrings: Whole = 0
    replace_pii: bool = False  # replace e-mail and public IP addresses by placeholders
    decontaminate: bool = False  # drop documents that share 13 words with assets.evaluations
    expected_tokens: Whole = 0  # to plan a run before the source is prepared
    # command or URL that provides the input; shown if the input is missing
    obtained_by: str | None = None
    # error if text is extracted from a smaller share of the pages
    min_yield: Share = 0.5
    # of the kind that the weights of run.init_from were trained on: reports show what is forgotten
    old: bool = False

    def __post_init__(self) -> None:
        self.input = os.path.expanduser(self.input)  # shells keep the ~ of input=~/texts
        if self.near_duplicates is not None and not re.fullmatch(
            r"[1-9]\d{0,2}x[1-9]\d{0,2}", self.near_duplicates
        ):
            raise ValueError(
                f"near_duplicates is {self.near_duplicates}: set buckets x hashes per bucket, such "
                "as 14x8, or null"
            )
        if self.exact_substrings and self.exact_substrings < 8:
            raise ValueError(
                f"exact_substrings is {self.exact_substrings}: set 8 tokens or more (published: "
                "50), or 0"
            )


@dataclass
class Asset:
    """A file that some recipes read and `python data/download.py` downloads."""

    # on this machine; None disables an optional step
    path: str | None = None
    url: str | None = None  # https://, hf:// or s3://
    sha256: str | None = None  # a file with another hash is an error


@dataclass
class Assets:
    """All assets, by purpose."""

    # fastText language model: lid.176.bin or lid.176.ftz
    language_model: Asset = field(default_factory=Asset)
    # fastText model with the label __label__math
    math_classifier: Asset = field(default_factory=Asset)
    # domains, one per line, in place of datatrove's lists
    url_blocklist: Asset = field(default_factory=Asset)
    evaluations: Asset = field(default_factory=Asset)  # jsonl of texts that must not be trained on


class Executor(Enum):
    """Where tasks run."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


@dataclass
class ExecutorConfig:
    """How the tasks of a preparation run; every executor gives the same outputs."""

    kind: Executor
    workers: Workers | None  # processes, or parallel tasks on a cluster; None: data.workers
    partition: str | None  # Slurm's
    time: str  # Slurm's time limit per task, such as 24:00:00
    memory_gib: Count  # per task
    tasks_per_job: Count  # tasks that one element of a Slurm array runs in sequence
    max_array_size: Count  # of the Slurm cluster (MaxArraySize)
    poll_seconds: PositiveSeconds
    address: str | None  # of a Ray cluster; None starts a cluster on this machine
    account: str | None = None  # Slurm's
    qos: str | None = None  # Slurm's


@dataclass
class Stage:
    """A span of the run with one context length and one mixture."""

    name: str
    tokens: Count  # rounded down to a multiple of block_tokens
    seq_len: Count  # tokens; divides block_tokens
    mixture: dict[str, NotNegative]  # source -> share of tokens; shares need not sum to 1


@dataclass
class TokenizerConfig:
    """An existing tokenizer, or the settings to train one on the cleaned sources."""

    path: str | None  # an existing tokenizer.json; None trains one of vocab_size
    sha256: str | None  # a file with another hash at path is an error
    vocab_size: Annotated[int, Range(1, 2**32)]
    train_megabytes: Count  # training text at most, alternating between sources
    # source of data/download.py: hf://<repository>/tokenizer.json for the Hub, or the package that
    # Falcon's is built from (data/pipeline/falcon.py), as a URL or a file
    url: str | None = None
    # special token that ends a document; None: eos_token of tokenizer_config.json beside the file,
    # or the only special token with a known name
    eos_token: str | None = None

    def __post_init__(self) -> None:
        if self.eos_token is not None and self.path is None:
            raise ValueError(
                f"data.tokenizer.eos_token is {self.eos_token}, but a trained tokenizer ends "
                "documents with <|endoftext|>: set data.tokenizer.path, or eos_token to null"
            )


@dataclass
class DataConfig:
    """Everything that data/prepare.py builds and the loader reads."""

    folder: str
    seed: Seed
    block_tokens: Count  # unit of shuffling; every seq_len divides it
    # share of document groups that are never trained on
    heldout_percent: Annotated[float, Range(0, 100, above=True, below=True)]
    reset_state: bool  # conv and SSM states are reset at document starts
    workers: Workers  # processes of data/prepare.py
    tokenizer: TokenizerConfig
    sources: dict[str, Source]
    stages: list[Stage]
    assets: Assets = field(default_factory=Assets)
    keep_exclusions: bool = False  # write dropped documents with their reasons
    input: str | None = None  # of experiment=own: a folder of any text, which sizes the run

    def __post_init__(self) -> None:
        if invalid := [name for name in self.sources if not re.fullmatch(r"\w[\w.-]*", name)]:
            raise ValueError(
                f"data.sources has {', '.join(map(repr, invalid))}: a name is that of a folder, of "
                "letters, digits, _, . and -"
            )
        if self.input is not None and own.SOURCE not in self.sources:
            raise ValueError(
                "data.input is that of experiment=own: set data.sources.NAME.input of a source"
            )
        if not self.stages:
            raise ValueError("data.stages is empty: a run needs at least one stage")
        for stage in self.stages:
            self._check_stage(stage)

    def tokens_of(self, stage: Stage) -> int:
        """Tokens of a stage, rounded down to whole blocks."""
        return stage.tokens // self.block_tokens * self.block_tokens

    def _check_stage(self, stage: Stage) -> None:
        if self.block_tokens % stage.seq_len:
            raise ValueError(
                f"stage {stage.name}: seq_len {stage.seq_len} does not divide data.block_tokens "
                f"{self.block_tokens}"
            )
        if stage.tokens < self.block_tokens:
            raise ValueError(
                f"stage {stage.name}: {stage.tokens} tokens are fewer than one block of "
                f"{self.block_tokens}"
            )
        unknown = sorted(set(stage.mixture) - set(self.sources))
        if unknown:
            raise ValueError(
                f"stage {stage.name}: mixture names {', '.join(unknown)}; data.sources has "
                f"{', '.join(self.sources)}"
            )
        if not any(stage.mixture.values()):
            raise ValueError(f"stage {stage.name}: every share of the mixture is 0, raise one")


@dataclass
class PrepareSettings:
    """What data/prepare.py does with data that another version prepared."""

    # check the data and write new keys for it; prepare nothing
    adopt: bool
    rebuild: bool  # replace it


@dataclass
class PrepareConfig:
    """Config sections of data/prepare.py."""

    data: DataConfig
    executor: ExecutorConfig
    prepare: PrepareSettings


@dataclass
class VerifySettings:
    """What data/verify.py checks."""

    samples: Whole
    hashes: bool


@dataclass
class VerifyConfig:
    """Config sections of data/verify.py."""

    data: DataConfig
    verify: VerifySettings


@dataclass
class BrowseSettings:
    """What data/browse.py shows."""

    source: str | None
    stage: str | None
    position: Whole | None  # token of the run
    count: Count
    characters: Count
    page: str | None
    samples: Count

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
    """Config sections of data/browse.py."""

    data: DataConfig
    browse: BrowseSettings
