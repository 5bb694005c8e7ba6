"""Leaderboards: our adapter against the harness's own, on local tasks; scores, tables and
errors.
"""

import json
import math
import re
import shutil
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
from data.stream.manifests import tokenizer_path
from data.tokenizer import EOS
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig, Suite, SuiteRow
from eval.export import export
from eval.leaderboard.harness import FalconMambaLM
from eval.leaderboard.suite import other_checkpoints, run_suite, score_row, score_table
from eval.model_source import find_checkpoint, find_model, load_model
from eval.run import expand_checkpoint
from tests.commands import python
from tests.compose import run_config
from tests.eval.test_export_layout import hf_folder
from tests.tiny import TINY, model_of

LAUNCHER = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# of the harness's tasks
HOMES = ("arc", "hellaswag", "mmlu", "winogrande", "truthfulqa", "gsm8k", "leaderboard")
WORDS = ("def f3(x):", "return x + 7", "x = 4", "return", "    return x", "def")


@pytest.fixture(autouse=True)
def _no_launcher(config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """deepspeed leaves variables of a launcher behind, which accelerate would believe."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def suite_of(folder: Path | None, *names: str) -> Suite:
    known = {
        "local_choice": SuiteRow(
            "choice", "local_choice", 2, ["acc_norm,none", "acc,none"], 0.25, {}, True
        ),
        "local_text": SuiteRow("text", "local_text", 0, ["bits_per_byte,none"], 0.0, {}, True),
        "local_answer": SuiteRow("answer", "local_answer", 0, ["exact_match,none"], 0.0, {}, True),
        "local_math": SuiteRow("math", "local_math", 4, ["exact_match,none"], 0.0, {}, True),
        "absent": SuiteRow("absent", "no_such_task", 0, ["acc,none"], 0.0, {}, True),
        "arc": SuiteRow("ARC", "arc_challenge", 25, ["acc_norm,none"], 0.0, {}, True),
    }
    rows = [known[name] for name in names]
    return Suite(
        "local", 200, str(folder) if folder else None, None, rows, {"Rival-7B": [10.0] * len(rows)}
    )


@pytest.fixture(scope="module")
def exported(config: EvaluationConfig) -> Path:
    export(config)
    return config.run.files.hf


@pytest.fixture(scope="module")
def ours(config: EvaluationConfig) -> FalconMambaLM:
    model = load_model(config, find_checkpoint(config))
    return FalconMambaLM(model, load_tokenizer(tokenizer_path(config.data)), 40, 100)


@pytest.fixture(scope="module")
def theirs(exported: Path) -> HFLM:
    with pytest.MonkeyPatch.context() as patch:
        for name in LAUNCHER:
            patch.delenv(name, raising=False)
        return HFLM(
            str(exported),
            max_length=40,
            batch_size=3,
            device="cpu",
            dtype="float32",
            prefix_token_id=EOS,
            logits_cache=False,
        )


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, arguments_, number) for number, arguments_ in enumerate(arguments)]


def test_loglikelihoods_are_the_harness_own(ours: FalconMambaLM, theirs: HFLM) -> None:
    """Empty contexts, trailing spaces, choices of one token on one context, prompts that are cut on
    the left.
    """
    pairs = [("", word) for word in WORDS] + [(a, " " + b) for a in WORDS for b in WORDS if a != b]
    pairs += [
        ("def f ", "x"),
        ("x" * 300, " y"),
        ("x" * 300, "y" * 38),
        *[("choose", letter) for letter in "ABCD"],
    ]
    asked = requests("loglikelihood", *pairs)
    mine, expected = (
        ours.loglikelihood(asked, disable_tqdm=True),
        theirs.loglikelihood(asked, disable_tqdm=True),
    )
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in expected]
    torch.testing.assert_close(
        *[torch.tensor([s for s, _ in x]) for x in (mine, expected)], rtol=1e-4, atol=1e-4
    )


def test_rolling_windows_are_the_harness_own(ours: FalconMambaLM, theirs: HFLM) -> None:
    """HFLM without its logits cache: with it, equal windows of a text that repeats are scored at
    wrong places.
    """
    asked = requests(
        "loglikelihood_rolling", *[(word * repeat,) for word in WORDS for repeat in (1, 30)]
    )
    mine, expected = (lm.loglikelihood_rolling(asked, disable_tqdm=True) for lm in (ours, theirs))
    torch.testing.assert_close(torch.tensor(mine), torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_generation_is_the_harness_own(ours: FalconMambaLM, theirs: HFLM) -> None:
    greedy = {"until": ["\n", "zz"], "max_gen_toks": 9, "do_sample": False}
    other = {"until": [], "max_gen_toks": 5, "do_sample": False}
    asked = requests(
        "generate_until",
        *[(word, greedy) for word in WORDS],
        *[(word * 20, other) for word in WORDS],
    )
    assert ours.generate_until(asked, disable_tqdm=True) == theirs.generate_until(
        asked, disable_tqdm=True
    )


def test_a_whole_suite_gives_the_same_scores_from_both(
    config: EvaluationConfig, exported: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    suite = suite_of(tasks, "local_choice", "local_text", "local_answer")
    with_suite = replace(config, leaderboard=replace(config.leaderboard, suite=suite))
    run_suite(with_suite)
    run_suite(replace(with_suite, run=replace(with_suite.run, checkpoint=str(exported))))
    printed = capsys.readouterr().out
    step = find_checkpoint(config).name
    files = [config.run.folder / "scores" / f"local-{name}.json" for name in (step, "hf")]
    mine, expected = (json.loads(file.read_text())["rows"] for file in files)
    assert set(mine) == {"choice", "text", "answer"} and mine["choice"]["stderr"] > 0
    for label, result in mine.items():
        assert result["score"] == pytest.approx(expected[label]["score"], rel=1e-5), label
        assert result["parts"][f"local_{label}"]["documents"] == 12
    # another checkpoint of the run stands beside it: before and after the decay
    assert other_checkpoints(suite, files[1]) == {
        f"{step}\n0 tokens": [mine[row.label]["score"] for row in suite.rows]
    }
    assert mine["text"]["score"] > 100  # bits per byte, times 100: an untrained model
    assert "Rival-7B" in printed and f"{mine['choice']['score'] - 10:+.2f}" in printed
    run_suite(with_suite)
    assert "shots" not in capsys.readouterr().out  # stored rows are not run again


@pytest.mark.parametrize(
    ("form", "correct"), [(r"\frac{{{n}}}{{2}}", 100.0), ("{half}", 100.0), ("7", 0.0)]
)
def test_mathematics_is_checked_by_value(
    config: EvaluationConfig,
    tasks: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    correct: float,
) -> None:
    """The MATH row in this very environment, hydra's antlr4 included, with a model that answers as
    it is told.
    """
    asked: list[str] = []

    def answer(
        self: FalconMambaLM, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        numbers = [
            int(re.findall(r"Add 0 to (\d+)/2", request.args[0])[-1]) for request in requests
        ]
        texts = [form.format(n=n, half=n / 2) for n in numbers]
        return [
            f" Final Answer: The final answer is ${text}$. I hope it is correct." for text in texts
        ]

    monkeypatch.setattr(FalconMambaLM, "generate_until", answer)
    suite = replace(suite_of(tasks, "local_math"), name=f"math{len(form)}")
    run_suite(replace(config, leaderboard=replace(config.leaderboard, suite=suite)))
    stored = config.run.folder / "scores" / f"{suite.name}-{find_checkpoint(config).name}.json"
    result = json.loads(stored.read_text())["rows"]["math"]
    # of level 5
    assert result["score"] == correct and result["parts"]["local_math"]["documents"] == 4
    assert all(prompt.count("Problem:") == 5 for prompt in asked), "four examples and the question"


def test_a_metric_that_would_be_wrong_here_is_refused() -> None:
    with pytest.raises(ValueError, match="use exact_match"):
        SuiteRow("MATH", "leaderboard_math_hard", 4, ["exact_match_original,none"], 0.0, {}, True)


def test_another_export_in_the_same_place_is_another_subject(
    config: EvaluationConfig, tmp_path: Path
) -> None:
    """Files of equal names and sizes, other weights: no stored row is taken for theirs."""
    identities = []
    for seed in (0, 1):
        folder = tmp_path / "hf"
        shutil.rmtree(folder, ignore_errors=True)
        hf_folder(folder, model_of(TINY, seed=seed))
        here = replace(config, run=replace(config.run, checkpoint=str(folder)))
        identities.append(find_model(here).provenance)
    assert identities[0]["folder"] == identities[1]["folder"] and identities[0] != identities[1]


def test_missing_tasks_are_named_and_the_rest_is_scored(
    config: EvaluationConfig,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = replace(suite_of(tasks, "absent", "arc", "local_answer"), name="partly")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(InputError) as caught:
        run_suite(replace(config, leaderboard=replace(config.leaderboard, suite=suite)))
    message = str(caught.value)
    assert "2 of 3 rows" in message and "no_such_task" in message and "arc_challenge" in message
    assert "\n" not in message and "HF_HOME" in message
    assert "answer" in capsys.readouterr().out


def test_scores_are_rescaled_as_the_leaderboard_does() -> None:
    def leaf(value: float, error: float | str, documents: int) -> dict[str, Any]:
        return {"acc,none": value, "acc_stderr,none": error, "documents": documents}

    group = {"a": leaf(0.7, 0.03, 100), "b": leaf(0.4, 0.04, 300), "c": leaf(0.1, 0.02, 50)}
    # https://huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization: MuSR's example is
    # 0.7, 0.4, 0.6
    row = SuiteRow("x", "x", 0, ["acc,none"], 0.0, {"a": 0.5, "b": 0.2, "c": 1 / 3}, False)
    result = score_row(row, group)
    assert result["score"] == pytest.approx((40 + 25 + 0) / 3)
    assert result["stderr"] == pytest.approx(100 * math.sqrt((0.06) ** 2 + 0.05**2 + 0.03**2) / 3)
    gpqa = score_row(
        SuiteRow("x", "x", 0, ["acc,none"], 0.25, {}, True), {"a": leaf(0.6, 0.02, 100)}
    )
    assert gpqa["score"] == pytest.approx(46.67, abs=0.005) and gpqa["stderr"] == pytest.approx(
        100 * 0.02 / 0.75
    )
    by_size = score_row(SuiteRow("x", "x", 0, ["acc,none"], 0.0, {}, True), group)
    assert by_size["score"] == pytest.approx(100 * (0.7 * 100 + 0.4 * 300 + 0.1 * 50) / 450)
    assert score_row(row, {"a": leaf(0.7, "N/A", 10)})["stderr"] is None
    two = SuiteRow("x", "x", 0, ["acc,none", "loose,none"], 0.0, {}, True)
    assert score_row(two, {"a": {**leaf(0.7, 0.03, 9), "loose,none": 0.5}})[
        "score"
    ] == pytest.approx(60)


@pytest.mark.parametrize(("name", "best", "wanted"), [("v1", 64.09, 6), ("v2", 15.04, 6)])
def test_the_leaderboards(name: str, best: float, wanted: int) -> None:
    """Averages recomputed from the stored scores are the published ones; tasks exist; BBH's floors
    are its choices'.
    """
    suite = run_config("7b", f"suite=leaderboard_{name}").leaderboard.suite
    assert suite is not None and suite.max_length_tokens == 8192 and len(suite.rows) == wanted
    mean = sum(suite.published["FalconMamba-7B"]) / len(suite.rows)
    assert mean == pytest.approx(best, abs=0.006)
    rows = {row.label: {"score": 50.0, "stderr": 1.0} for row in suite.rows}
    grid = score_table(suite, "ours", rows)
    assert grid.row_count == 1 + len(suite.published)
    assert list(grid.columns[-1].cells)[0] == f"50.00\n+-{1 / math.sqrt(wanted):.2f}"
    assert list(grid.columns[-1].cells)[1] == f"{mean:.2f}\n{50 - mean:+.2f}"
    folder = Path(lm_eval.__file__).parent / "tasks"
    names = "\n".join(
        path.read_text()
        for path in folder.glob("*/**/*.y*ml")
        if path.parts[len(folder.parts)] in HOMES
    )
    assert all(re.search(rf"^(task|group): {row.task}$", names, re.M) for row in suite.rows)


def test_floors_of_bbh_are_those_of_its_choices() -> None:
    suite = run_config("7b", "suite=leaderboard_v2").leaderboard.suite
    assert suite is not None
    floors = next(row.floors for row in suite.rows if row.label == "BBH")
    folder = Path(lm_eval.__file__).parent / "tasks" / "leaderboard" / "bbh_mc"
    seen = {}
    for path in folder.glob("[a-z]*.yaml"):
        body = yaml.safe_load(re.sub(r"!function.*", "x", path.read_text()))
        seen[body["task"]] = 1 / len(body["doc_to_choice"])
    assert floors == pytest.approx(seen, rel=1e-6) and len(floors) == 24


def test_the_short_words_of_the_command_line() -> None:
    assert expand_checkpoint(["suite=leaderboard_v1", "+experiment=demo"]) == [
        "suite=leaderboard_v1",
        "+experiment=demo",
    ]
    given = expand_checkpoint(["checkpoint=/runs/x/checkpoints/step-00000009"])
    assert given == [
        "run.name='x'",
        "run.dir='/runs/x'",
        "run.checkpoint=/runs/x/checkpoints/step-00000009",
    ]
    assert expand_checkpoint(["checkpoint=/runs/x/hf", "--cfg", "job"]) == [
        "run.name='x'",
        "run.dir='/runs/x'",
        "run.checkpoint=/runs/x/hf",
        "--cfg",
        "job",
    ]
    assert expand_checkpoint(["checkpoint=/a/b", "+experiment=demo"]) == [
        "run.checkpoint=/a/b",
        "+experiment=demo",
    ]


def test_two_ranks_print_one_table_with_the_same_scores(
    config: EvaluationConfig, tasks: Path
) -> None:  # fmt: skip
    """The command, data-parallel over gloo, on a step folder without an experiment."""
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
        "+leaderboard.suite.published={Rival: [30.0]}",
        "eval.seq_len=64",
    ]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*launcher, "eval/run.py", f"checkpoint={folder}", "suite=leaderboard_v1", *settings]
    done = python(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Rival") == 1
    two = json.loads((config.run.folder / "scores" / f"two-{folder.name}.json").read_text())[
        "rows"
    ]["choice"]
    suite = suite_of(tasks, "local_choice")
    row = SuiteRow("choice", "local_choice", 2, ["acc_norm,none"], 0.0, {}, True)
    run_suite(
        replace(
            config,
            leaderboard=replace(config.leaderboard, suite=replace(suite, name="one", rows=[row])),
        )
    )
    assert (
        two
        == json.loads((config.run.folder / "scores" / f"one-{folder.name}.json").read_text())[
            "rows"
        ]["choice"]
    )
