"""Write a run's newest checkpoint as a Hugging Face folder, load it again with transformers and compare the logits.

`python eval/export.py +experiment=NAME` -> runs/NAME/hf, in the layout of tiiuae/falcon-mamba-7b. Weights are streamed
tensor by tensor; memory holds one file's tensors (at most 5e9 bytes) and, for the comparison, both models.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from safetensors.torch import save_file
from torch import Tensor

from data.command import command
from data.config import InputError
from data.loader import tokenizer_path
from data.tokenizer import EOS
from eval import checkpoint
from eval.config import EvaluationConfig
from eval.twin import load as transformers_twin
from model.hf import hf_config, tensor_names, to_hf
from model.mamba import FalconMamba
from model.weights import Pieces, sha256_of

RECORD = "export.json"
MAX_FILE_BYTES = 5_000_000_000
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TOLERANCE = 1e-4  # largest difference of logits, relative to the largest logit: two fp32 implementations


def export(config: EvaluationConfig, max_bytes: int = MAX_FILE_BYTES) -> None:
    """Write, reload, compare; the folder takes its place only when the logits agree."""
    folder = checkpoint.find(config)
    tokenizer = sha256_of(tokenizer_path(config.data))
    made_of = {**checkpoint.identity(folder), "dtype": config.eval.dtype, "tokenizer_sha256": tokenizer}
    record = config.run.folder / RECORD
    if checkpoint.read_result(record) == {**made_of, "files": sizes(config.run.hf)}:
        print(f"reused: {config.run.hf} holds {folder.name}", flush=True)
        return
    try:
        description = hf_config(config.model, EOS, config.eval.dtype)
    except ValueError as error:
        raise InputError(str(error)) from error
    part = config.run.folder / "hf.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"exporting {folder} as {config.eval.dtype}", flush=True)
    write_weights(part, stream(folder, config), max_bytes)
    write_json(part / "config.json", description)
    write_json(part / "generation_config.json", {"bos_token_id": EOS, "eos_token_id": EOS, "pad_token_id": EOS})
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_path(config.data).parent / name, part / name)
    print("loading it with transformers and comparing logits", flush=True)
    difference = compare(part, checkpoint.load(config, folder), getattr(torch, config.eval.dtype))
    if not difference <= TOLERANCE:  # also when it is not a number
        raise InputError(f"transformers' logits differ by {difference:.2e} of the largest; {part} is kept to look at")
    record.unlink(missing_ok=True)
    shutil.rmtree(config.run.hf, ignore_errors=True)
    part.rename(config.run.hf)
    checkpoint.write_result(record, {**made_of, "files": sizes(config.run.hf)})
    print(f"logits agree to {difference:.1e}; the model lies in {config.run.hf}", flush=True)


def sizes(folder: Path) -> dict[str, int]:
    """Size of every file of a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}


def stream(folder: Path, config: EvaluationConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor under transformers' name, shape and order, in the exported type."""
    pieces, dtype = Pieces(folder), getattr(torch, config.eval.dtype)
    for ours, theirs in tensor_names(config.model.n_layer):
        yield theirs, to_hf(ours, pieces.full("param", ours)).to(dtype).contiguous()


def write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> None:
    """Safetensors files of at most max_bytes each, with an index when there are several."""
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    held_bytes = total = 0
    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > max_bytes:
            files.append(_write_part(folder, len(files), held))
            held, held_bytes = {}, 0
        held[name] = tensor
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    files.append(_write_part(folder, len(files), held))
    if len(files) == 1:
        _part(folder, 0).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        _part(folder, number).rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number}.safetensors"


def _write_part(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, _part(folder, number), metadata={"format": "pt"})
    return list(tensors)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write JSON as transformers does: two spaces, sorted keys, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.no_grad()
def compare(folder: Path, model: FalconMamba, dtype: torch.dtype) -> float:
    """Largest difference between the folder's logits in transformers and ours, relative to the largest logit.

    Both compute in fp32, ours from weights that were rounded to the exported type as the folder's were.
    """
    twin = transformers_twin(folder)
    model = model.to(dtype).float()
    tokens = torch.randint(0, model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(0))
    ours, theirs = model.logits(tokens), twin(tokens, use_cache=False).logits
    return float((ours - theirs).abs().max() / theirs.abs().max())


main = command(EvaluationConfig)(export)

if __name__ == "__main__":
    main()
