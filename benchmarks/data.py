"""Data beside its baselines in one process: `python -m benchmarks.data`.

Sequences from page cache, eight consecutive ones as a rank reads them and eight random ones, beside
plain np.memmap, Megatron-core's IndexedDataset and datatrove's folder dataset (and MosaicML
streaming where it is installed); tokenization of clean documents beside tokenizers.encode_batch on
the same thread; compiling and seeking the plan of 5.8T tokens.
"""

import argparse
import gc
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from benchmarks.timing import Row, median_seconds, show, with_ratios, write
from data import tokenizer
from data.config import DataConfig, Source, Stage, TokenizerConfig
from data.pipeline.shard import CleanDocuments, ShardingSpec, shard_task
from data.stream.loader import Loader
from data.stream.manifests import DTYPE, Manifest, ShardFile, source_folder
from data.stream.mixture import Plan
from examples.demo_corpus import arithmetic
from examples.demo_corpus.standard_library import code_files, reference_pages
from tests.compose import run_config

CPU = torch.device("cpu")
BATCH = 8  # sequences
VOCABULARY = 65_024


def corpus(folder: Path, tokens: int) -> DataConfig:
    """One source of random ids in one shard, and the same bytes as a Megatron pair."""
    sources = {"web": Source("curated", "raw", "CC0-1.0", 1e6, 1)}
    stages = [Stage("only", 10**12, 2048, {"web": 1.0})]
    settings = TokenizerConfig(None, None, VOCABULARY, 1)
    cfg = DataConfig(str(folder), 0, 8192, 1.0, False, 1, settings, sources, stages)
    home = source_folder(cfg, "web")
    home.mkdir(parents=True)
    path = home / "train_00000.ds"
    np.random.default_rng(0).integers(12, VOCABULARY, tokens).astype(DTYPE).tofile(path)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "megatron"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    ids = np.memmap(path, dtype=DTYPE, mode="r")
    for start in range(0, tokens, 2**20):
        builder.add_item(torch.from_numpy(ids[start : start + 2**20].astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return cfg


def ours(cfg: DataConfig, tokens: int, seq_len: int) -> Callable[[np.ndarray], Any]:
    """Batches by the loader: order, cuts, tokens and targets."""
    cfg.stages[0].seq_len = seq_len
    file = ShardFile("train_00000.ds", tokens, 1, "")
    manifest = Manifest("web", "", "", "", "", 11, VOCABULARY, {"train": [file], "heldout": []})
    loader = Loader(Plan(cfg, {"web": tokens}, {"web": ""}), {"web": manifest})
    stage = loader.plan.stages[0]
    return lambda numbers: loader.read(stage, numbers)


def as_batch(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """What a training step takes: tokens and targets, int64."""
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def baselines(cfg: DataConfig, tokens: int, seq_len: int) -> dict[str, Callable[[np.ndarray], Any]]:
    """The same batches in file order by others."""
    path = source_folder(cfg, "web") / "train_00000.ds"
    ids = np.memmap(path, dtype=DTYPE, mode="r")
    windows = (tokens - 1) // seq_len
    found: dict[str, Callable[[np.ndarray], Any]] = {
        "np.memmap": lambda n: as_batch(
            [ids[i * seq_len : (i + 1) * seq_len + 1] for i in (n % windows).tolist()]
        )
    }
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(Path(cfg.folder) / "megatron"), mmap=True)
    item = 2**20

    def by_megatron(numbers: np.ndarray) -> Any:
        starts = [int(i) * seq_len % (tokens - item) for i in numbers % windows]
        # inside one document
        starts = [start - max(0, start % item + seq_len + 1 - item) for start in starts]
        return as_batch([indexed.get(start // item, start % item, seq_len + 1) for start in starts])

    from datatrove.utils.dataset import DatatroveFolderDataset

    folder = DatatroveFolderDataset(
        str(path.parent), seq_len, filename_pattern="*.ds", token_size=2
    )

    def by_datatrove(numbers: np.ndarray) -> Any:
        rows = torch.stack([folder[int(i) % len(folder)]["input_ids"] for i in numbers])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return {
        **found,
        "megatron-core IndexedDataset": by_megatron,
        "datatrove folder dataset": by_datatrove,
        **streaming(cfg, ids, seq_len),
    }


def streaming(
    cfg: DataConfig, ids: np.ndarray, seq_len: int
) -> dict[str, Callable[[np.ndarray], Any]]:
    """MosaicML streaming over its own format, where it is installed."""
    try:
        from streaming import LocalDataset, MDSWriter
    except ImportError:
        return {}
    out = Path(cfg.folder) / f"mds{seq_len}"
    with MDSWriter(out=str(out), columns={"tokens": "bytes"}) as writer:
        for start in range(0, len(ids) - seq_len - 1, seq_len):
            writer.write({"tokens": np.asarray(ids[start : start + seq_len + 1]).tobytes()})
    dataset = LocalDataset(str(out))
    size = len(dataset)
    return {"mosaicml-streaming LocalDataset": lambda n: as_batch(
        [np.frombuffer(dataset[int(i) % size]["tokens"], dtype=DTYPE) for i in n])}  # fmt: skip


def reading(tokens: int, budget: float) -> tuple[list[Row], dict[str, float]]:
    """Random batches from page cache, one thread."""
    torch.set_num_threads(1)
    rows, rates = [], {}
    with tempfile.TemporaryDirectory() as name:
        cfg = corpus(Path(name), tokens)
        for seq_len in (2048, 8192):
            random = np.random.default_rng(1)
            calls = {"ours": ours(cfg, tokens, seq_len), **baselines(cfg, tokens, seq_len)}
            draws: dict[str, Callable[[], np.ndarray]] = {
                "a rank's step": lambda random=random: (
                    random.integers(0, 10**6) * BATCH + np.arange(BATCH)
                ),
                "random sequences": lambda random=random: random.integers(0, 10**7, BATCH),
            }
            for what, draw in draws.items():
                for who, call in calls.items():
                    seconds, runs = median_seconds(
                        lambda call=call, draw=draw: call(draw()), CPU, budget
                    )
                    rows.append(Row(what, f"{BATCH} x {seq_len}", who, seconds, runs))
                    rates[f"{what}, {seq_len}, {who}: million tokens/s"] = round(
                        BATCH * seq_len / seconds / 1e6, 1
                    )
    return rows, rates


def documents(count: int) -> list[dict[str, str]]:
    """Text that every Python carries: code, reference pages, problems; long and short ones."""
    rows = [*code_files(), *reference_pages(), *arithmetic.problems(400_000)]
    return [
        {"text": row["text"], "id": str(i), "group": str(i)}
        for i, row in enumerate(rows[:count])
        if row["text"]
    ]


def tokenizing(count: int) -> tuple[list[Row], dict[str, float]]:
    """One task, from clean documents on disk to shuffled shards with their hash, beside the bare
    encoding.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import gzip

    rows = documents(count)
    size = sum(len(row["text"].encode()) for row in rows)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        vocabulary = tokenizer.train((row["text"] for row in rows[::5]), 4096, home / "vocabulary")
        texts = [row["text"] for row in rows]
        (home / "clean").mkdir()
        with gzip.open(home / "clean" / "00000.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        place = [0]

        def stage() -> None:
            place[0] += 1
            folder = home / f"shards{place[0]}"
            folder.mkdir()
            clean = CleanDocuments(home / "clean", ["00000.jsonl.gz"], len(rows))
            tokenizer_file = home / "vocabulary" / tokenizer.FILE
            shard_task(ShardingSpec(clean, folder, tokenizer_file, 0, 1.0, 1), 0)

        taken: dict[str, list[float]] = {"ours": [], "tokenizers.encode_batch": []}
        for _ in range(3):  # by turns, since the machine is not ours alone
            for who, call in (
                ("ours", stage),
                ("tokenizers.encode_batch", lambda: vocabulary.encode_batch(texts)),
            ):
                begun = time.process_time()
                call()
                taken[who].append(time.process_time() - begun)
                gc.collect()
        memory = peak_of(stage)
    found = [
        Row("tokenize, seconds of CPU", f"{size / 1e6:.0f} MB", who, min(t), len(t))
        for who, t in taken.items()
    ]
    share = min(taken["tokenizers.encode_batch"]) / min(taken["ours"])
    return found, {"tokenization stage, share of encode_batch's throughput": round(share, 3),
                   "tokenization stage, growth of resident memory in MB": memory}  # fmt: skip


def peak_of(call: Callable[[], None]) -> float:
    """Growth of this process's resident memory over one more run, in MB."""
    before = psutil.Process().memory_info().rss
    call()
    return round((psutil.Process().memory_info().rss - before) / 1e6, 1)


def planning() -> tuple[list[Row], dict[str, float]]:
    """The plan of the 7B run: compiled, and sought in at random positions."""
    cfg = run_config("7b").data
    sizes = {name: int(6e12) for name in cfg.sources}
    compiled, runs = median_seconds(
        lambda: Plan(cfg, sizes, {name: name for name in sizes}), CPU, 1.0
    )
    tracemalloc.start()
    plan = Plan(cfg, sizes, {name: name for name in sizes})
    random = np.random.default_rng(0)

    def seek() -> None:
        token = int(random.integers(0, plan.tokens))
        stage = plan.stage_at(token)
        plan.find_blocks(stage, np.array([(token - stage.first_token) // plan.block_tokens]))

    seek()
    memory = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    sought, times = median_seconds(seek, CPU, 1.0)
    rows = [
        Row("compile the plan of 7b", f"{plan.tokens / 1e12:.1f}T tokens", "ours", compiled, runs),
        Row("seek a position", f"{plan.tokens / 1e12:.1f}T tokens", "ours", sought, times),
    ]
    return rows, {"plan, peak memory in MB": round(memory, 2)}


def main() -> None:
    """Measure, print, and record unless told otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--no-record", action="store_true", help="do not write benchmarks/results")
    chosen = parser.parse_args()
    found = [reading(2**23 if chosen.small else 2**26, 0.2 if chosen.small else 3.0)]
    found += [tokenizing(60 if chosen.small else 10**6), planning()]
    rows = with_ratios([row for part, _ in found for row in part], "ours")
    notes = {name: value for _, part in found for name, value in part.items()}
    show(rows, "data, one thread, page cache")
    for name, value in notes.items():
        print(f"{name}: {value:g}")
    if not chosen.no_record:
        print(write(rows, "data", "CPU, one thread", {}, notes))


if __name__ == "__main__":
    main()
