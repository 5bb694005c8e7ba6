"""HTML page of runs: panels in a real browser, several runs on a page, no scripts."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from core.old_keys import read_record
from core.run import RunFiles
from tests.commands import ROOT, TIMEOUT_SECONDS, wait_until
from train.metrics.curves import PANELS, actual_mixture, planned_curve, points_by_source
from train.metrics.page import page, planned_mixture, run_names, score_tables
from train.metrics.records import POINTS, curve, read_lines, read_scores


def write_run(folder: Path, loss_offset: float) -> Path:
    """Write 60 steps in two stages with a skipped update, an incident and a checkpoint."""
    folder.mkdir()
    lines = []
    for step in range(1, 61):
        loss = 2 + 3 * math.exp(-step / 20) + loss_offset
        record: dict[str, Any] = {
            "step": step, "tokens": 100 * step, "loss": None if step == 9 else loss, "lr": 1e-3,
            "grad_norm": 1.0 + loss_offset,
            "source_tokens": {"web": 75, "code": 25} if step < 30 else {"web": 40, "code": 60},
            "source_loss": {"web": loss + 0.1, "code": loss - 0.1},
            "skipped": step == 9, "batch": 4 + step // 20,
            "seq_len": 16 if step < 30 else 32, "stage": "short" if step < 30 else "long",
            "tokens_per_second": 50.0 + step, "mfu": 0.2, "memory_gib": 1.0,
            "data_wait_seconds": 0.01, "step_seconds": 2.0,
        }  # fmt: skip
        if step % 20 == 0:
            record["validation"] = {
                name: {"loss": loss, "bits_per_byte": 1.0} for name in ("web", "code")
            }
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    stages = [
        {"name": "short", "mixture": {"web": 3, "code": 1}},
        {"name": "long", "mixture": {"web": 1, "code": 1, "math": 2}},
    ]
    record = {"data": {"stages": stages}, "code": {"commit": "0ffc0de", "dirty": True}}
    (folder / "config.yaml").write_text(json.dumps(record))  # JSON is YAML
    incident = {
        "time": "2026-01-01T00:00:00Z",
        "incident": "crash",
        "text": "<script>alert(1)</script> boom",
    }
    (folder / "incidents.jsonl").write_text(json.dumps(incident) + "\n")
    (folder / "checkpoints" / "step-00000060").mkdir(parents=True)
    manifest = {"files": {"rank-00000.json": {"bytes": 2**30, "sha256": "0" * 64}}}
    (folder / "checkpoints" / "step-00000060" / "manifest.json").write_text(json.dumps(manifest))
    return folder


def browse(path: Path, *options: str) -> str:
    """Open a page in headless Chromium; returns its standard output."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,5200",
        "--hide-scrollbars",
        "--virtual-time-budget=20000",
        f"--user-data-dir={path.parent / 'profile'}",
        *options,
    ]
    command.append(path.as_uri())
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_browser_draws_every_panel(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "one", 0.0), write_run(tmp_path / "two", 0.5)]
    path = page(runs, tmp_path / "report.html")
    picture = tmp_path / "page.png"
    document = browse(path, f"--screenshot={picture}", "--dump-dom")
    panels = [document.index(f'<g id="{name}"') for name in PANELS]
    ends = [*panels[1:], document.index("</svg>")]
    for name, begin, end in zip(PANELS, panels, ends, strict=True):
        for colour in ("#1f77b4", "#ff7f0e"):  # a curve of each run
            assert f"stroke: {colour}" in document[begin:end], name
    assert document.count("0ffc0de, with changes") == 2
    assert "step-00000060" in document and "1 GiB" in document
    pixels = image.imread(picture)[..., :3]
    for colour in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # the colours of both runs
        num_pixels = (abs(pixels * 255 - colour).max(axis=2) < 8).sum()
        assert num_pixels > 2000, (colour, num_pixels)


def test_planned_and_actual_mixture(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", 0.0)
    text = page([folder], tmp_path / "report.html").read_text()
    for row in (
        ("short", "web", "75.00%", "75.00%", "2.17k"),
        ("long", "web", "25.00%", "40.00%", "1.24k"),
        ("long", "math", "50.00%", "0.00%", "0"),
    ):
        assert "".join(f"<td>{cell}</td>" for cell in row) in text
    assert ">web</text>" in text and ">math</text>" not in text  # no tokens: only in the table
    records = read_lines(folder / "metrics.jsonl")
    assert actual_mixture(records)["web"][28:31] == [(2900, 0.75), (3000, 0.4), (3100, 0.4)]
    plan = planned_mixture(read_record(RunFiles(folder).config))
    assert planned_curve(records, plan, "code") == (
        [100, 2900, 2900, 3000, 6000, 6000],
        [0.25, 0.25, None] * 2,
    )
    old_records = [
        {key: value for key, value in record.items() if key != "source_tokens"}
        for record in records
    ]
    assert actual_mixture(old_records) == {}


def test_runs_with_the_same_name_are_named_by_path(tmp_path: Path) -> None:
    folders = [tmp_path / "one" / "demo", tmp_path / "two" / "demo"]
    assert run_names([*folders, folders[0].with_name("other")])[:2] == [
        str(folder) for folder in folders
    ]
    assert run_names([folders[0]]) == ["demo"]
    for folder in folders:
        folder.parent.mkdir()
    text = page(
        [write_run(folder, 0.0) for folder in folders], tmp_path / "report.html"
    ).read_text()
    assert all(f"<h2>{folder}</h2>" in text for folder in folders)


def test_page_has_no_scripts_and_needs_no_network(tmp_path: Path) -> None:
    text = page([write_run(tmp_path / "one", 0.0)], tmp_path / "report.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; boom" in text
    assert "<script" not in text and 'src="http' not in text


def test_scores_that_are_not_finite_are_dashes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", 0.0)
    with RunFiles(run).metrics.open("a") as file:
        scores = {"v1": {"ARC": 50.0, "MATH": None}}
        file.write(json.dumps({"step": 1, "tokens": 10, "scores": scores}) + "\n")
    tables = score_tables(read_scores(RunFiles(run).metrics))
    assert tables["v1"] == (["", "10 tokens"], [("ARC", "50.00"), ("MATH", "-")])


def test_source_names_are_plain_text_in_pictures(tmp_path: Path) -> None:
    """A name with dollar signs is no formula, a name with angle brackets no HTML element."""
    folder = write_run(tmp_path / "one", 0.0)
    lines = (folder / "metrics.jsonl").read_text().replace('"web"', '"$x_{$ <b>"')
    (folder / "metrics.jsonl").write_text(lines)
    text = page([folder], tmp_path / "report.html").read_text()
    assert ">$x_{$ &lt;b&gt;</text>" in text and "<b>" not in text


def test_curves_of_long_runs_are_averaged() -> None:
    points = [(step, float(step % 2)) for step in range(1, 10 * POINTS + 1)]
    x, y = curve(points)
    assert len(x) == POINTS and x[-1] == 10 * POINTS and set(y) == {0.5}
    assert curve([(1, None), (2, 3.0)]) == ([1, 2], [None, 3.0])


def test_summary_and_config_come_first_scores_and_sample_last(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", 0.0)
    row = {"tokens": 1000, "bits_per_byte": 1.5, "unigram_bits_per_byte": 3.0}
    evaluation = {"checkpoint": "step-00000060", "heldout": {"all": row}, "sample": "<i>text"}
    RunFiles(folder).evaluation.write_text(json.dumps(evaluation))
    text = page([folder], tmp_path / "report.html").read_text()
    parts = ("held-out loss", "<summary>config.yaml", "<svg", "<td>50%</td>", "&lt;i&gt;text")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "code 2.149, web 2.149 at 6k tokens" in text or "web 2.149, code 2.149 at 6k" in text
    RunFiles(folder).evaluation.write_text("{")
    assert "held-out text" not in page([folder], tmp_path / "report.html").read_text()


def test_watched_page_reloads_itself_until_no_run_is_running(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", 0.0)
    reload = '<meta http-equiv="refresh" content="1">'
    assert reload in page([folder], tmp_path / "page.html", 1).read_text()
    RunFiles(folder).lock.touch()
    with subprocess.Popen(
        [sys.executable, "train/report.py", folder, "--watch", "1"], cwd=ROOT
    ) as process:
        report = RunFiles(folder).report
        wait_until(lambda: report.exists() and reload in report.read_text(), lambda: "no page")
        RunFiles(folder).lock.unlink()
        assert process.wait(TIMEOUT_SECONDS) == 0
    assert reload not in report.read_text()


def test_losses_of_sources_are_means_within_a_stage() -> None:
    losses = [4.0, None, 2.0, 6.0]
    records = [
        {"tokens": n, "stage": "a" if n < 3 else "b", "source_loss": {"web": loss}}
        for n, loss in enumerate(losses)
    ]
    assert points_by_source("loss", records) == {"web": [(0, 4.0), (1, 4.0), (2, 3.0), (3, 6.0)]}
