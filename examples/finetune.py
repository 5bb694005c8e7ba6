"""Fine-tune an export with TRL and LoRA of PEFT, on our kernels and with packed documents.

DATA is a file of JSON lines as TRL takes them: `text`, `prompt` and `completion`, or `messages`
(for which the tokenizer needs a chat template). Documents are packed into sequences of --length
tokens; the state is reset where each starts, so that none reads another. Writes the adapter, and
with --merge the whole model, for transformers.

pip install 'falcon-mamba-pretrain[finetune]'
python examples/finetune.py runs/demo/hf notes.jsonl --output runs/finetuned --merge
"""

import argparse
import sys
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
if (CHECKOUT / "model" / "mamba.py").is_file():  # false for a copy of this file
    sys.path[0] = str(CHECKOUT)
from core.entry import explain_missing_extras

explain_missing_extras()

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from trl import SFTConfig, SFTTrainer

from model.hf import accelerate

# PEFT refuses out_proj and conv1d of a falcon_mamba: other kernels read their weights directly
TARGETS = ["in_proj", "x_proj", "dt_proj"]


def adapted_projections(model: nn.Module) -> set[str]:
    """Names of the mixers' projections that have an adapter."""
    return {
        name
        for mixer in model.modules()
        if isinstance(mixer, FalconMambaMixer)
        for name, child in mixer.named_children()
        if isinstance(child, BaseTunerLayer)
    }


def trained_share(model: nn.Module) -> float:
    """Share of the parameters that train."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained / sum(p.numel() for p in model.parameters())


def add_adapter(model: nn.Module, targets: list[str], rank: int) -> PeftModel:
    """The model with LoRA on its projections; exits if it reaches none of the mixers.

    A mixer has most of a model's parameters, and embeddings alone learn little.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, r=rank, lora_alpha=2 * rank, lora_dropout=0.0
    )
    adapted = get_peft_model(model, config)
    reached = adapted_projections(adapted)
    if not reached:
        sys.exit(
            f"error: --targets {' '.join(targets)} reach no projection of a mixer: name some of "
            f"{', '.join(TARGETS)}"
        )
    print(f"LoRA on {', '.join(sorted(reached))}: {trained_share(adapted):.2%} of parameters train")
    return adapted


def training_config(arguments: argparse.Namespace) -> SFTConfig:
    """What TRL trains with; see its documentation for the other options."""
    has_gpu = torch.cuda.is_available()
    return SFTConfig(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        learning_rate=arguments.rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.steps // 20),
        logging_steps=max(1, arguments.steps // 20),
        packing=True,  # several documents in a sequence; TRL then passes their positions on
        max_length=arguments.length,
        bf16=has_gpu,
        use_cpu=not has_gpu,
        save_strategy="no",
        report_to="none",
    )


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="EXPORT")
    parser.add_argument("data", type=Path, metavar="DATA.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/finetuned"))
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-4)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--merge", action="store_true", help="write the merged model, too")
    arguments = parser.parse_args(words)
    if not (arguments.folder / "config.json").is_file():
        parser.error(f"{arguments.folder} is no export: python eval/export.py writes one")
    if not arguments.data.is_file():
        parser.error(f"no file {arguments.data}: give JSON lines with a text each")
    return arguments


def finetune(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, write the results and return TRL's log."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    model = accelerate(AutoModelForCausalLM.from_pretrained(arguments.folder))
    adapted: Any = add_adapter(model, arguments.targets, arguments.rank)
    trainer = SFTTrainer(
        model=adapted,
        args=training_config(arguments),
        train_dataset=Dataset.from_json(str(arguments.data)),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model()
    print(f"adapter: {arguments.output}")
    if arguments.merge:
        merged = arguments.output / "merged"
        adapted.merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        print(f"merged: {merged}")
    log: list[dict[str, Any]] = trainer.state.log_history
    return log


if __name__ == "__main__":
    finetune(read_arguments())
