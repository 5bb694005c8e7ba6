"""Compare the losses of our training and transformers' Trainer, step by step.

`python -m benchmarks.trainer FOLDER --steps N` trains the demo's model three times with equal
initial weights, batches, learning rates, weight decay and clipping: with our command, with our
command again but other rounding (reference kernels, gradient accumulation), and with the Trainer.
Training is chaotic, so rounding differences grow; the difference of our two runs is the noise level
for the difference to the Trainer. Needs the demo's data (`python data/prepare.py
+experiment=demo`). Writes losses.json and losses.png into FOLDER, and the differences into a file
in benchmarks/results/.

transformers cannot reset state between documents, so no run does. The Trainer uses mambapy's scan
and small micro-batches, which are several times faster on a CPU than its own loop. --minutes stops
the Trainer early; the curves are then compared up to its last step.
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
# sequences per forward of the Trainer: glibc maps new pages for each larger tensor
MICRO_BATCH = 2
OTHER_ROUNDING = (
    "compute.kernels=reference",
    f"parallel.micro_batch_tokens={MICRO_BATCH * SEQ_LEN}",
)
LOG_EVERY = 20  # steps
NUM_PARTS = 10  # parts of the run, each with its mean difference
MAX_NOISE_RATIO = 3.0  # curves are equal to noise if no part differs by more times the noise level


def overrides(steps: int) -> list[str]:
    """Overrides of the demo: one context, constant batch, `steps` steps, a fifth of them decay."""
    tokens = steps * BATCH * SEQ_LEN
    decay = tokens // 5 // (BATCH * SEQ_LEN) * BATCH * SEQ_LEN
    stages = (
        ("stable", tokens - decay, "{web: 20, code: 70, technical: 10}"),
        ("decay", decay, "{web: 10, code: 35, technical: 10, curated: 20, math: 25}"),
    )
    stage_values = [
        f"{{name: {name}, tokens: {count}, seq_len: {SEQ_LEN}, mixture: {mixture}}}"
        for name, count, mixture in stages
    ]
    return [
        f"data.stages=[{', '.join(stage_values)}]",
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
    """The run's sequences in data order, each with one more token to predict."""

    def __init__(self, config: RunConfig) -> None:
        manifests = open_manifests(config.data)
        self.plan = compile_plan(config.data, manifests)
        self.loader = Loader(self.plan, manifests)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for stage in self.plan.stages:
            for index in range(stage.tokens // stage.seq_len):
                batch = self.loader.read(stage, np.array([index]))
                ids = torch.cat([batch.tokens[0], batch.targets[0, -1:]])
                yield {"input_ids": ids, "labels": ids}


class RecordingTrainer(Trainer):
    """transformers' Trainer that records the loss and end time of every step, with a time limit."""

    losses: list[float]
    end_times: list[float]  # of steps
    micro_batch_losses: list[float]  # of the current step
    deadline: float

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # the micro-batch's part of the step's mean loss
        loss = super().training_step(*args, **kwargs)
        self.micro_batch_losses.append(float(loss))
        if len(self.micro_batch_losses) == BATCH // MICRO_BATCH:
            self._record(sum(self.micro_batch_losses))
            self.micro_batch_losses = []
        return loss

    def _record(self, loss: float) -> None:
        self.losses.append(loss)
        self.end_times.append(time.monotonic())
        steps = len(self.losses)
        if steps % LOG_EVERY == 1 and steps > 1:
            steps_per_second = (steps - 1) / (self.end_times[-1] - self.end_times[0])
            minutes = (self.args.max_steps - steps) / steps_per_second / 60
            print(f"Trainer: step {steps} loss {loss:.3f}, {minutes:.1f} min left", flush=True)
        if time.monotonic() > self.deadline:
            self.control.should_training_stop = True


def export_initial(config: RunConfig, folder: Path) -> None:
    """Write the run's initial weights as a Hugging Face folder."""
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


def train_hf(
    config: RunConfig, folder: Path, steps: int, minutes: float
) -> tuple[list[float], float]:
    """Train with transformers' Trainer; returns the losses and the mean seconds per step.

    Learning rates, weight decay groups and clipping are ours.
    """
    export_initial(config, folder / "initial")
    model = AutoModelForCausalLM.from_pretrained(folder / "initial", dtype=torch.float32)
    for layer in model.backbone.layers:
        layer.mixer.use_mambapy = True
    optim = config.optim
    schedule = Schedule(config.schedule, optim.lr, config.data)
    our_names = {hf_name: name for name, hf_name in tensor_names(config.model.n_layer)}
    decay = []
    no_decay = []
    for hf_name, parameter in model.named_parameters():
        (decay if has_weight_decay(our_names[hf_name]) else no_decay).append(parameter)
    groups = [
        {"params": decay, "weight_decay": optim.weight_decay},
        {"params": no_decay, "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
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
    trainer = RecordingTrainer(
        model, arguments, train_dataset=Batches(config), optimizers=(adamw, lr_scheduler)
    )
    trainer.losses = []
    trainer.end_times = []
    trainer.micro_batch_losses = []
    trainer.deadline = time.monotonic() + 60 * minutes
    trainer.train()
    times = trainer.end_times
    return trainer.losses, (times[-1] - times[0]) / (len(times) - 1)


def train_ours(folder: Path, *settings: str) -> tuple[list[float], float]:
    """Train with our command on one rank; returns the losses and the mean seconds per step."""
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
    seconds = float(np.mean([line["step_seconds"] for line in lines]))
    return [line["loss"] for line in lines], seconds


def mean_differences(a: list[float], b: list[float]) -> list[float]:
    """Mean absolute difference of two loss curves in each part of the run."""
    parts = np.array_split(np.abs(np.array(a) - np.array(b)), NUM_PARTS)
    return [float(part.mean()) for part in parts]


def compare(ours: list[float], rerun: list[float], hf: list[float]) -> dict[str, Any]:
    """Difference of the Trainer's losses from ours, in nats and relative to the noise level."""
    differences = mean_differences(ours, hf)
    noise = mean_differences(ours, rerun)
    # 1e-7: precision of fp32
    ratios = [value / max(level, 1e-7) for value, level in zip(differences, noise, strict=True)]
    difference = np.abs(np.array(ours) - np.array(hf))
    return {
        "first": [ours[0], rerun[0], hf[0]],
        "last_20_mean": [float(np.mean(losses[-20:])) for losses in (ours, rerun, hf)],
        "largest_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "difference_of_first_20": float(difference[:20].max()),
        "mean_difference_by_part": differences,
        "yardstick_by_part": noise,
        "yardsticks_by_part": ratios,
        "equal_to_noise": max(ratios) <= MAX_NOISE_RATIO,
    }


def plot(path: Path, ours: list[float], rerun: list[float], hf: list[float]) -> None:
    """Plot the losses and, below, their differences."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, differences) = pyplot.subplots(
        2, 1, figsize=(9, 7), sharex=True, height_ratios=[2, 1]
    )
    losses.plot(hf, linewidth=2.5, label="transformers.Trainer")
    losses.plot(ours, linewidth=1, label="ours")
    losses.set_ylabel("loss, nats per token")
    losses.legend()
    differences.semilogy(np.abs(np.array(ours) - np.array(hf)), label="ours - Trainer")
    differences.semilogy(
        np.abs(np.array(ours) - np.array(rerun)), label="ours - ours, other rounding", alpha=0.7
    )
    differences.set_ylabel("magnitude of the difference")
    differences.set_xlabel("step")
    differences.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train three times and compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--minutes", type=float, default=math.inf, help="time limit of the Trainer")
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    folder, steps = arguments.folder.resolve(), arguments.steps
    settings = overrides(steps)
    config = run_config("demo", f"run.dir={folder / 'ours'}", *settings)
    runs = {
        "ours": train_ours(folder / "ours", *settings),
        "ours, other rounding": train_ours(folder / "again", *settings, *OTHER_ROUNDING),
        "transformers.Trainer": train_hf(config, folder, steps, arguments.minutes),
    }
    num_compared = min(len(losses) for losses, _ in runs.values())
    ours, rerun, hf = (losses[:num_compared] for losses, _ in runs.values())
    result = {"steps": num_compared, "of": steps, **compare(ours, rerun, hf)}
    curves = {"ours": ours, "again": rerun, "theirs": hf}
    (folder / "losses.json").write_text(json.dumps({**result, **curves}, indent=1) + "\n")
    plot(folder / "losses.png", ours, rerun, hf)
    shape = f"{parameter_count(config.model):,} parameters, {BATCH} x {SEQ_LEN}"
    rows = [
        Measurement("step", shape, name, seconds, num_compared)
        for name, (_, seconds) in runs.items()
    ]
    print_table(add_ratios(rows, "ours"), "mean seconds of a step, one thread")
    print(json.dumps(result, indent=1))
    print("written:", write_results(rows, "trainer", "one thread", {}, result))


if __name__ == "__main__":
    main()
