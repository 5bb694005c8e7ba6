"""Our training beside transformers' Trainer: the same initial weights, batches, rates and rules,
the loss of each step.

`python -m benchmarks.trainer FOLDER --steps N` trains the demo's model by the real command, once
more by it with the reference kernels and small batches accumulated, whose sums are rounded in
another order, and then by the Trainer. How far the first two part is the yardstick for how far the
Trainer may: training is chaotic, so differences of rounding grow. It needs the demo's data (`python
data/prepare.py +experiment=demo`), writes losses.json and losses.png into FOLDER and the
differences into benchmarks/results/. transformers cannot reset state between documents, so all do
without; its scan is mambapy's, several times faster on a CPU than its own loop, and small batches
are faster again. With --minutes it stops there, and the curves are compared as far as it came; what
ours has done stays.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from benchmarks.timing import Measurement, add_ratios, print_table, write_results
from core.files import ROOT
from data.stream.loader import Loader, compile_plan
from data.stream.manifests import open_manifests
from data.tokenizer import EOS
from model.flops import parameter_count
from model.hf import hf_config, tensor_names, to_hf
from model.hf_writer import Entry, json_bytes, plan_files, write_files
from model.kernels import REFERENCE
from model.parallel.build import build_model
from model.parameters import has_weight_decay
from tests.compose import run_config
from train.config import RunConfig
from train.schedule import Schedule

BATCH = 16
SEQ_LEN = 128
# sequences of a forward pass of theirs: larger tensors get fresh pages from glibc each time
MICRO_BATCH = 2
OTHERWISE = ("compute.kernels=reference", f"parallel.micro_batch_tokens={MICRO_BATCH * SEQ_LEN}")
EVERY = 20  # steps between lines of progress
PARTS = 10  # of the run, each with its mean differences
TIMES = 3.0  # how many yardsticks the curves may be apart in any part and be called equal to noise


def overrides(steps: int) -> list[str]:
    """The demo with one context and a constant batch, for `steps` steps, a fifth of them decay."""
    tokens = steps * BATCH * SEQ_LEN
    decay = tokens // 5 // (BATCH * SEQ_LEN) * BATCH * SEQ_LEN
    stages = (
        f"data.stages=[{{name: stable, tokens: {tokens - decay}, seq_len: {SEQ_LEN}, "
        f"mixture: {{web: 20, code: 70, "
        f"technical: 10}}}}, {{name: decay, tokens: {decay}, seq_len: {SEQ_LEN}, "
        f"mixture: {{web: 10, code: 35, "
        "technical: 10, curated: 20, math: 25}}]"
    )
    return [
        stages,
        "data.reset_state=false",
        f"schedule.decay_tokens={decay}",
        f"schedule.warmup_tokens={tokens // 20}",
        "schedule.ramp_tokens=0",
        f"schedule.batch_start_sequences={BATCH}",
        f"schedule.batch_end_sequences={BATCH}",
        f"checkpoint.every_tokens={tokens}",
        "metrics.wandb_project=null",
    ]


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The run's sequences in its own order, each with the token that its last place predicts."""

    def __init__(self, config: RunConfig) -> None:
        manifests = open_manifests(config.data)
        self.plan = compile_plan(config.data, manifests)
        self.loader = Loader(self.plan, manifests)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for stage in self.plan.stages:
            for number in range(stage.tokens // stage.seq_len):
                batch = self.loader.read(stage, np.array([number]))
                ids = torch.cat([batch.tokens[0], batch.targets[0, -1:]])
                yield {"input_ids": ids, "labels": ids}


class Recorded(Trainer):
    """transformers' Trainer that keeps every step's loss and seconds, and stops in time."""

    losses: list[float]
    times: list[float]  # when each step was over
    until: float

    def training_step(self, *arguments: Any, **named: Any) -> Tensor:
        # this small batch's share of the step's mean
        part = super().training_step(*arguments, **named)
        self.parts.append(float(part))
        if len(self.parts) == BATCH // MICRO_BATCH:
            self._note(sum(self.parts))
            self.parts = []
        return part

    def _note(self, loss: float) -> None:
        self.losses.append(loss)
        self.times.append(time.monotonic())
        if len(self.losses) % EVERY == 1 and len(self.losses) > 1:
            rate = (len(self.losses) - 1) / (self.times[-1] - self.times[0])
            left = (self.args.max_steps - len(self.losses)) / rate / 60
            print(
                f"Trainer: step {len(self.losses)} loss {loss:.3f}, {left:.1f} min left", flush=True
            )
        if time.monotonic() > self.until:
            self.control.should_training_stop = True


def export_initial(config: RunConfig, folder: Path) -> None:
    """The run's initial weights as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.safetensors"):
        stale.unlink()
    model = build_model(config.model, REFERENCE, config.run.seed, torch.device("cpu"))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    layout = plan_files(
        Entry(name, hf_name, torch.float32, tuple(to_hf(name, weights[name]).shape))
        for name, hf_name in tensor_names(config.model.n_layer)
    )
    write_files(
        folder, layout, lambda name, start, stop: to_hf(name, weights[name][start:stop]), print
    )
    (folder / "config.json").write_bytes(json_bytes(hf_config(config.model, EOS, "float32")))


def train_theirs(
    config: RunConfig, folder: Path, steps: int, minutes: float
) -> tuple[list[float], float]:
    """Losses of transformers' Trainer with our rates, weight decay rule and clipping; mean seconds
    of a step.
    """
    export_initial(config, folder / "initial")
    model = AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32)
    for layer in model.backbone.layers:
        layer.mixer.use_mambapy = True
    schedule, optim = Schedule(config.schedule, config.optim.lr, config.data), config.optim
    ours = {theirs: name for name, theirs in tensor_names(config.model.n_layer)}
    groups = [
        {
            "params": [
                p for name, p in model.named_parameters() if has_weight_decay(ours[name]) is decayed
            ],
            "weight_decay": decay,
        }
        for decayed, decay in ((True, optim.weight_decay), (False, 0.0))
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    rates = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: schedule.at(min(step, steps - 1) * BATCH * SEQ_LEN).lr
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=BATCH // MICRO_BATCH,
        use_cpu=True,
        max_grad_norm=optim.clip_norm,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Recorded(model, arguments, train_dataset=Batches(config), optimizers=(adamw, rates))
    trainer.losses, trainer.times, trainer.parts = [], [], []
    trainer.until = time.monotonic() + 60 * minutes
    trainer.train()
    return trainer.losses, (trainer.times[-1] - trainer.times[0]) / (len(trainer.times) - 1)


def train_ours(folder: Path, *settings: str) -> tuple[list[float], float]:
    """Losses of the real command, one rank; mean seconds of a step."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "1",
        "train/pretrain.py",
    ]
    subprocess.run(
        [*command, "+experiment=demo", f"run.dir={folder}", *settings], cwd=ROOT, check=True
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines], float(
        np.mean([line["step_seconds"] for line in lines])
    )


def apart(left: list[float], right: list[float]) -> list[float]:
    """Mean magnitude of the difference of two curves in each part of the run."""
    parts = np.array_split(np.abs(np.array(left) - np.array(right)), PARTS)
    return [float(part.mean()) for part in parts]


def judge(ours: list[float], again: list[float], theirs: list[float]) -> dict[str, Any]:
    """How far the Trainer's curve is from ours, in nats and in yardsticks."""
    to_theirs, yardstick = apart(ours, theirs), apart(ours, again)
    # 1e-7: of fp32
    ratios = [mine / max(other, 1e-7) for mine, other in zip(to_theirs, yardstick, strict=True)]
    difference = np.abs(np.array(ours) - np.array(theirs))
    return {
        "first": [ours[0], again[0], theirs[0]],
        "last_20_mean": [float(np.mean(losses[-20:])) for losses in (ours, again, theirs)],
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "difference_of_first_20": float(difference[:20].max()),
        "mean_difference_by_part": to_theirs,
        "yardstick_by_part": yardstick,
        "yardsticks_by_part": ratios,
        "equal_to_noise": max(ratios) <= TIMES,
    }


def draw(path: Path, ours: list[float], again: list[float], theirs: list[float]) -> None:
    """The curves, and their differences below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 7), sharex=True, height_ratios=[2, 1]
    )
    above.plot(theirs, linewidth=2.5, label="transformers.Trainer")
    above.plot(ours, linewidth=1, label="ours")
    above.set_ylabel("loss, nats per token")
    above.legend()
    below.semilogy(np.abs(np.array(ours) - np.array(theirs)), label="ours - Trainer")
    below.semilogy(
        np.abs(np.array(ours) - np.array(again)), label="ours - ours, rounded otherwise", alpha=0.7
    )
    below.set_ylabel("magnitude of the difference")
    below.set_xlabel("step")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train three times and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="of the Trainer's part at most"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder, steps = arguments.folder.resolve(), arguments.steps
    settings = overrides(steps)
    config = run_config("demo", f"run.dir={folder / 'ours'}", *settings)
    runs = {
        "ours": train_ours(folder / "ours", *settings),
        "ours, rounded otherwise": train_ours(folder / "again", *settings, *OTHERWISE),
        "transformers.Trainer": train_theirs(config, folder, steps, arguments.minutes),
    }
    done = min(len(losses) for losses, _ in runs.values())
    ours, again, theirs = (losses[:done] for losses, _ in runs.values())
    result = {"steps": done, "of": steps, **judge(ours, again, theirs)}
    curves = {"ours": ours, "again": again, "theirs": theirs}
    (folder / "losses.json").write_text(json.dumps({**result, **curves}, indent=1) + "\n")
    draw(folder / "losses.png", ours, again, theirs)
    shape = f"{parameter_count(config.model):,} parameters, {BATCH} x {SEQ_LEN}"
    rows = [Measurement("step", shape, name, seconds, done) for name, (_, seconds) in runs.items()]
    print_table(add_ratios(rows, "ours"), "mean of a step, one thread")
    print(json.dumps(result, indent=1))
    print("written:", write_results(rows, "trainer", "one thread", {}, result))


if __name__ == "__main__":
    main()
