"""Fixtures: a run with a small checkpoint and a real tokenizer, and local harness tasks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml

from core.run import Run
from data.config import DataConfig
from data.stream.manifests import tokenizer_path
from data.tokenizer import train as train_tokenizer
from eval.config import EvalConfig, EvaluationConfig
from tests.checkpoints import save_checkpoint
from tests.compose import typed
from tests.corpus import corpus_config, make_corpus
from tests.tiny import TINY

MODEL = replace(TINY, vocab_size=288)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    """A committed checkpoint of an untrained model, generated shards and a byte-level tokenizer."""
    root = tmp_path_factory.mktemp("eval")
    data: DataConfig = corpus_config(root / "data", vocab_size=288)
    tokenizer_path(data).parent.mkdir(parents=True)
    text = [f"def f{i}(x):\n    return x + {i}\n" for i in range(50)]
    train_tokenizer(iter(text), 288, tokenizer_path(data).parent)
    make_corpus(root / "data", vocab_size=280)
    run = Run("small", str(root / "run"), 0)
    save_checkpoint(run, MODEL)
    demo = typed(EvaluationConfig, "demo")
    return replace(
        demo,
        run=run,
        model=MODEL,
        data=data,
        eval=EvalConfig(seq_len=16, batch_sequences=3, max_tokens=500),
        generate=replace(demo.generate, prompt="def f", new_tokens=8),
        leaderboard=replace(demo.leaderboard, batch_tokens=48),
    )


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Local tasks: multiple choice, perplexity, generation, and MATH by the harness's template."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "q": f"def f{i}(x):\n    return",
            "choices": [f" x + {i}", " y", " x * x * x"],
            "gold": i % 3,
            "text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i),
            "answer": f" x + {i}",
            "level": f"Level {5 if i < 4 else 4}",
            "problem": f"Add 0 to {i}/2",
            "solution": f"It is $\\boxed{{\\frac{{{i}}}{{2}}}}$.",
        }
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"data_files": {"test": f"{folder}/rows.jsonl"}, "cache_dir": str(folder)}
    common = {
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "fewshot_split": "test",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    tasks: dict[str, dict[str, Any]] = {
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": m, **mean} for m in ("acc", "acc_norm")],
        },
        "local_text": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "local_answer": {
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match", **mean}],
        },
    }
    template = Path(lm_eval.__file__).parent / "tasks" / "leaderboard" / "math" / "_template_yaml"
    tasks["local_math"] = {
        "include": str(template), "fewshot_split": None,
        "generation_kwargs": {"until": ["Problem:"], "max_gen_toks": 8, "do_sample": False},
    }  # fmt: skip
    for name, body in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **body}))
    return folder
