"""The data benchmark runs on small sizes."""

from tests.commands import forked


def test_benchmark_runs() -> None:
    result = forked("-m", "benchmarks.data", "--small", "--no-record")
    assert result.returncode == 0, result.stderr
    for what in (
        "random sequences",
        "megatron-core IndexedDataset",
        "datatrove folder dataset",
        "encode_batch",
        "seek",
    ):
        assert what in result.stdout, what
