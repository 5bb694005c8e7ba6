"""The published files' sizes from shapes alone, the same bytes from any layout of ranks, and the
way back.
"""

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
from model.sharding import shard
from tests.compose import run_config
from tests.tiny import TINY, model_of

SILENT: Callable[[str], None] = lambda line: None  # noqa: E731


def entries(
    config: ModelConfig, kept: tuple[str, ...] = (), dtype: torch.dtype = torch.bfloat16
) -> list[Entry]:
    shapes = parameter_shapes(config)
    return [
        Entry(ours, theirs, torch.float32 if ours.rsplit(".", 1)[-1] in kept else dtype,
              tuple(to_hf(ours, torch.empty(shapes[ours], device="meta")).shape))
        for ours, theirs in tensor_names(config.n_layer)
    ]  # fmt: skip


def test_the_released_7b_to_the_byte() -> None:
    """Sizes of tiiuae/falcon-mamba-7b's files; with A_log in fp32, of its first file before July 23
    of 2024.
    """
    config = run_config("7b").model
    layout = plan_files(iter(entries(config)))
    assert [file.size for file in layout.files] == [4_956_184_024, 4_987_536_920, 4_601_680_888]
    assert [len(file.entries) for file in layout.files] == [216, 234, 193]
    assert layout.index is not None and len(layout.index) == 50_922
    assert json.loads(layout.index)["metadata"] == {"total_size": 14_545_330_176}
    places = json.loads(layout.index)["weight_map"]
    assert (
        places["backbone.layers.21.mixer.conv1d.bias"]
        != places["backbone.layers.21.mixer.in_proj.weight"]
    )
    assert (
        places["backbone.layers.44.mixer.dt_proj.bias"]
        != places["backbone.layers.44.mixer.out_proj.weight"]
    )
    assert plan_files(iter(entries(config, kept=("A_log",)))).files[0].size == 4_961_951_048


@pytest.mark.parametrize("kept", [(), ("A_log", "D")])
def test_files_are_what_safetensors_writes(tmp_path: Path, kept: tuple[str, ...]) -> None:
    model = model_of(TINY)
    layout = plan_files(iter(entries(TINY, kept)), max_bytes=10_000)
    assert len(layout.files) > 2
    (tmp_path / "ours").mkdir()
    write_files(tmp_path / "ours", layout, rows_of(model), SILENT)
    for file in layout.files:
        tensors = {
            e.hf_name: to_hf(e.name, model.get_parameter(e.name).detach()).to(e.dtype)
            for e in file.entries
        }
        save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / "ours" / file.name).read_bytes() == (tmp_path / "theirs").read_bytes(), (
            file.name
        )


def test_transformers_cuts_and_names_the_same(tmp_path: Path) -> None:
    hf_model = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(TINY, 11, "float32")))
    hf_model.save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    state = hf_model.state_dict()
    ours = dict(tensor_names(TINY.n_layer))
    layout = plan_files(iter(entries(TINY, dtype=torch.float32)), max_bytes=20_000)
    (tmp_path / "ours").mkdir()
    write_files(
        tmp_path / "ours", layout, lambda name, start, stop: state[ours[name]][start:stop], SILENT
    )
    names = sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert len(names) > 3 and names == sorted(
        path.name for path in (tmp_path / "theirs").glob("model*")
    )
    for name in names:
        if name != INDEX:  # transformers counts parameters there too
            assert (tmp_path / "ours" / name).read_bytes() == (
                tmp_path / "theirs" / name
            ).read_bytes(), name
    mine, theirs = (
        json.loads((tmp_path / side / INDEX).read_text()) for side in ("ours", "theirs")
    )
    assert mine["weight_map"] == theirs["weight_map"]
    assert mine["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def rows_of(model: FalconMamba) -> Callable[[str, int, int], Tensor]:
    return lambda name, start, stop: to_hf(name, model.get_parameter(name).detach()[start:stop])


def write_pieces(folder: Path, model: FalconMamba, tp: int, dp: int) -> None:
    """A checkpoint's weights as tp x dp ranks of ZeRO-1 leave them, cut anywhere inside a
    tensor.
    """
    folder.mkdir()
    files = {}
    for tp_rank in range(tp):
        for dp_rank in range(dp):
            stem, pieces, tensors = f"rank-{tp_rank * dp + dp_rank:05d}", [], {}
            for name, parameter in model.named_parameters():
                flat = shard(name, parameter.detach(), tp_rank, tp).flatten()
                low, high = (len(flat) * (dp_rank + side) // dp for side in (0, 1))
                piece = TensorShard(
                    "param", name, tuple(parameter.shape), tp_rank, tp, low, high - low
                )
                pieces.append(asdict(piece))
                tensors[piece.key] = flat[low:high].clone()
            save_file(tensors, folder / f"{stem}.safetensors")
            (folder / f"{stem}.json").write_text(json.dumps(pieces))
            files |= {
                f"{stem}.{kind}": {"bytes": 0, "sha256": ""} for kind in ("json", "safetensors")
            }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (1, 3), (2, 1), (4, 2), (8, 5)])
def test_every_layout_of_ranks_exports_the_same_bytes(
    tmp_path: Path, tp: int, dp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a few rows at a time, across the borders of ranks
    monkeypatch.setattr("model.hf_writer.CHUNK", 100)
    model = model_of(TINY, seed=3)
    write_pieces(tmp_path / "step", model, tp, dp)
    pieces = CheckpointReader(tmp_path / "step")
    layout = plan_files(iter(entries(TINY, dtype=torch.float32)), max_bytes=30_000)
    for name, rows in (
        ("direct", rows_of(model)),
        (
            "ranks",
            lambda name, start, stop: to_hf(name, pieces.read_rows("param", name, start, stop)),
        ),
    ):
        (tmp_path / name).mkdir()
        write_files(tmp_path / name, layout, rows, SILENT)
    for file in layout.files:
        assert (tmp_path / "ranks" / file.name).read_bytes() == (
            tmp_path / "direct" / file.name
        ).read_bytes()
    name = "layers.0.mixer.in_proj.weight"
    assert torch.equal(pieces.read_full("param", name), model.get_parameter(name))


def hf_folder(folder: Path, model: FalconMamba, **changes: object) -> Path:
    folder.mkdir()
    layout = plan_files(iter(entries(TINY, dtype=torch.float32)), max_bytes=30_000)
    write_files(folder, layout, rows_of(model), SILENT)
    (folder / "config.json").write_text(json.dumps({**hf_config(TINY, 11, "float32"), **changes}))
    return folder


def test_the_way_back(tmp_path: Path) -> None:
    model = model_of(TINY, seed=4)
    # Falcon3-Mamba-7B-Base states eps 1e-5 for the mixer's norms too
    source = HfFolder(
        hf_folder(tmp_path / "hf", model, mixer_rms_eps=1e-5, eos_token_id=0, pad_token_id=0)
    )
    assert source.config.mixer_norm_eps == 1e-5 and source.config.d_inner == 48
    assert config_differences(source.config, TINY) == ["model.mixer_norm_eps=1e-05"]
    assert config_differences(source.config, replace(source.config, embedding_std=3.0)) == []
    for name, parameter in model.named_parameters():
        assert torch.equal(source.read_full(name), parameter), name


def test_a_folder_of_transformers_own_making_is_read(tmp_path: Path) -> None:
    hf_model = FalconMambaForCausalLM(
        FalconMambaConfig(**hf_config(TINY, 11, "float32"))
    ).bfloat16()
    hf_model.save_pretrained(tmp_path)
    source = HfFolder(tmp_path)
    for ours, theirs in tensor_names(TINY.n_layer):
        assert torch.equal(
            to_hf(ours, source.read_full(ours)), hf_model.state_dict()[theirs].float()
        )


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder = hf_folder(tmp_path / "hf", model_of(TINY))
    index = folder / INDEX
    good = index.read_text()
    index.write_text(good.replace("model-00001", "../model-00001"))
    with pytest.raises(ValueError, match="outside its folder"):
        HfFolder(folder)
    raw = json.loads(good)
    del raw["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="such as lm_head.weight"):
        HfFolder(folder)
    with pytest.raises(ValueError, match="no folder of transformers' layout"):
        HfFolder(tmp_path / "nowhere")


def test_a_header_is_padded_to_eight_bytes(tmp_path: Path) -> None:
    for length in range(1, 9):
        file = File("one.safetensors", [Entry("D", "x" * length, torch.float32, (2,))])
        write_files(
            tmp_path / str(length) if (tmp_path / str(length)).mkdir() is None else tmp_path,
            Layout([file]),
            lambda name, start, stop: torch.arange(start, stop).float(),
            SILENT,
        )
        assert len(file.header) % 8 == 0
        with safe_open(tmp_path / str(length) / file.name, "pt") as read:
            assert torch.equal(read.get_tensor("x" * length), torch.tensor([0.0, 1.0]))
