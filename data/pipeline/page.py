"""Static HTML page of a data set: mixture over tokens, drop reasons, document lengths, domains.

One file without scripts or external resources, so that it can be mailed or kept with a run.
"""

from collections import Counter
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from typing_extensions import TypedDict

from core.files import make_folder, write_text
from core.records import read_if_present
from core.templates import render
from data.config import DataConfig
from data.pipeline.accounting import StepCounts, ranked_reasons
from data.stream.documents import document_ends, read_clean
from data.stream.loader import compile_plan
from data.stream.manifests import Manifest, source_folder
from data.stream.packing import packing_table, plan_table, stage_tokens

TEMPLATE = Path(__file__).with_name("page.html.jinja")
REPORT = "report.json"
TOP_DOMAINS = 15
COLOURS = (
    "#4c78a8",
    "#f58518",
    "#54a24b",
    "#e45756",
    "#72b7b2",
    "#b279a2",
    "#9d755d",
    "#eeca3b",
    "#bab0ac",
    "#ff9da6",
)


class Report(TypedDict):
    """What is shown of report.json."""

    steps: dict[str, list[StepCounts]]


def lengths(folder: Path, manifest: Manifest) -> dict[int, int]:
    """Number of train documents with 2^k to 2^(k+1) - 1 tokens, by k.

    From the shortest document to the longest; empty without documents.
    """
    counts = np.zeros(32, dtype=np.int64)
    for file in manifest.splits["train"]:
        ends = np.asarray(document_ends(folder, file), dtype=np.int64)
        sizes = np.diff(ends, prepend=0)
        counts += np.bincount(np.log2(np.maximum(sizes, 1)).astype(np.int64), minlength=32)[:32]
    filled = np.flatnonzero(counts)
    return {k: int(counts[k]) for k in range(filled[0], filled[-1] + 1)} if len(filled) else {}


def domains(folder: Path, samples: int) -> list[tuple[str, int]]:
    """Most frequent hosts in about `samples` documents, the first of every file of a source."""
    files = sorted(folder.glob("*.jsonl.gz"))
    hosts: Counter[str] = Counter()
    for path in files:
        for row in islice(read_clean(path), max(1, samples // len(files))):
            if url := row.get("url"):
                hosts[urlsplit(url).netloc] += 1
    return hosts.most_common(TOP_DOMAINS)


def write_page(cfg: DataConfig, manifests: dict[str, Manifest], path: Path, samples: int) -> None:
    """Write the page of a prepared data set."""
    plan = compile_plan(cfg, manifests)
    fix = "run data/prepare.py again"
    report = read_if_present(Path(cfg.folder) / REPORT, Report, fix, extra="ignore")
    source_lengths = []
    for name, manifest in manifests.items():
        counts = lengths(source_folder(cfg, name), manifest)
        average = manifest.tokens("train") / max(1, sum(counts.values()))
        source_lengths.append((name, average, counts))
    hosts = {name: domains(Path(cfg.folder) / "clean" / name, samples) for name in cfg.sources}
    page = render(
        TEMPLATE,
        folder=cfg.folder,
        plan=plan,
        stage_tokens=stage_tokens,
        colours={name: COLOURS[n % len(COLOURS)] for n, name in enumerate(plan.sources)},
        tables="\n".join([*plan_table(plan), "", *packing_table(plan, manifests)]),
        steps={} if report is None else report["steps"],
        ranked_reasons=ranked_reasons,
        lengths=source_lengths,
        samples=samples,
        domains={name: counts for name, counts in hosts.items() if counts},
    )
    make_folder(path.parent)
    write_text(path, page)
