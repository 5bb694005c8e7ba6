"""Golden runs: 43 steps each with a batch ramp, two context lengths, decay and clipping."""

from dataclasses import replace
from pathlib import Path

from model.kernels.cpu_library import instruction_set
from tests.compose import run_config
from tests.corpus import make_corpus
from tests.small import config
from tests.train.world import train
from train.config import RunConfig

# of our kernels: AVX2 on processors with AVX-512 too, so that both give the same digits
INSTRUCTIONS = "avx2" if instruction_set() == "avx512" else instruction_set()


def runs(root: Path) -> dict[str, tuple[int, RunConfig]]:
    """Number of ranks and config of every golden run, by name."""
    demo = run_config("demo").model
    data = make_corpus(root / "demo-data", vocab_size=demo.vocab_size)

    def demo_run(name: str) -> RunConfig:
        run = replace(config(root, name), model=demo, data=replace(data, reset_state=False))
        return replace(run, optim=replace(run.optim, lr=4e-3))

    tiny = make_corpus(root / "data")
    tp2 = replace(
        config(root, "tiny-tp2", tensor_parallel=2), data=replace(tiny, reset_state=False)
    )
    return {
        "demo-1": (1, demo_run("demo-1")),
        "demo-2": (2, demo_run("demo-2")),
        "tiny-tp2": (2, tp2),
        "tiny-resets": (1, config(root, "tiny-resets")),
    }


def train_on_one_instruction_set(run: RunConfig) -> None:
    """Train with CPU kernels for INSTRUCTIONS."""
    from model.kernels import cpu

    cpu.instruction_set = lambda: INSTRUCTIONS  # type: ignore[attr-defined]
    train(run)
