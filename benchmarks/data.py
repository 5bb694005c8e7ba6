"""Benchmark of the data code beside its baselines: `python -m benchmarks.data`.

Reading: eight consecutive sequences as a rank reads them, and eight random ones, from page cache;
beside np.memmap, Megatron-Core's IndexedDataset, datatrove's folder dataset, and MosaicML streaming
if it is installed. Tokenizing: clean documents, beside tokenizers.encode_batch on one thread.
Planning: compile the plan of 5.8T tokens and seek in it.
"""

import argparse
import gc
import itertools
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

from benchmarks.timing import Measurement, add_ratios, median_seconds, print_table, write_results
from data import tokenizer
from data.config import DataConfig, Source, Stage, TokenizerConfig
from data.pipeline.shard import CleanDocuments, ShardingSpec, shard_task
from data.stream.loader import Loader
from data.stream.manifests import NARROW, Manifest, ShardFile, source_folder
from data.stream.mixture import Plan
from examples.demo_corpus import arithmetic
from examples.demo_corpus.standard_library import code_files, reference_pages
from tests.compose import run_config

CPU = torch.device("cpu")
BATCH_SIZE = 8
VOCAB_SIZE = 65_024


def write_corpus(folder: Path, tokens: int) -> DataConfig:
    """Write one shard of random ids, and the same ids as a Megatron .bin and .idx."""
    sources = {"web": Source("curated", "raw", "CC0-1.0", 1e6, 1)}
    stages = [Stage("only", 10**12, 2048, {"web": 1.0})]
    settings = TokenizerConfig(None, None, VOCAB_SIZE, 1)
    cfg = DataConfig(str(folder), 0, 8192, 1.0, False, 1, settings, sources, stages)
    shards = source_folder(cfg, "web")
    shards.mkdir(parents=True)
    path = shards / "train_00000.ds"
    np.random.default_rng(0).integers(12, VOCAB_SIZE, tokens).astype(NARROW).tofile(path)
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = folder / "megatron"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    ids = np.memmap(path, dtype=NARROW, mode="r")
    for start in range(0, tokens, 2**20):
        builder.add_item(torch.from_numpy(ids[start : start + 2**20].astype(np.int64)))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return cfg


def our_loader(cfg: DataConfig, tokens: int, seq_len: int) -> Callable[[np.ndarray], Any]:
    """Read batches with our Loader: data order, tokens and targets."""
    cfg.stages[0].seq_len = seq_len
    file = ShardFile("train_00000.ds", tokens, 1, "")
    manifest = Manifest("web", "", "", "", "", 11, VOCAB_SIZE, {"train": [file], "heldout": []})
    loader = Loader(Plan(cfg, {"web": tokens}, {"web": ""}), {"web": manifest})
    stage = loader.plan.stages[0]
    return lambda indices: loader.read(stage, indices)


def as_batch(rows: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a training step, int64."""
    ids = torch.from_numpy(np.stack(rows).astype(np.int64))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def baselines(cfg: DataConfig, tokens: int, seq_len: int) -> dict[str, Callable[[np.ndarray], Any]]:
    """Read batches of the same shape in file order with other libraries."""
    path = source_folder(cfg, "web") / "train_00000.ds"
    ids = np.memmap(path, dtype=NARROW, mode="r")
    windows = (tokens - 1) // seq_len

    def read_memmap(indices: np.ndarray) -> Any:
        starts = (indices % windows * seq_len).tolist()
        return as_batch([ids[start : start + seq_len + 1] for start in starts])

    from megatron.core.datasets.indexed_dataset import IndexedDataset

    indexed = IndexedDataset(str(Path(cfg.folder) / "megatron"), mmap=True)
    doc_tokens = 2**20

    def read_megatron(indices: np.ndarray) -> Any:
        rows = []
        for index in indices % windows:
            start = int(index) * seq_len % (tokens - doc_tokens)
            # move the start back if the sequence would cross a document boundary
            start -= max(0, start % doc_tokens + seq_len + 1 - doc_tokens)
            rows.append(indexed.get(start // doc_tokens, start % doc_tokens, seq_len + 1))
        return as_batch(rows)

    from datatrove.utils.dataset import DatatroveFolderDataset

    folder = DatatroveFolderDataset(
        str(path.parent), seq_len, filename_pattern="*.ds", token_size=2
    )

    def read_datatrove(indices: np.ndarray) -> Any:
        rows = torch.stack([folder[int(i) % len(folder)]["input_ids"] for i in indices])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    return {
        "np.memmap": read_memmap,
        "megatron-core IndexedDataset": read_megatron,
        "datatrove folder dataset": read_datatrove,
        **mosaicml(cfg, ids, seq_len),
    }


def mosaicml(
    cfg: DataConfig, ids: np.ndarray, seq_len: int
) -> dict[str, Callable[[np.ndarray], Any]]:
    """Read MosaicML streaming's own format; empty if it is not installed."""
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
        [np.frombuffer(dataset[int(i) % size]["tokens"], dtype=NARROW) for i in n])}  # fmt: skip


def time_reading(tokens: int, budget: float) -> tuple[list[Measurement], dict[str, float]]:
    """Time batches from page cache on one thread."""
    torch.set_num_threads(1)
    rows = []
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        cfg = write_corpus(Path(name), tokens)
        for seq_len in (2048, 8192):
            random = np.random.default_rng(1)
            calls = {"ours": our_loader(cfg, tokens, seq_len), **baselines(cfg, tokens, seq_len)}
            draws: dict[str, Callable[[], np.ndarray]] = {
                "a rank's step": lambda random=random: (
                    random.integers(0, 10**6) * BATCH_SIZE + np.arange(BATCH_SIZE)
                ),
                "random sequences": lambda random=random: random.integers(0, 10**7, BATCH_SIZE),
            }
            for what, draw in draws.items():
                for who, call in calls.items():
                    seconds, runs = median_seconds(
                        lambda call=call, draw=draw: call(draw()), CPU, budget
                    )
                    rows.append(Measurement(what, f"{BATCH_SIZE} x {seq_len}", who, seconds, runs))
                    rates[f"{what}, {seq_len}, {who}: million tokens/s"] = round(
                        BATCH_SIZE * seq_len / seconds / 1e6, 1
                    )
    return rows, rates


def documents(count: int) -> list[dict[str, str]]:
    """Long and short documents of the demo corpus: code, reference pages and problems."""
    rows = [*code_files(), *reference_pages(), *arithmetic.problems(400_000)]
    return [
        {"text": row["text"], "id": str(i), "group": str(i)}
        for i, row in enumerate(rows[:count])
        if row["text"]
    ]


def time_tokenizing(count: int) -> tuple[list[Measurement], dict[str, float]]:
    """Time one task, from clean documents to shuffled and hashed shards, beside encode_batch."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import gzip

    rows = documents(count)
    size = sum(len(row["text"].encode()) for row in rows)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        vocabulary = tokenizer.train((row["text"] for row in rows[::5]), 4096, root / "vocabulary")
        texts = [row["text"] for row in rows]
        (root / "clean").mkdir()
        with gzip.open(root / "clean" / "00000.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        runs = itertools.count()

        def run_task() -> None:
            folder = root / f"shards{next(runs)}"
            folder.mkdir()
            clean = CleanDocuments(root / "clean", ["00000.jsonl.gz"], len(rows))
            tokenizer_file = root / "vocabulary" / tokenizer.FILE
            shard_task(ShardingSpec(clean, folder, tokenizer_file, 0, 1.0, 1), 0)

        cpu_seconds: dict[str, list[float]] = {"ours": [], "tokenizers.encode_batch": []}
        for _ in range(3):  # interleaved, because the machine may be shared
            for who, call in (
                ("ours", run_task),
                ("tokenizers.encode_batch", lambda: vocabulary.encode_batch(texts)),
            ):
                start = time.process_time()
                call()
                cpu_seconds[who].append(time.process_time() - start)
                gc.collect()
        memory_mb = memory_growth_mb(run_task)
    measurements = [
        Measurement("tokenize, seconds of CPU", f"{size / 1e6:.0f} MB", who, min(t), len(t))
        for who, t in cpu_seconds.items()
    ]
    ratio = min(cpu_seconds["tokenizers.encode_batch"]) / min(cpu_seconds["ours"])
    return measurements, {
        "tokenization stage, share of encode_batch's throughput": round(ratio, 3),
        "tokenization stage, growth of resident memory in MB": memory_mb,
    }


def memory_growth_mb(call: Callable[[], None]) -> float:
    """Growth of this process's resident memory during a call, in MB."""
    before = psutil.Process().memory_info().rss
    call()
    return round((psutil.Process().memory_info().rss - before) / 1e6, 1)


def time_planning() -> tuple[list[Measurement], dict[str, float]]:
    """Time compiling the plan of the 7B run, and seeking random positions in it."""
    cfg = run_config("7b").data
    sizes = {name: int(6e12) for name in cfg.sources}
    compile_seconds, compile_runs = median_seconds(
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
    peak_mb = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    seek_seconds, seek_runs = median_seconds(seek, CPU, 1.0)
    rows = [
        Measurement(
            "compile the plan of 7b",
            f"{plan.tokens / 1e12:.1f}T tokens",
            "ours",
            compile_seconds,
            compile_runs,
        ),
        Measurement(
            "seek a position", f"{plan.tokens / 1e12:.1f}T tokens", "ours", seek_seconds, seek_runs
        ),
    ]
    return rows, {"plan, peak memory in MB": round(peak_mb, 2)}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes, to try the benchmark")
    parser.add_argument("--no-record", action="store_true", help="do not write benchmarks/results")
    arguments = parser.parse_args()
    small = arguments.small
    results = [
        time_reading(2**23 if small else 2**26, 0.2 if small else 3.0),
        time_tokenizing(60 if small else 10**6),
        time_planning(),
    ]
    rows = add_ratios([row for measurements, _ in results for row in measurements], "ours")
    notes = {name: value for _, figures in results for name, value in figures.items()}
    print_table(rows, "data, one thread, page cache")
    for name, value in notes.items():
        print(f"{name}: {value:g}")
    if not arguments.no_record:
        print(write_results(rows, "data", "CPU, one thread", {}, notes))


if __name__ == "__main__":
    main()
