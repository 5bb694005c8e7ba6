"""The summary at the end of `make demo`."""

import json
from pathlib import Path

import pytest

from core.errors import InputError
from core.run import RunFiles
from launch.demo_summary import summary
from tests.train.test_report import write_run


def test_summary_says_what_was_learnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run(Path("demo"), 0.0)
    with pytest.raises(InputError, match="no evaluated steps"):
        summary(folder, 60.0)
    row = {"tokens": 1000, "bits_per_byte": 1.5, "unigram_bits_per_byte": 3.0}
    evaluation = {"checkpoint": "step-00000060", "heldout": {"all": row}, "sample": "text"}
    RunFiles(folder).evaluation.write_text(json.dumps(evaluation))
    text = summary(folder, 90.0)
    assert "after 1.5 minutes" in text and "needs 50% fewer" in text
    assert "1.50 bits per byte; 3.00 by the unigram model" in text
    assert f"checkpoint={folder} prompt=" in text and max(map(len, text.splitlines())) <= 120
