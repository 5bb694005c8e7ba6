"""Benchmark generation: what Falcon Mamba's figures 2 and 3 show.

Speed and peak memory over generated tokens, and the longest prompt that a given memory takes, at
batch 1 with random weights: ours, transformers' generate for FalconMamba, a Llama-shaped
transformer of the same size (arXiv 2410.05355, section 4). Without +experiment it takes the demo's
shape on a CPU and 7b's on a GPU. Writes bench_generate.json, .png into the run's folder. Memory
counts above the weights: peak resident memory of the process on a CPU, torch's on a GPU. Time is
the processor's on a CPU; what the bars compare is measured there in turns, block by block:
lockstep.py.

examples:
  python -m benchmarks.generation
  python -m benchmarks.generation +experiment=130m eval.bench.tokens=8192
"""

import ctypes
import gc
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.lockstep import BLOCK, relative_speeds
from benchmarks.rivals import Decoder, falcon, llama, ours
from core.command import command
from core.files import write_json
from eval.config import EvaluationConfig
from model.flops import parameter_count

MIB = 2**20
MODELS = {"ours": ours, "transformers FalconMamba": falcon, "transformers Llama": llama}
FIRST_PROMPT = 512
FLAT_FROM = 1024  # generated tokens from which on speed and memory must not change
ROUNDS = 40  # of turns
Result = dict[str, Any]


class Meter:
    """Peak memory in bytes, and time."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def clock(self) -> float:
        """Seconds: of the wall on a GPU, of the processor on a CPU, where other work on the machine
        does not count.
        """
        return time.perf_counter() if self.cuda else time.process_time()

    def reset(self) -> int:
        """Forget the peak; returns what is used now."""
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: man 5 proc
        return self.peak()

    def peak(self) -> int:
        """The peak since the last reset."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def marks(tokens: int) -> list[int]:
    """Powers of two from 256 to `tokens`, where speed and memory are read."""
    return [1 << power for power in range(8, tokens.bit_length()) if 1 << power <= tokens]


def speed(name: str, decode: Decoder, tokens: int, meter: Meter) -> list[Result]:
    """Generate `tokens` after a prompt of one; at each mark, tokens/s of the second half of the way
    to it and the peak.

    The second half was all generated with at least half of the tokens before it. Its speed is the
    median over blocks of 64 tokens, which other work on the machine does not move.
    """
    stops, rows = marks(tokens), []
    times = [0.0]  # at the end of every block
    count = 0
    decode([12], 16, lambda: None)  # compile, allocate
    before = meter.reset()

    def watch() -> None:
        nonlocal count
        count += 1
        if count == 1:
            times[0] = meter.clock()
        if count % BLOCK:
            return
        if meter.cuda:
            torch.cuda.synchronize()
        times.append(meter.clock())
        if count in stops:
            half = times[len(times) // 2 :]
            seconds = statistics.median(b - a for a, b in pairwise(half))
            peak = meter.peak()
            row = {
                "tokens": count,
                "tokens_per_second": BLOCK / seconds,
                "peak_bytes": peak - before,
                "total_bytes": peak,
            }
            rows.append(row)
            print(
                f"{name}: {count:,} tokens, {BLOCK / seconds:,.1f} tokens/s, "
                f"{(peak - before) / MIB:.1f} MiB",
                flush=True,
            )

    decode([12], tokens, watch)
    return rows


def longest_prompt(name: str, decode: Decoder, limit_bytes: int, most: int, meter: Meter) -> Result:
    """The longest prompt (doubling from 512, `most` at the most) whose first token comes within the
    meter.
    """
    fits, rows = 0, []
    length = FIRST_PROMPT
    while length <= most:
        before = meter.reset()
        begun = meter.clock()
        decode([12 + place % 100 for place in range(length)], 1, lambda: None)
        seconds, used = meter.clock() - begun, meter.peak() - before
        rows.append({"prompt": length, "peak_bytes": used, "seconds": seconds})
        print(f"{name}: prompt of {length:,}, {used / MIB:.1f} MiB, {seconds:.2f} s", flush=True)
        if used > limit_bytes:
            break
        fits, length = length, length * 2
    return {
        "fits": fits,
        "stopped_by": "memory" if rows and rows[-1]["peak_bytes"] > limit_bytes else "tokens",
        "rows": rows,
    }


def bench(config: EvaluationConfig) -> None:
    """Measure all three, print a table, write JSON and a picture."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # a second thread's waiting would count as work, and one token at a time has no use for it
    torch.set_num_threads(1)
    settings, meter = config.eval.bench, Meter(device)
    result: Result = {
        "device": torch.cuda.get_device_name() if meter.cuda else "one CPU thread",
        "torch": torch.__version__,
        "parameters": parameter_count(config.model),
        "prompt_memory_bytes": int(settings.prompt_memory_gib * 2**30),
        "models": {},
    }
    config.run.folder.mkdir(parents=True, exist_ok=True)
    decoders: dict[str, Decoder] = {}
    for name, make in MODELS.items():
        decode = decoders[name] = make(config.model, device)
        tokens = settings.tokens if name == "ours" else settings.rival_tokens
        generated = speed(name, decode, tokens, meter)
        most = settings.tokens if name == "ours" else settings.rival_prompt_tokens
        prompt = longest_prompt(name, decode, result["prompt_memory_bytes"], most, meter)
        result["models"][name] = {"generated": generated, "prompt": prompt}
        write_json(config.run.folder / "bench_generate.json", result)  # what is done stays
        if meter.cuda:
            del decoders[name], decode  # their weights would not fit together
    if not meter.cuda:
        result["relative_speeds"] = in_turns(decoders, settings.tokens, settings.rival_tokens)
    result["bars"] = bars(result["models"], result.get("relative_speeds"))
    write_json(config.run.folder / "bench_generate.json", result)
    draw(config.run.folder / "bench_generate.png", result)
    show(result)
    print(f"written: {config.run.folder / 'bench_generate.json'} and .png", flush=True)


def in_turns(decoders: dict[str, Decoder], tokens: int, rival_tokens: int) -> dict[str, float]:
    """Speeds of ours behind 1,024 to `tokens` tokens and of the others behind `rival_tokens`,
    relative to the first.
    """
    stops = [stop for stop in marks(tokens) if stop >= FLAT_FROM] or marks(tokens)
    chosen = dict.fromkeys([stops[0], stops[len(stops) // 2], stops[-1]])
    entrants = {f"ours after {stop:,}": (decoders["ours"], stop) for stop in chosen}
    entrants |= {
        name: (decode, rival_tokens) for name, decode in decoders.items() if name != "ours"
    }
    print(f"in turns, {ROUNDS} rounds of {BLOCK} tokens: {', '.join(entrants)}", flush=True)
    return relative_speeds(entrants, ROUNDS)


def bars(models: Result, relative: dict[str, float] | None = None) -> Result:
    """What must hold: ours flat from 1,024 tokens on, and its ratio to transformers at the last
    length both reached.

    `relative` speeds are taken where they were measured, else those of the models' own passes.
    """
    mine = [row for row in models["ours"]["generated"] if row["tokens"] >= FLAT_FROM] or models[
        "ours"
    ]["generated"]
    rates, peaks = [[row[key] for row in mine] for key in ("tokens_per_second", "total_bytes")]
    others = {name: model["generated"][-1] for name, model in models.items() if name != "ours"}
    ours = {row["tokens"]: row["tokens_per_second"] for row in models["ours"]["generated"]}
    times = {name: ours[row["tokens"]] / row["tokens_per_second"] for name, row in others.items()}
    if relative is not None:
        rates = [rate for name, rate in relative.items() if name.startswith("ours after")]
        times = {name: rates[0] / relative[name] for name in others}
    return {
        "tokens": [mine[0]["tokens"], mine[-1]["tokens"]],
        "memory_growth": peaks[-1] / peaks[0] - 1,  # weights included
        "speed_change": rates[-1] / rates[0] - 1,
        "speed_spread": max(rates) / min(rates) - 1,
        **{f"times faster than {name}": ratio for name, ratio in times.items()},
    }


def show(result: Result) -> None:
    """One row per model and length, then the bars."""
    table = Table(
        "model", "tokens", "tokens/s", "peak above weights, MiB", title=f"{result['device']}"
    )
    for name, model in result["models"].items():
        for row in model["generated"]:
            table.add_row(
                name,
                f"{row['tokens']:,}",
                f"{row['tokens_per_second']:,.1f}",
                f"{row['peak_bytes'] / MIB:.1f}",
            )
    Console().print(table)
    for name, model in result["models"].items():
        fits, why = model["prompt"]["fits"], model["prompt"]["stopped_by"]
        more = "" if why == "memory" else " or more"
        print(
            f"{name}: a prompt of {fits:,}{more} in {result['prompt_memory_bytes'] / 2**30:g} GiB"
        )
    for key, value in result["bars"].items():
        shown = (
            f"{value[0]:,} to {value[1]:,}"
            if key == "tokens"
            else f"{value:.3g}"
            if "times" in key
            else f"{value:+.2%}"
        )
        print(f"{key.replace('_', ' ')}: {shown}")


def draw(path: Path, result: Result) -> None:
    """Speed and memory over generated tokens, memory over the prompt's length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5))
    for name, model in result["models"].items():
        rows, prompts = model["generated"], model["prompt"]["rows"]
        tokens = [row["tokens"] for row in rows]
        axes[0].plot(tokens, [row["tokens_per_second"] for row in rows], marker="o", label=name)
        axes[1].plot(tokens, [row["peak_bytes"] / MIB for row in rows], marker="o", label=name)
        lengths = [row["prompt"] for row in prompts]
        axes[2].plot(lengths, [row["peak_bytes"] / MIB for row in prompts], marker="o", label=name)
    axes[2].axhline(result["prompt_memory_bytes"] / MIB, color="gray", linestyle=":")
    labels = (("generated tokens", "tokens/s"), ("generated tokens", "peak above weights, MiB"))
    for axis, (x, y) in zip(
        axes, (*labels, ("prompt tokens", "peak above weights, MiB")), strict=True
    ):
        axis.set_xscale("log", base=2)
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].legend()
    figure.suptitle(f"batch 1, {result['parameters']:,} parameters, {result['device']}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


main = command(EvaluationConfig)(bench)

if __name__ == "__main__":
    if not any(argument.startswith("+experiment=") for argument in sys.argv[1:]):
        sys.argv.append("+experiment=7b" if torch.cuda.is_available() else "+experiment=demo")
    main()
