"""What a data set is: sources, stages, tokenizer. Types and checks; the values stand in configs/data."""

from dataclasses import dataclass


class InputError(ValueError):
    """A mistake the user can mend; the message names the fix and is printed without a traceback."""


@dataclass
class Source:
    """One kind of text and the recipe that cleans it."""

    recipe: str  # module of data/recipes
    input: str  # folder or URL of the raw documents; "host" is the text every Python carries
    licence: str
    max_epochs: float  # the mixture refuses to read the source more often than this
    tasks: int  # datatrove tasks; at most the number of input files does work


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

    def __post_init__(self) -> None:
        if self.block_tokens < 1 or self.workers < 1 or any(source.tasks < 1 for source in self.sources.values()):
            raise ValueError("data.block_tokens, data.workers and every source's tasks must be at least 1")
        if not self.stages:
            raise ValueError("data.stages is empty: a run needs at least one stage")
        if not 0 < self.heldout_percent < 100:
            raise ValueError(f"data.heldout_percent is {self.heldout_percent}; choose a value between 0 and 100")
        if not 12 <= self.tokenizer.vocab_size <= 65536:
            raise ValueError(
                f"data.tokenizer.vocab_size is {self.tokenizer.vocab_size}; shards hold uint16 ids and "
                "ids 0-11 are special, so choose 12 to 65536"
            )
        for stage in self.stages:
            self._check_stage(stage)

    def tokens_of(self, stage: Stage) -> int:
        """Tokens of a stage in whole blocks."""
        return stage.tokens // self.block_tokens * self.block_tokens

    def _check_stage(self, stage: Stage) -> None:
        if stage.seq_len < 1 or self.block_tokens % stage.seq_len:
            raise ValueError(
                f"stage {stage.name}: seq_len {stage.seq_len} does not divide data.block_tokens {self.block_tokens}"
            )
        if stage.tokens < self.block_tokens:
            raise ValueError(
                f"stage {stage.name}: {stage.tokens} tokens are less than one block of {self.block_tokens}"
            )
        unknown = sorted(set(stage.mixture) - set(self.sources))
        if unknown:
            raise ValueError(
                f"stage {stage.name}: mixture names {', '.join(unknown)}; data.sources has {', '.join(self.sources)}"
            )
        if any(share < 0 for share in stage.mixture.values()) or sum(stage.mixture.values()) <= 0:
            raise ValueError(f"stage {stage.name}: mixture shares must be >= 0 and not all zero")
