"""The CPU and GPU benchmarks run on small sizes."""

import pytest

from tests.commands import forked


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks.cpu", "--lengths", "16", "--no-record"],
        ["benchmarks.gpu", "--device", "cpu", "--small", "--no-record"],
    ],
    ids=["cpu", "gpu"],
)
def test_benchmark_runs(command: list[str]) -> None:
    result = forked("-m", *command)
    assert result.returncode == 0, result.stderr
    assert "times ours" in result.stdout and "scan, forward and backward" in result.stdout
    if "benchmarks.gpu" in command:
        missing = [line for line in result.stdout.splitlines() if line.startswith("not measured: ")]
        assert {line.split()[2] for line in missing} == {
            "jax-linear-attention",
            "Liger",
            "transformers'",
        }, missing
        for what in (
            "transformers' FalconMamba",
            "Llama's layer",
            "1 of 2 ranks, megatron, bf16, recompute full",
        ):
            assert what in result.stdout, what
        assert "peak memory not measured on a CPU, estimated" in result.stdout
