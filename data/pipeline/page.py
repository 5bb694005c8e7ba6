"""A static HTML page about a data set: mixture over tokens, what was dropped and why, lengths,
domains.

It holds text and boxes only: no script, no address is loaded, so that it can be mailed or kept
beside a run.
"""

import gzip
import json
from collections import Counter
from html import escape
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from core.files import write_text
from data.config import DataConfig
from data.pipeline.accounting import Step, ranked
from data.stream.documents import document_ends
from data.stream.loader import compile_plan
from data.stream.manifests import Manifest, source_folder
from data.stream.mixture import Plan
from data.stream.packing import packing, plan_table, stage_tokens

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
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;
margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}
td,th{padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child,.why{text-align:left}.row{display:flex;height:1.6rem;margin:.15rem 0}
.row span{display:block;overflow:hidden;color:#fff;font-size:12px;
line-height:1.6rem;padding-left:.2rem}
.bars{display:flex;align-items:flex-end;height:7rem;gap:2px}
.bars i{display:block;flex:1;background:#4c78a8}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(20rem,1fr));gap:1.5rem}pre{overflow:auto;background:#f6f6f6;
padding:.7rem}small{color:#666}"""


def mixture(plan: Plan) -> str:
    """A bar per stage, as wide as its share of the run is high, cut by source."""
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(plan.sources)}
    parts = []
    for stage in plan.stages:
        read = stage_tokens(plan, stage)
        boxes = "".join(
            "<span "
            f'style="width:{100 * tokens / max(1, stage.tokens):.3f}%;background:{colours[name]}" '
            f'title="{escape(name)}: {tokens:,} tokens">{escape(name)} '
            f"{tokens / max(1, stage.tokens):.1%}</span>"
            for name, tokens in read.items()
            if tokens
        )
        height = 1.4 + 8 * stage.tokens / max(1, plan.tokens)
        parts.append(
            f"<div>{escape(stage.name)} <small>{stage.first_token:,} + {stage.tokens:,} tokens, "
            f"context {stage.seq_len}"
            f'</small><div class="row" style="height:{height:.2f}rem">{boxes}</div></div>'
        )
    return "".join(parts)


def drops(steps: dict[str, list[Step]]) -> str:
    """A row per step and source: in, out, dropped by reason."""
    rows = []
    for source, found in steps.items():
        for place, step in enumerate(found):
            if place and not step.dropped and not step.cut:
                continue
            why = escape(ranked(step.dropped)) + (
                f" (cut: {escape(ranked(step.cut))})" if step.cut else ""
            )
            share = (step.total - step.forwarded) / max(1, step.total)
            rows.append(
                f"<tr><td>{escape(source)}</td><td>{escape(step.name)}</td><td>{step.total:,}</td>"
                f'<td>{step.forwarded:,}</td><td>{share:.1%}</td><td class="why">{why}</td></tr>'
            )
    head = (
        "<tr><th>source</th><th>step</th><th>in</th><th>out</th><th>dropped</th><th "
        "class='why'>reasons</th></tr>"
    )
    return f"<table>{head}{''.join(rows)}</table>"


def lengths(folder: Path, manifest: Manifest) -> str:
    """How many documents have 2^k to 2^(k+1) tokens, over all train shards."""
    counts = np.zeros(32, dtype=np.int64)
    for file in manifest.splits["train"]:
        ends = np.asarray(document_ends(folder, file), dtype=np.int64)
        sizes = np.diff(ends, prepend=0)
        counts += np.bincount(np.log2(np.maximum(sizes, 1)).astype(np.int64), minlength=32)[:32]
    filled = np.flatnonzero(counts)
    low, high = int(filled.min(initial=0)), int(filled.max(initial=0))
    bars = "".join(
        f'<i style="height:{100 * counts[k] / counts.max():.1f}%" title="{2**k:,} to '
        f'{2 ** (k + 1) - 1:,} tokens: {counts[k]:,} documents"></i>'
        for k in range(low, high + 1)
    )
    total = manifest.tokens("train") / max(1, int(counts.sum()))
    return (
        f"<div><b>{escape(manifest.source)}</b> <small>{total:,.0f} tokens on average</small>"
        f'<div class="bars">{bars}</div>'
        f"<small>{2**low:,} to {2 ** (high + 1):,} tokens, doubling</small></div>"
    )


def domains(folder: Path, samples: int) -> list[tuple[str, int]]:
    """The most frequent hosts among the first documents of every file of a source, `samples` in
    all.
    """
    files = sorted(folder.glob("*.jsonl.gz"))
    found: Counter[str] = Counter()
    for path in files:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for _, line in zip(range(max(1, samples // len(files))), lines, strict=False):
                url = json.loads(line).get("url")
                if url:
                    found[urlsplit(url).netloc] += 1
    return found.most_common(TOP_DOMAINS)


def top_domains(cfg: DataConfig, samples: int) -> str:
    """A table per source whose documents have addresses."""
    parts = []
    for name in cfg.sources:
        found = domains(Path(cfg.folder) / "clean" / name, samples)
        if found:
            rows = "".join(f"<tr><td>{escape(host)}</td><td>{n:,}</td></tr>" for host, n in found)
            parts.append(f"<div><b>{escape(name)}</b><table>{rows}</table></div>")
    return (
        f'<div class="grid">{"".join(parts)}</div>'
        if parts
        else "<p>No document has an address.</p>"
    )


def write_page(cfg: DataConfig, manifests: dict[str, Manifest], path: Path, samples: int) -> None:
    """Write the page about a prepared data set."""
    plan = compile_plan(cfg, manifests)
    report = Path(cfg.folder) / REPORT
    record = json.loads(report.read_text(encoding="utf-8"))["steps"] if report.is_file() else {}
    steps = {name: [Step(**step) for step in found] for name, found in record.items()}
    each = "".join(
        lengths(source_folder(cfg, name), manifest) for name, manifest in manifests.items()
    )
    tables = "\n".join(
        escape("\n".join(lines)) for lines in (plan_table(plan), ["", *packing(plan, manifests)])
    )
    body = (
        f"<h1>Data in {escape(cfg.folder)}</h1><p>{plan.tokens:,} tokens in "
        f"{len(plan.stages)} stages, plan <code>{plan.hash[:16]}</code></p>"
        "<h2>Mixture over tokens</h2>"
        f"{mixture(plan)}<pre>{tables}</pre>"
        f"<h2>What was dropped, step by step</h2>{drops(steps)}"
        f'<h2>Lengths of documents in tokens</h2><div class="grid">{each}</div>'
        f"<h2>Top domains</h2><p><small>of {samples} documents a source</small></p>"
        f"{top_domains(cfg, samples)}"
    )
    head = (
        '<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>Data</title><style>{STYLE}</style>'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, head + body + "</html>\n")
