"""Leaderboards on local tasks: our adapter against HFLM; scores, tables and errors."""

import json
import math
import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from core.errors import InputError
from core.log import init_logger
from data.stream.manifests import tokenizer_path
from data.tokenizer import EOS
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig, Suite, SuiteRow
from eval.export import export
from eval.leaderboard import hub
from eval.leaderboard.harness import FalconMambaLM
from eval.leaderboard.suite import other_checkpoints, run_suite, score_row, score_table
from eval.model_source import find_checkpoint, find_model, load_model
from eval.short_keys import expand_short_keys
from tests.commands import python
from tests.compose import run_config
from tests.eval.test_export_layout import hf_folder
from tests.tiny import TINY, model_of

# folders of the harness's tasks
TASK_FOLDERS = ("arc", "hellaswag", "mmlu", "winogrande", "truthfulqa", "gsm8k", "leaderboard")
WORDS = ("def f3(x):", "return x + 7", "x = 4", "return", "    return x", "def")


def make_suite(folder: Path | None, *names: str) -> Suite:
    known_rows = {
        "local_choice": SuiteRow(
            "choice", "local_choice", 2, ["acc_norm,none", "acc,none"], 0.25, {}, True
        ),
        "local_text": SuiteRow("text", "local_text", 0, ["bits_per_byte,none"], 0.0, {}, True),
        "local_answer": SuiteRow("answer", "local_answer", 0, ["exact_match,none"], 0.0, {}, True),
        "local_math": SuiteRow("math", "local_math", 4, ["exact_match,none"], 0.0, {}, True),
        "absent": SuiteRow("absent", "no_such_task", 0, ["acc,none"], 0.0, {}, True),
        "arc": SuiteRow("ARC", "arc_challenge", 25, ["acc_norm,none"], 0.0, {}, True),
    }
    rows = [known_rows[name] for name in names]
    return Suite(
        "local", 200, str(folder) if folder else None, None, rows, {"Other-7B": [10.0] * len(rows)}
    )


@pytest.fixture(scope="module")
def exported(config: EvaluationConfig) -> Path:
    export(config)
    return config.run.files.hf


@pytest.fixture(scope="module")
def falcon_lm(config: EvaluationConfig) -> FalconMambaLM:
    model = load_model(find_checkpoint(config))
    return FalconMambaLM(model, load_tokenizer(tokenizer_path(config.data)), EOS, 40, 100)


@pytest.fixture(scope="module")
def hflm(exported: Path) -> HFLM:
    return HFLM(
        str(exported),
        max_length=40,
        batch_size=3,
        device="cpu",
        dtype="float32",
        prefix_token_id=EOS,
        logits_cache=False,
    )


def make_requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, request, index) for index, request in enumerate(arguments)]


def test_loglikelihoods_equal_hflm(falcon_lm: FalconMambaLM, hflm: HFLM) -> None:
    """Empty contexts, trailing spaces, one-token choices and prompts truncated on the left."""
    pairs = [("", word) for word in WORDS] + [(a, " " + b) for a in WORDS for b in WORDS if a != b]
    pairs += [("def f ", "x"), ("x" * 300, " y"), ("x" * 300, "y" * 38)]
    pairs += [("choose", letter) for letter in "ABCD"]
    requests = make_requests("loglikelihood", *pairs)
    results = falcon_lm.loglikelihood(requests, disable_tqdm=True)
    expected = hflm.loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in results] == [greedy for _, greedy in expected]
    scores, expected_scores = (torch.tensor([s for s, _ in x]) for x in (results, expected))
    torch.testing.assert_close(scores, expected_scores, rtol=1e-4, atol=1e-4)


def test_rolling_loglikelihoods_equal_hflm(falcon_lm: FalconMambaLM, hflm: HFLM) -> None:
    """HFLM runs without its logits cache, which scores repeated windows at wrong positions."""
    requests = make_requests(
        "loglikelihood_rolling", *[(word * repeat,) for word in WORDS for repeat in (1, 30)]
    )
    scores = torch.tensor(falcon_lm.loglikelihood_rolling(requests, disable_tqdm=True))
    expected = torch.tensor(hflm.loglikelihood_rolling(requests, disable_tqdm=True))
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_generation_equals_hflm(falcon_lm: FalconMambaLM, hflm: HFLM) -> None:
    with_stops = {"until": ["\n", "zz"], "max_gen_toks": 9, "do_sample": False}
    without_stops = {"until": [], "max_gen_toks": 5, "do_sample": False}
    requests = make_requests(
        "generate_until",
        *[(word, with_stops) for word in WORDS],
        *[(word * 20, without_stops) for word in WORDS],
    )
    texts = falcon_lm.generate_until(requests, disable_tqdm=True)
    assert texts == hflm.generate_until(requests, disable_tqdm=True)


def test_checkpoint_and_export_have_the_same_suite_scores(
    config: EvaluationConfig, exported: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    suite = make_suite(tasks, "local_choice", "local_text", "local_answer")
    with_suite = replace(config, leaderboard=replace(config.leaderboard, suite=suite))
    run_suite(with_suite)
    run_suite(replace(with_suite, run=replace(with_suite.run, checkpoint=str(exported))))
    printed = capsys.readouterr().out
    step = find_checkpoint(config).name
    files = [config.run.folder / "scores" / f"local-{name}.json" for name in (step, "hf")]
    rows, expected = (json.loads(file.read_text())["rows"] for file in files)
    assert set(rows) == {"choice", "text", "answer"} and rows["choice"]["stderr"] > 0
    for label, result in rows.items():
        assert result["score"] == pytest.approx(expected[label]["score"], rel=1e-5), label
        assert result["parts"][f"local_{label}"]["documents"] == 12
    # the table also shows the run's other checkpoint
    assert other_checkpoints(suite, files[1]) == {
        f"{step}\n0 tokens": [rows[row.label]["score"] for row in suite.rows]
    }
    assert rows["text"]["score"] > 100  # bits per byte times 100 of an untrained model
    assert "Other-7B" in printed and f"{rows['choice']['score'] - 10:+.2f}" in printed
    run_suite(with_suite)
    assert "shots" not in capsys.readouterr().out  # stored rows are not run again


@pytest.mark.parametrize(
    ("form", "correct"), [(r"\frac{{{n}}}{{2}}", 100.0), ("{half}", 100.0), ("7", 0.0)]
)
def test_math_answers_are_compared_by_value(
    config: EvaluationConfig,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    correct: float,
) -> None:
    """The MATH row with a fixed answer, in this environment with hydra's version of antlr4."""
    prompts: list[str] = []

    def answer(
        self: FalconMambaLM, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        numbers = [
            int(re.findall(r"Add 0 to (\d+)/2", request.args[0])[-1]) for request in requests
        ]
        texts = [form.format(n=n, half=n / 2) for n in numbers]
        return [
            f" Final Answer: The final answer is ${text}$. I hope it is correct." for text in texts
        ]

    monkeypatch.setattr(FalconMambaLM, "generate_until", answer)
    suite = replace(make_suite(tasks, "local_math"), name=f"math{len(form)}")
    run_suite(replace(config, leaderboard=replace(config.leaderboard, suite=suite)))
    stored = config.run.folder / "scores" / f"{suite.name}-{find_checkpoint(config).name}.json"
    result = json.loads(stored.read_text())["rows"]["math"]
    # only problems of level 5
    assert result["score"] == correct and result["parts"]["local_math"]["documents"] == 4
    assert all(prompt.count("Problem:") == 5 for prompt in prompts), (
        "four examples and the question"
    )


def test_exact_match_original_is_refused() -> None:
    with pytest.raises(ValueError, match="use exact_match"):
        SuiteRow("MATH", "leaderboard_math_hard", 4, ["exact_match_original,none"], 0.0, {}, True)


def test_provenance_changes_with_the_weights(config: EvaluationConfig, tmp_path: Path) -> None:
    """Stored rows are not reused for other weights in files of equal names and sizes."""
    provenances = []
    for seed in (0, 1):
        folder = tmp_path / "hf"
        shutil.rmtree(folder, ignore_errors=True)
        hf_folder(folder, model_of(TINY, seed=seed))
        with_folder = replace(config, run=replace(config.run, checkpoint=str(folder)))
        provenances.append(find_model(with_folder).provenance)
    assert provenances[0]["folder"] == provenances[1]["folder"]
    assert provenances[0] != provenances[1]


def test_missing_tasks_are_listed_and_other_rows_are_scored(
    config: EvaluationConfig,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = replace(make_suite(tasks, "absent", "arc", "local_answer"), name="partly")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    init_logger()
    with pytest.raises(InputError) as caught:
        run_suite(replace(config, leaderboard=replace(config.leaderboard, suite=suite)))
    message = str(caught.value)
    assert "2 of 3 rows" in message and "(absent, ARC)" in message
    assert "\n" not in message and "HF_HOME" in message
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if "is not scored" in line]
    assert ["no_such_task" in lines[0], "arc_challenge" in lines[1], len(lines)] == [True, True, 2]
    assert all("HF_HOME" in line for line in lines) and "answer" in out


def test_a_hub_without_an_answer_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    init_logger()
    for name in (*hub.OFFLINE, "HF_ENDPOINT", "http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "")
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts and says nothing
        silent = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "within 0.1 s" in (hub.unreachable_reason(silent, 0.1) or "")
    monkeypatch.setenv("HF_ENDPOINT", silent)  # closed
    hub.use_cache_without_hub()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    line = capsys.readouterr().out
    assert "refused" in line and line.count("\n") == 1
    hub.use_cache_without_hub()
    assert capsys.readouterr().out == ""


def test_scores_are_rescaled_as_on_the_leaderboard() -> None:
    def subtask(value: float, error: float | str, documents: int) -> dict[str, Any]:
        return {"acc,none": value, "acc_stderr,none": error, "documents": documents}

    group = {
        "a": subtask(0.7, 0.03, 100),
        "b": subtask(0.4, 0.04, 300),
        "c": subtask(0.1, 0.02, 50),
    }
    # https://huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization: MuSR's example is
    # 0.7, 0.4, 0.6
    row = SuiteRow("x", "x", 0, ["acc,none"], 0.0, {"a": 0.5, "b": 0.2, "c": 1 / 3}, False)
    result = score_row(row, group)
    assert result["score"] == pytest.approx((40 + 25 + 0) / 3)
    assert result["stderr"] == pytest.approx(100 * math.sqrt((0.06) ** 2 + 0.05**2 + 0.03**2) / 3)
    gpqa = score_row(
        SuiteRow("x", "x", 0, ["acc,none"], 0.25, {}, True), {"a": subtask(0.6, 0.02, 100)}
    )
    assert gpqa["score"] == pytest.approx(46.67, abs=0.005) and gpqa["stderr"] == pytest.approx(
        100 * 0.02 / 0.75
    )
    by_size = score_row(SuiteRow("x", "x", 0, ["acc,none"], 0.0, {}, True), group)
    assert by_size["score"] == pytest.approx(100 * (0.7 * 100 + 0.4 * 300 + 0.1 * 50) / 450)
    assert score_row(row, {"a": subtask(0.7, "N/A", 10)})["stderr"] is None
    two_metrics = SuiteRow("x", "x", 0, ["acc,none", "loose,none"], 0.0, {}, True)
    raw = {"a": {**subtask(0.7, 0.03, 9), "loose,none": 0.5}}
    assert score_row(two_metrics, raw)["score"] == pytest.approx(60)


@pytest.mark.parametrize(("name", "published"), [("v1", 64.09), ("v2", 15.04)])
def test_the_leaderboards(name: str, published: float) -> None:
    """Averages of the published scores equal the published averages, and all tasks exist."""
    suite = run_config("7b", f"suite=leaderboard_{name}").leaderboard.suite
    assert suite is not None and suite.max_length_tokens == 8192 and len(suite.rows) == 6
    mean = sum(suite.published["FalconMamba-7B"]) / len(suite.rows)
    assert mean == pytest.approx(published, abs=0.006)
    rows = {row.label: {"score": 50.0, "stderr": 1.0} for row in suite.rows}
    scores = score_table(suite, "ours", rows)
    assert scores.row_count == 1 + len(suite.published)
    assert list(scores.columns[-1].cells)[0] == f"50.00\n+-{1 / math.sqrt(6):.2f}"
    assert list(scores.columns[-1].cells)[1] == f"{mean:.2f}\n{50 - mean:+.2f}"
    folder = Path(lm_eval.__file__).parent / "tasks"
    names = "\n".join(
        path.read_text()
        for path in folder.glob("*/**/*.y*ml")
        if path.parts[len(folder.parts)] in TASK_FOLDERS
    )
    assert all(re.search(rf"^(task|group): {row.task}$", names, re.M) for row in suite.rows)


def test_bbh_floors_equal_guessing() -> None:
    suite = run_config("7b", "suite=leaderboard_v2").leaderboard.suite
    assert suite is not None
    floors = next(row.floors for row in suite.rows if row.label == "BBH")
    folder = Path(lm_eval.__file__).parent / "tasks" / "leaderboard" / "bbh_mc"
    expected = {}
    for path in folder.glob("[a-z]*.yaml"):
        body = yaml.safe_load(re.sub(r"!function.*", "x", path.read_text()))
        expected[body["task"]] = 1 / len(body["doc_to_choice"])
    assert floors == pytest.approx(expected, rel=1e-6) and len(floors) == 24


def test_checkpoint_argument_is_expanded() -> None:
    assert expand_short_keys(["suite=leaderboard_v1", "+experiment=demo"]) == [
        "suite=leaderboard_v1",
        "+experiment=demo",
    ]
    expanded = expand_short_keys(["checkpoint=/runs/x/checkpoints/step-00000009"])
    assert expanded == [
        "run.name='x'",
        "run.dir='/runs/x'",
        "run.checkpoint='/runs/x/checkpoints/step-00000009'",
    ]
    assert expand_short_keys(["checkpoint=/runs/x/hf", "--cfg", "job"]) == [
        "run.name='x'",
        "run.dir='/runs/x'",
        "run.checkpoint='/runs/x/hf'",
        "--cfg",
        "job",
    ]
    assert expand_short_keys(["checkpoint=/x"])[0] == "run.name='root'"
    assert expand_short_keys(["+experiment=demo", "prompt=f(x, ${y})='"]) == [
        "+experiment=demo",
        r"generate.prompt='f(x, \${y})=\''",
    ]
    assert expand_short_keys(["checkpoint=/a/b", "+experiment=demo"]) == [
        "run.checkpoint='/a/b'",
        "+experiment=demo",
    ]


def test_a_model_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        expand_short_keys(["prompt=x"])
    assert "no model: add checkpoint=FOLDER" in capsys.readouterr().err
    assert expand_short_keys(["--help"]) == ["--help"]


def test_two_ranks_compute_the_scores_of_one(
    config: EvaluationConfig, tasks: Path
) -> None:  # fmt: skip
    """Run the command data-parallel with gloo on a checkpoint, without an experiment."""
    folder = find_checkpoint(config)
    (config.run.folder / "config.yaml").write_text(
        yaml.safe_dump({"data": {"folder": config.data.folder}})
    )
    metrics = "metrics: ['acc_norm,none'], floor: 0, floors: {}, by_size: true"
    rows = f"[{{label: choice, task: local_choice, shots: 2, {metrics}}}]"
    settings = [
        f"leaderboard.suite.include={tasks}",
        f"leaderboard.suite.rows={rows}",
        "leaderboard.suite.name=two",
        "~leaderboard.suite.published",
        "+leaderboard.suite.published={Other: [30.0]}",
        "eval.seq_len=64",
    ]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "eval/run.py", f"checkpoint={folder}", "suite=leaderboard_v1", *settings]
    result = python(*command)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("Other") == 1
    row = SuiteRow("choice", "local_choice", 2, ["acc_norm,none"], 0.0, {}, True)
    suite = replace(make_suite(tasks, "local_choice"), name="one", rows=[row])
    run_suite(replace(config, leaderboard=replace(config.leaderboard, suite=suite)))
    one_rank, two_ranks = (
        json.loads((config.run.folder / "scores" / f"{name}-{folder.name}.json").read_text())
        for name in ("one", "two")
    )
    assert two_ranks["rows"]["choice"] == one_rank["rows"]["choice"]
