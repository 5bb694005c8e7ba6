"""Agreement of ranks on settings, code, libraries and kernels, before the first step."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from core.errors import InputError
from model.config import Backend
from model.kernels import REFERENCE, load
from tests.corpus import corpus_config, make_corpus
from tests.distributed import run_ranks
from tests.small import config
from train import run_context
from train.build import agree_on_build
from train.distributed import Ranks, connect, init_distributed
from train.resilience import agreement
from train.resilience.agreement import check_agreement, check_same_checkpoint, start_facts
from train.resilience.config import VerifyShards
from train.resilience.datacheck import DataCheck, open_per_node, ranks_of_storage
from train.resilience.incidents import Outcome, read_outcome
from train.resilience.run_lock import RunLock


def refused(facts: dict[str, str], *words: str) -> None:
    """Check facts that differ among ranks; every rank must raise the same line with `words`."""
    with pytest.raises(InputError) as error:
        check_agreement(facts)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def other_settings(rank: int, folder: Path) -> None:
    """Every setting is compared, whatever it is, and the outcome says what differs."""
    for key, value, name in (
        ("lr", 1e-2, "optim.lr 0.01 instead of 0.001"),
        ("clip_norm", 3.0, "optim.clip_norm 3.0 instead of 1.0"),
    ):
        run = config(folder, "settings")
        run.optim.lr, run.optim.clip_norm = 1e-3, 1.0
        if rank == 1:
            setattr(run.optim, key, value)
        refuse_start(run, f"rank 1 on {os.uname().nodename} differs from rank 0", name)
    run = config(folder, "settings")
    if rank == 1:
        run.data.seed += 1
        run.parallel.tensor_parallel = 2  # would hang while groups are built
        run.data.stages[0].mixture["code"] = 99.0
        run.data.folder = "elsewhere"  # ranks may find the same shards by another path
    refuse_start(run, "data.seed", "parallel.tensor_parallel", "data.stages.0.mixture.code")
    run = config(folder, "settings")
    if rank == 1:
        run.compute.kernels = Backend.reference
    refuse_start(run, 'compute.kernels "reference"')


def refuse_start(run: Any, *words: str) -> None:
    """Start a run on all ranks, which must refuse with one line before its body is called."""
    with pytest.raises(InputError) as error:
        run_context.run_context(
            run.run, run.health, start_facts(run, "cpu"), lambda *_: pytest.fail("it trains")
        )
    assert all(word in str(error.value) for word in words), error.value
    assert "data.folder" not in str(error.value)
    dist.barrier()  # the first rank has written it
    outcome = read_outcome(run.run.folder)
    assert outcome == Outcome(2, str(error.value))


def on_ranks(folder: Path) -> None:
    """Facts of three ranks."""
    with connect("cpu"):
        compare_facts(int(os.environ["RANK"]), folder)


def compare_facts(rank: int, folder: Path) -> None:
    agreement.socket.gethostname = lambda: f"n{rank}"  # type: ignore[assignment]
    check_agreement({"a": "1", "b": "x"})
    refused(
        {"a": "1", "b": "xxy"[rank]}, "rank 2 on n2 differs from rank 0 on n0: b y instead of x"
    )
    # most ranks are right, and the first one is not
    refused({"a": "yxx"[rank]}, "rank 0 on n0 differs from rank 1 on n1: a y instead of x")
    refused({"a": "xyz"[rank]}, "rank 1 on n1", "rank 0 on n0: a y instead of x; 1 other ranks")
    refused({"a": "1"} if rank else {"a": "1", "b": "2"}, "rank 0 on n0", "b 2 instead of missing")
    refused({c: "xxy"[rank] for c in "edcba"}, "a y instead of x, b y", "c y", "and 2 more")
    with pytest.raises(InputError, match="rank 2 on n2 .*' backend reference"):
        kernels = REFERENCE if rank == 2 else load(Backend.cpu, "cpu")
        agree_on_build(kernels, "cpu", "plan")
    not_shared(rank, folder)


def not_shared(rank: int, folder: Path) -> None:
    """A rank that finds another folder, or none, under the same path of run.dir is named."""
    run_context.SHARED_SECONDS = 0.5
    own = RunLock(folder / f"node-{min(rank, 1)}")
    own.content = b"" if rank else b"a lock"
    own.path.parent.mkdir(exist_ok=True)
    for content in (None, "another job's lock"):
        if rank == 0:
            own.path.write_bytes(own.content)
        elif content is not None:
            own.path.write_text(content)
        with pytest.raises(InputError) as error:
            run_context._check_shared(own)
        assert "rank 1 on n1" in str(error.value)
        assert "mount the same folder on every node" in str(error.value)
    own.path = folder / "node-0" / "run.lock"
    run_context._check_shared(own)


def two_ranks(folder: Path) -> None:
    """Starts of two ranks."""
    with init_distributed("cpu", 1) as ranks:
        other_settings(ranks.rank, folder)
        other_files(ranks, folder)


def other_files(ranks: Ranks, folder: Path) -> None:
    """Ranks with copies of their own on one node: each copy counts, and not only the first."""
    rank = ranks.rank
    shared, link, copy, other = (
        corpus_config(folder / name) for name in ("data", "link", "copy", "other")
    )
    for second, sharing, error in (
        (shared, [0, 1], None),
        (link, [0, 1], None),
        (copy, [rank], r"copy/.*\.ds on .* \(rank 1\) differs from its manifest"),
        (other, [rank], r"rank 1 on .* has other manifests in .*other than rank 0"),
    ):
        data = second if rank else shared
        assert ranks_of_storage(data) == sharing
        with nullcontext() if error is None else pytest.raises(InputError, match=error):
            check = DataCheck(data, open_per_node(data), ranks)
            check.start(VerifyShards.before, lambda: None)
    checkpoint = folder / f"node-{rank}" / "step-00000001"
    checkpoint.mkdir(parents=True)
    manifest = checkpoint / "manifest.json"
    for contents, error in (
        ("aa", None),
        ("ab", f"rank 1 on .* differs .* mount the same {folder}/node-1 on every node"),
        ("a", "rank 1 on .* manifest unreadable .No such file or directory. instead of"),
    ):
        manifest.unlink(missing_ok=True)
        if rank < len(contents):
            manifest.write_text(contents[rank])
        with nullcontext() if error is None else pytest.raises(InputError, match=error):
            check_same_checkpoint(checkpoint)


@pytest.mark.fault(
    "ranks that differ in a setting, the code, a library or kernels",
    "rank, host, key and both values are named before the first step, exit 2",
)
def test_ranks_that_differ_are_named_before_the_first_step(tmp_path: Path, measured: Any) -> None:
    run_ranks(3, [(on_ranks, (tmp_path,))])
    make_corpus(tmp_path / "data")
    (tmp_path / "link").symlink_to("data")
    for name in ("copy", "other"):
        shutil.copytree(tmp_path / "data", tmp_path / name)
    for shard in (tmp_path / "copy").rglob("train_*.ds"):
        content = shard.read_bytes()
        shard.write_bytes(content[::-1][:-2] + content[-2:])
    manifest = next((tmp_path / "other").rglob("manifest.json"))
    manifest.write_text(manifest.read_text().replace('"licence": "', '"licence": "another '))
    run_ranks(2, [(two_ranks, (tmp_path,))])
    measured("17 of 17 differences named, by every rank")


def test_facts_cover_code_libraries_and_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, "run")
    facts = start_facts(run, "cpu")
    assert facts["optim.lr"] == str(run.optim.lr) and facts["run.seed"] == str(run.run.seed)
    assert facts["torch"] == torch.__version__ and "numpy" in facts
    assert "data.folder" not in facts
    # processors of several kinds are normal beside GPUs
    assert {"instruction set"} == facts.keys() - start_facts(run, "cuda").keys()
    with monkeypatch.context() as patch:
        patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
        assert start_facts(run, "cpu")["NVIDIA_TF32_OVERRIDE"] == "0"
    before = agreement.sources_hash()
    assert before == agreement.sources_hash() == facts["the code's hash"]
    for folder in agreement.SOURCE_FOLDERS:
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(agreement, "ROOT", tmp_path)
    hashes = [agreement.sources_hash()]
    for name, text in (("model/a.py", "x = 1"), ("model/a.py", "x = 2"), ("train/b.cu", "")):
        (tmp_path / name).write_text(text)
        hashes.append(agreement.sources_hash())
    (tmp_path / "train" / "b.cu").rename(tmp_path / "train" / "c.cu")
    hashes.append(agreement.sources_hash())
    assert len(set(hashes)) == 5
    (tmp_path / "model" / "notes.txt").write_text("no code")
    assert agreement.sources_hash() == hashes[-1]
