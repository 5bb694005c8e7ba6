"""Sizes a run on a folder of any text: the rule behind `${own:KEY}` in configs/experiment/own.yaml.

| what | follows from |
|---|---|
| vocabulary | a token per thousand bytes of text: a power of two from 512 to 8192 |
| held-out share | 10 % of the parts below 1 MB of text, 5 % below 1 GB, else 1 % |
| model | the largest named size whose run reads at least five tokens per parameter |
| tokens | what the machine trains on in run.minutes; at most four epochs, more below 1M tokens |
| batch, context | a thousand updates, of at least eight sequences |
| learning rate | 4e-3 at d_model 128, falling with its power of 2/3: 1.2e-3 at 768, as 130m has |
| stages | the last fifth of the tokens decays the rate |

Four epochs are nearly as good as new text (arXiv 2305.16264). Before the text is prepared its
tokens are estimated, which only decides values that preparation does not use.
"""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import isqrt, log2
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from core.compose import CONFIGS
from core.errors import InputError
from core.files import write_json
from core.old_keys import read_record
from core.ranges import Count
from core.records import read_if_present
from core.run import RunFiles
from model.config import ModelConfig
from model.flops import parameter_count, train_flops_per_token

RECORD = "own.json"  # in the data set's folder
SOURCE = "own"
SIZES = ("0.3m", "1m", "4m", "16m", "60m", "130m")
VOCABULARY = (512, 8192)
BYTES_PER_TOKEN = 4  # an estimate, until the text is prepared
# text in a byte of a file: archives are compressed, pages are mostly markup
TEXT_PER_BYTE = {"parquet": 2.0, "warc": 0.2, "html": 0.2, "compressed": 4.0}
EPOCHS, MANY_EPOCHS = 4, 16
ENOUGH_TOKENS = 1_000_000  # below it four epochs are few updates
TOKENS_PER_PARAMETER = 5
UPDATES = 1000
# assumed: what small models reach in fp32 and in bf16
CORE_FLOPS, GPU_FLOPS = 2e10, 2e13
DECAY = 0.2  # of the tokens
GPUS = Path("/proc/driver/nvidia/gpus")  # a folder each; asking torch takes seconds
PREPARE = "python data/prepare.py +experiment=own data.input=FOLDER"


@dataclass(frozen=True)
class OwnRecord:
    """What the first preparation was given, so that later commands need not be."""

    input: str
    text_bytes: Count
    train_tokens: Count | None = None  # once the text is prepared


@dataclass(frozen=True)
class Sizes:
    """A run's sizes, before overrides."""

    tokens: int
    batch_tokens: int
    seq_len: int

    @property
    def batch_sequences(self) -> int:
        """Sequences of a batch, at least eight."""
        return max(8, self.batch_tokens // self.seq_len)


def value(key: str, *, _root_: DictConfig) -> Any:
    """The value of `${own:key}` in a composed config; raises InputError without any text."""
    return VALUES[key](_root_)


def input_folder(root: DictConfig) -> str:
    """The folder of the first preparation, where the command line gives none."""
    record = read_own(Path(root.data.folder))
    if record is None:
        raise InputError(
            "no text yet: set data.input to a folder of it (txt, md, html, jsonl, parquet, warc), "
            f"as in {PREPARE}"
        )
    return record.input


def read_own(folder: Path) -> OwnRecord | None:
    """The record of a data set's folder; None before the first preparation."""
    return read_if_present(folder / RECORD, OwnRecord, f"remove it, then {PREPARE}")


def remember(folder: Path, source: str) -> None:
    """Write the record of a first preparation, before its work.

    Raises InputError if the folder was prepared from other text.
    """
    record = read_own(folder)
    if record is None:
        write_json(folder / RECORD, asdict(OwnRecord(source, text_bytes(source))))
    elif record.input != source:
        raise InputError(
            f"{folder} has the text of {record.input}, not of {source}: set another run.name (or "
            f"data.folder), or remove {folder}"
        )


def remember_tokens(folder: Path, train_tokens: int) -> None:
    """Add the tokens of the prepared text to the record."""
    record = read_own(folder)
    assert record is not None
    write_json(folder / RECORD, asdict(replace(record, train_tokens=train_tokens)))


def next_command(folder: Path) -> str:
    """The command that trains on prepared text."""
    ranks = len(list(GPUS.glob("*"))) or len(os.sched_getaffinity(0))
    name = "" if folder.name == SOURCE else f" run.name={folder.name}"
    return f"torchrun --nproc-per-node {ranks} train/pretrain.py +experiment=own{name}"


@cache
def text_bytes(source: str) -> int:
    """Estimate the bytes of text in a folder from the sizes of its files."""
    from data.readers.listing import COMPRESSION, kind_of, list_raw_files  # takes a second

    total = 0.0
    for name, size in list_raw_files(source).sizes.items():
        factor = TEXT_PER_BYTE.get(str(kind_of(name)), 1.0)
        packed = name.lower().endswith(COMPRESSION)
        total += size * factor * (TEXT_PER_BYTE["compressed"] if packed else 1.0)
    return max(1, round(total))


def bytes_of(root: DictConfig) -> int:
    """Bytes of text: as recorded, or as the files say."""
    record = read_own(Path(root.data.folder))
    return record.text_bytes if record is not None else text_bytes(str(root.data.input))


def train_tokens(root: DictConfig) -> int:
    """Tokens of the prepared text without those held out; before that, an estimate."""
    record = read_own(Path(root.data.folder))
    tokens = None if record is None else record.train_tokens
    return tokens or max(1, bytes_of(root) // BYTES_PER_TOKEN)


def vocab_size(root: DictConfig) -> int:
    """Ids of the given vocabulary, or of the one to train."""
    if root.data.tokenizer.path is not None:
        return size_of_vocabulary(str(root.data.tokenizer.path))
    low, high = VOCABULARY
    return min(high, max(low, 2 ** int(log2(max(1, bytes_of(root) / 1000)))))


@cache
def size_of_vocabulary(path: str) -> int:
    """Ids of a tokenizer.json."""
    from tokenizers import Tokenizer

    from data.vocabulary import required_vocab_size

    try:
        return required_vocab_size(Tokenizer.from_file(path))
    except Exception as error:  # the library's errors have no other type
        raise InputError(f"data.tokenizer.path {path} cannot be read: {error}") from error


def rows(root: DictConfig) -> int:
    """Rows of the embedding: whole tiles of a matrix product."""
    return -(-int(root.data.tokenizer.vocab_size) // 64) * 64


def heldout_percent(root: DictConfig) -> float:
    """Few parts need a larger share, so that some are held out."""
    size = bytes_of(root)
    return 10.0 if size < 1e6 else 5.0 if size < 1e9 else 1.0


def flops_per_second(root: DictConfig) -> float:
    """Of this machine; a run that has started keeps what it was sized for."""
    if (flops := recorded_flops(Path(root.run.dir).resolve())) is not None:
        return flops
    gpus = len(list(GPUS.glob("*")))
    return gpus * GPU_FLOPS if gpus else len(os.sched_getaffinity(0)) * CORE_FLOPS


@cache  # a config resolves it for each of its sizes
def recorded_flops(run: Path) -> float | None:
    """What a run that has started was sized for."""
    flops = (read_record(RunFiles(run).config).get("run") or {}).get("flops_per_second")
    return None if flops is None else float(flops)


def most_tokens(available: int) -> int:
    """Tokens of four epochs, and of more the less text there is."""
    epochs = EPOCHS * max(1.0, (ENOUGH_TOKENS / available) ** 0.5)
    return round(available * min(MANY_EPOCHS, epochs))


def tokens_for(root: DictConfig, flops_per_token: int) -> int:
    """Tokens of a run of run.minutes with a model."""
    seconds = 60 * float(root.run.minutes)
    possible = int(seconds * float(root.run.flops_per_second) / flops_per_token)
    return max(1, min(most_tokens(train_tokens(root)), possible))


@cache
def named(name: str) -> tuple[int, int]:
    """d_model and n_layer of a size in configs/model."""
    config = OmegaConf.load(Path(CONFIGS, "model", f"{name}.yaml"))
    return config.d_model, config.n_layer


def chosen_size(root: DictConfig) -> tuple[int, int]:
    """d_model and n_layer of the largest size that has enough tokens, or of the smallest."""
    for name in reversed(SIZES):
        width, depth = named(name)
        config = ModelConfig(vocab_size=rows(root), d_model=width, n_layer=depth)
        tokens = tokens_for(root, train_flops_per_token(config))
        if tokens >= TOKENS_PER_PARAMETER * parameter_count(config):
            return width, depth
    return named(SIZES[0])


def sizes(root: DictConfig) -> Sizes:
    """Sizes of the run with the config's model."""
    model = root.model
    config = ModelConfig(
        **{key: model[key] for key in ("vocab_size", "d_model", "n_layer", "d_inner", "dt_rank")}
    )
    tokens = tokens_for(root, train_flops_per_token(config))
    batch = min(2**18, max(2**9, tokens // UPDATES))
    seq_len = 2 ** min(11, max(5, int(log2(batch / 16))))
    seq_len = min(seq_len, 2 ** int(log2(max(32, isqrt(train_tokens(root))))))
    tokens = max(tokens, 16 * seq_len)
    return Sizes(tokens, batch, seq_len)


def whole(root: DictConfig, share: float) -> int:
    """A share of the tokens, in whole blocks."""
    block = int(root.data.block_tokens)
    return max(1, round(share * sizes(root).tokens / block)) * block


def has_gpu() -> bool:
    """Whether an NVIDIA driver lists a GPU."""
    return any(GPUS.glob("*"))


VALUES: dict[str, Callable[[DictConfig], Any]] = {
    "input": input_folder,
    "flops_per_second": flops_per_second,
    "vocab_size": vocab_size,
    "rows": rows,
    "heldout_percent": heldout_percent,
    "workers": lambda root: len(os.sched_getaffinity(0)),
    "d_model": lambda root: chosen_size(root)[0],
    "n_layer": lambda root: chosen_size(root)[1],
    "lr": lambda root: float(f"{4e-3 * (128 / int(root.model.d_model)) ** (2 / 3):.2g}"),
    "seq_len": lambda root: sizes(root).seq_len,
    "block_tokens": lambda root: 4 * sizes(root).seq_len,  # longer contexts can be set, too
    "batch_sequences": lambda root: sizes(root).batch_sequences,
    "stable_tokens": lambda root: whole(root, 1 - DECAY),
    "decay_tokens": lambda root: whole(root, DECAY),
    "warmup_tokens": lambda root: whole(root, 0.05),
    "tenth": lambda root: whole(root, 0.1),
    "precision": lambda root: "bf16" if has_gpu() else "fp32",
    "micro_batch_tokens": lambda root: max(16384 if has_gpu() else 2048, sizes(root).seq_len),
}
