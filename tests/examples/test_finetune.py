"""The example of fine-tuning, on a small export."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.finetune import add_adapter, finetune, read_arguments, trained_share, training_config
from model.hf import accelerate
from tests.commands import ROOT

EXPORT = ROOT / "tests" / "fixtures" / "runs" / "zero1-dp2" / "hf"


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A command line: 12 short documents, more of which fit into a sequence."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    data = tmp_path / "data.jsonl"
    texts = [f"{n} and {n + 1} are {2 * n + 1}. " * 2 for n in range(12)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return [str(EXPORT), str(data), "--output", str(tmp_path / "out"), "--length", "128"]


def test_training_lowers_the_loss_and_the_merged_model_has_it(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    options = ["--steps", "12", "--batch", "2", "--rate", "2e-2", "--merge"]
    log = finetune(read_arguments([*words, *options]))
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.1
    assert "LoRA on dt_proj, in_proj, x_proj: " in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    before = AutoModelForCausalLM.from_pretrained(EXPORT)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert list(merged.state_dict()) == list(before.state_dict())
    ids = torch.arange(20)[None]
    assert not torch.allclose(merged(ids).logits, before(ids).logits, atol=1e-3)


def test_documents_of_a_packed_batch_do_not_read_each_other(words: list[str]) -> None:
    """The loss of what TRL's collator gives is the mean over documents read alone."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    arguments = read_arguments([*words, "--batch", "2"])
    model = accelerate(AutoModelForCausalLM.from_pretrained(EXPORT))
    trainer = SFTTrainer(
        model=model,
        args=training_config(arguments),
        train_dataset=Dataset.from_json(str(arguments.data)),
        processing_class=AutoTokenizer.from_pretrained(EXPORT),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    tokens, positions = batch["input_ids"][0], batch["position_ids"][0]
    starts = (positions == 0).nonzero().flatten().tolist()
    documents = torch.tensor_split(tokens, starts[1:])
    assert len(documents) > 4 and batch["input_ids"].shape[0] == 1
    with torch.no_grad():
        packed = trainer.compute_loss(model, dict(batch))
        alone = [model(input_ids=d[None], labels=d[None]).loss * (len(d) - 1) for d in documents]
    counted = sum(len(document) - 1 for document in documents)
    assert packed.item() == pytest.approx(sum(loss.item() for loss in alone) / counted, rel=1e-5)


def test_share_is_counted_and_an_adapter_beside_the_mixers_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapted = add_adapter(AutoModelForCausalLM.from_pretrained(EXPORT), ["in_proj"], 2)
    lora = sum(p.numel() for name, p in adapted.named_parameters() if "lora" in name)
    total = sum(p.numel() for p in adapted.parameters())
    assert trained_share(adapted) == lora / total > 0
    assert f"{lora / total:.2%} of parameters train" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--targets lm_head reach no projection of a mixer"):
        add_adapter(AutoModelForCausalLM.from_pretrained(EXPORT), ["lm_head"], 2)


def test_a_missing_folder_or_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([str(tmp_path), "x.jsonl"], [str(EXPORT), str(tmp_path / "x.jsonl")]):
        with pytest.raises(SystemExit):
            read_arguments(words)
    errors = capsys.readouterr().err
    assert "is no export" in errors and "no file" in errors
