"""Hugging Face files: the published sizes, equal bytes from any layout of ranks, and reading."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from model.checkpoint import CheckpointReader, TensorShard
from model.config import ModelConfig
from model.flops import parameter_shapes
from model.hf import HfFolder, config_differences, hf_config, tensor_names, to_hf
from model.hf_writer import INDEX, Entry, File, Layout, plan_files, write_files
from model.mamba import FalconMamba
from model.parameters import shard_spec
from model.sharding import shard
from tests.compose import run_config
from tests.tiny import TINY, model_of

NO_LOG: Callable[[str], None] = lambda line: None  # noqa: E731


def entries(
    config: ModelConfig, keep_fp32: tuple[str, ...] = (), dtype: torch.dtype = torch.bfloat16
) -> list[Entry]:
    shapes = parameter_shapes(config)
    return [
        Entry(name, hf_name, torch.float32 if name.rsplit(".", 1)[-1] in keep_fp32 else dtype,
              tuple(to_hf(name, torch.empty(shapes[name], device="meta")).shape))
        for name, hf_name in tensor_names(config.n_layer)
    ]  # fmt: skip


def test_sizes_of_the_released_7b() -> None:
    """File sizes of tiiuae/falcon-mamba-7b; until July 23, 2024 with A_log in fp32."""
    config = run_config("7b").model
    layout = plan_files(iter(entries(config)))
    assert [file.size for file in layout.files] == [4_956_184_024, 4_987_536_920, 4_601_680_888]
    assert [len(file.entries) for file in layout.files] == [216, 234, 193]
    assert layout.index is not None and len(layout.index) == 50_922
    assert json.loads(layout.index)["metadata"] == {"total_size": 14_545_330_176}
    files = json.loads(layout.index)["weight_map"]
    in_different_files = (
        ("21.mixer.conv1d.bias", "21.mixer.in_proj.weight"),
        ("44.mixer.dt_proj.bias", "44.mixer.out_proj.weight"),
    )
    for left, right in in_different_files:
        assert files[f"backbone.layers.{left}"] != files[f"backbone.layers.{right}"]
    fp32_layout = plan_files(iter(entries(config, keep_fp32=("A_log",))))
    assert fp32_layout.files[0].size == 4_961_951_048


@pytest.mark.parametrize("keep_fp32", [(), ("A_log", "D")])
def test_files_equal_those_of_safetensors(tmp_path: Path, keep_fp32: tuple[str, ...]) -> None:
    model = model_of(TINY)
    layout = plan_files(iter(entries(TINY, keep_fp32)), max_bytes=10_000)
    assert len(layout.files) > 2
    (tmp_path / "ours").mkdir()
    write_files(tmp_path / "ours", layout, row_reader(model), NO_LOG)
    for file in layout.files:
        tensors = {
            e.hf_name: to_hf(e.name, model.get_parameter(e.name).detach()).to(e.dtype)
            for e in file.entries
        }
        save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
        written = (tmp_path / "ours" / file.name).read_bytes()
        assert written == (tmp_path / "expected").read_bytes(), file.name


def test_files_equal_those_of_transformers(tmp_path: Path) -> None:
    hf_model = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(TINY, 11, "float32")))
    hf_model.save_pretrained(tmp_path / "expected", max_shard_size=20_000)
    state = hf_model.state_dict()
    hf_names = dict(tensor_names(TINY.n_layer))
    layout = plan_files(iter(entries(TINY, dtype=torch.float32)), max_bytes=20_000)
    (tmp_path / "ours").mkdir()
    write_files(
        tmp_path / "ours",
        layout,
        lambda name, start, stop: state[hf_names[name]][start:stop],
        NO_LOG,
    )
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(names) > 3
    assert names == sorted(path.name for path in (tmp_path / "expected").glob("model*"))
    for name in names:
        if name != INDEX:  # transformers also writes the number of parameters there
            written = (tmp_path / "ours" / name).read_bytes()
            assert written == (tmp_path / "expected" / name).read_bytes(), name
    index, expected = (
        json.loads((tmp_path / folder / INDEX).read_text()) for folder in ("ours", "expected")
    )
    assert index["weight_map"] == expected["weight_map"]
    assert index["metadata"]["total_size"] == expected["metadata"]["total_size"]


def row_reader(model: FalconMamba) -> Callable[[str, int, int], Tensor]:
    return lambda name, start, stop: to_hf(name, model.get_parameter(name).detach()[start:stop])


def write_shards(folder: Path, model: FalconMamba, tp: int, dp: int) -> None:
    """Write a checkpoint's weights as tp x dp ZeRO-1 ranks do; shards may end inside a row."""
    folder.mkdir()
    files = {}
    for tp_rank in range(tp):
        for dp_rank in range(dp):
            stem = f"rank-{tp_rank * dp + dp_rank:05d}"
            shards = []
            tensors = {}
            for name, parameter in model.named_parameters():
                if shard_spec(name) is None and tp_rank > 0:
                    continue  # the first rank writes what all have
                flat = shard(name, parameter.detach(), tp_rank, tp).flatten()
                low, high = (len(flat) * (dp_rank + side) // dp for side in (0, 1))
                tensor_shard = TensorShard(
                    "param", name, tuple(parameter.shape), tp_rank, tp, low, high - low
                )
                shards.append(asdict(tensor_shard))
                tensors[tensor_shard.key] = flat[low:high].clone()
            save_file(tensors, folder / f"{stem}.safetensors")
            (folder / f"{stem}.json").write_text(json.dumps(shards))
            files |= {
                f"{stem}.{kind}": {"bytes": 0, "sha256": "0" * 64}
                for kind in ("json", "safetensors")
            }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 3), (2, 1), (4, 2), (8, 5)])
def test_every_layout_of_ranks_exports_the_same_bytes(
    tmp_path: Path, tp: int, dp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # read a few rows at a time, across shard boundaries
    monkeypatch.setattr("model.hf_writer.CHUNK", 100)
    model = model_of(TINY, seed=3)
    write_shards(tmp_path / "step", model, tp, dp)
    reader = CheckpointReader(tmp_path / "step")
    layout = plan_files(iter(entries(TINY, dtype=torch.float32)), max_bytes=30_000)

    def read_rows(name: str, start: int, stop: int) -> Tensor:
        return to_hf(name, reader.read_rows("param", name, start, stop))

    for folder, read in (("direct", row_reader(model)), ("ranks", read_rows)):
        (tmp_path / folder).mkdir()
        write_files(tmp_path / folder, layout, read, NO_LOG)
    for file in layout.files:
        exported = (tmp_path / "ranks" / file.name).read_bytes()
        assert exported == (tmp_path / "direct" / file.name).read_bytes()
    name = "layers.0.mixer.in_proj.weight"
    assert torch.equal(reader.read_full("param", name), model.get_parameter(name))


def hf_folder(folder: Path, model: FalconMamba, **changes: object) -> Path:
    folder.mkdir()
    layout = plan_files(iter(entries(TINY, dtype=torch.float32)), max_bytes=30_000)
    write_files(folder, layout, row_reader(model), NO_LOG)
    (folder / "config.json").write_text(json.dumps({**hf_config(TINY, 11, "float32"), **changes}))
    return folder


def test_an_export_can_be_read(tmp_path: Path) -> None:
    model = model_of(TINY, seed=4)
    # Falcon3-Mamba-7B-Base has eps 1e-5 for the mixer's norms too
    source = HfFolder(
        hf_folder(tmp_path / "hf", model, mixer_rms_eps=1e-5, eos_token_id=0, pad_token_id=0)
    )
    assert source.config.mixer_norm_eps == 1e-5 and source.config.d_inner == 48
    assert config_differences(source.config, TINY) == ["model.mixer_norm_eps=1e-05"]
    assert config_differences(source.config, replace(source.config, embedding_std=3.0)) == []
    for name, parameter in model.named_parameters():
        assert torch.equal(source.read_full(name), parameter), name


def test_a_folder_written_by_transformers_can_be_read(tmp_path: Path) -> None:
    hf_model = FalconMambaForCausalLM(
        FalconMambaConfig(**hf_config(TINY, 11, "float32"))
    ).bfloat16()
    hf_model.save_pretrained(tmp_path)
    source = HfFolder(tmp_path)
    for name, hf_name in tensor_names(TINY.n_layer):
        expected = hf_model.state_dict()[hf_name].float()
        assert torch.equal(to_hf(name, source.read_full(name)), expected)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", model_of(TINY))
    index = folder / INDEX
    valid = index.read_text()
    index.write_text(valid.replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match="outside its folder"):
        HfFolder(folder)
    raw = json.loads(valid)
    del raw["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="such as lm_head.weight"):
        HfFolder(folder)
    with pytest.raises(ValueError, match="is not a transformers folder"):
        HfFolder(tmp_path / "nowhere")


def test_a_header_is_padded_to_eight_bytes(tmp_path: Path) -> None:
    for length in range(1, 9):
        file = File("one.safetensors", [Entry("D", "x" * length, torch.float32, (2,))])
        folder = tmp_path / str(length)
        folder.mkdir()
        write_files(
            folder,
            Layout([file]),
            lambda name, start, stop: torch.arange(start, stop).float(),
            NO_LOG,
        )
        assert len(file.header) % 8 == 0
        with safe_open(folder / file.name, "pt") as tensors:
            assert torch.equal(tensors.get_tensor("x" * length), torch.tensor([0.0, 1.0]))
