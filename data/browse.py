"""Browse prepared data: documents of a source, sequences of a stage or at a token, an HTML page.

examples:
  python data/browse.py +experiment=demo browse.source=web
  python data/browse.py +experiment=7b browse.position=1.2e12
  python data/browse.py +experiment=7b browse.stage=decay browse.count=5
  python data/browse.py +experiment=demo browse.page=runs/demo/data.html
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from core.command import command
from core.errors import InputError
from data import tokenizer
from data.config import BrowseConfig, BrowseSettings, DataConfig
from data.pipeline.page import write_page
from data.stream.documents import Documents
from data.stream.loader import Loader, compile_plan
from data.stream.manifests import Manifest, open_manifests, source_folder, tokenizer_path
from data.stream.mixture import PlannedStage
from data.vocabulary import end_id

RULE = "-" * 100


def truncate(text: str, characters: int) -> str:
    """The first `characters` of a text, with a note of how many follow."""
    if len(text) <= characters:
        return text
    return f"{text[:characters]}\n... {len(text) - characters:,} more characters"


def show_source(cfg: DataConfig, manifests: dict[str, Manifest], settings: BrowseSettings) -> None:
    """Print random train documents of a source, drawn with `data.seed`."""
    if settings.source not in cfg.sources:
        raise InputError(
            f"browse.source is {settings.source}; the config has {', '.join(cfg.sources)}"
        )
    folder = source_folder(cfg, settings.source)
    documents = Documents(folder, manifests[settings.source], "train")
    vocabulary = tokenizer.load(tokenizer_path(cfg))
    sample = np.random.default_rng(cfg.seed).choice(
        len(documents), min(settings.count, len(documents)), replace=False
    )
    for number in sorted(sample.tolist()):
        ids = documents.ids(number)
        print(
            f"{RULE}\n{settings.source}, document {number:,} of {len(documents):,}, "
            f"{len(ids):,} tokens\n{RULE}"
        )
        text = vocabulary.decode(ids[:-1].tolist(), skip_special_tokens=False)
        print(truncate(text, settings.characters))


def show_sequences(
    loader: Loader, stage: PlannedStage, first: int, settings: BrowseSettings
) -> None:
    """Print sequences of a stage from number `first` on, each with its first token of the run."""
    plan = loader.plan
    path = tokenizer_path(plan.config)
    vocabulary = tokenizer.load(path)
    eos = end_id(path, vocabulary)
    end = min(first + settings.count, stage.tokens // stage.seq_len)
    for number in range(first, end):
        batch = loader.read(stage, np.array([number]))
        source, block = plan.find_blocks(
            stage, np.array([number]) // (plan.block_tokens // stage.seq_len)
        )
        token = stage.first_token + number * stage.seq_len
        name = plan.sources[int(source[0])]
        print(
            f"{RULE}\ntoken {token:,} of the run, stage {stage.name}, sequence {number:,} of "
            f"{stage.seq_len} tokens\nblock {int(block[0]):,} of {name}\n{RULE}"
        )
        print(truncate(decode(vocabulary, eos, batch.tokens[0].numpy()), settings.characters))


def decode(vocabulary: Tokenizer, eos: int, ids: NDArray[np.int64]) -> str:
    """Text of a sequence, with every end token on its own line."""
    documents = np.split(ids, np.flatnonzero(ids == eos) + 1)
    texts = [
        vocabulary.decode(document[document != eos].tolist(), skip_special_tokens=False)
        for document in documents
    ]
    return f"\n{vocabulary.id_to_token(eos)}\n".join(texts)


def browse(cfg: DataConfig, settings: BrowseSettings) -> None:
    """Show everything that the settings name."""
    manifests = open_manifests(cfg)
    if settings.source is not None:
        show_source(cfg, manifests, settings)
    if settings.page is not None:
        write_page(cfg, manifests, Path(settings.page), settings.samples)
        print(f"wrote {settings.page}")
    if settings.position is None and settings.stage is None:
        return
    loader = Loader(compile_plan(cfg, manifests), manifests)
    if settings.position is not None:
        if not 0 <= settings.position < loader.plan.tokens:
            raise InputError(
                f"browse.position is {settings.position}; the run has tokens 0 to "
                f"{loader.plan.tokens - 1}"
            )
        stage = loader.plan.stage_at(settings.position)
        first = (settings.position - stage.first_token) // stage.seq_len
        show_sequences(loader, stage, first, settings)
    if settings.stage is not None:
        stages = {stage.name: stage for stage in loader.plan.stages}
        if settings.stage not in stages:
            raise InputError(
                f"browse.stage is {settings.stage}; the config has {', '.join(stages)}"
            )
        show_sequences(loader, stages[settings.stage], 0, settings)


@command(BrowseConfig)
def main(cfg: BrowseConfig) -> None:
    """Browse the data of a composed config."""
    browse(cfg.data, cfg.browse)


if __name__ == "__main__":
    main()
