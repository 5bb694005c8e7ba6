"""Write a run's newest checkpoint as a Hugging Face folder, load it again with transformers and
compare the logits.

It lies in runs/NAME/hf, in the layout of tiiuae/falcon-mamba-7b, the same bytes from any layout of
ranks. Weights are streamed a few rows at a time: writing takes well under 1 GB at any size of
model. The comparison holds both models where the memory is there, and else one layer of each.

examples:
  python eval/export.py +experiment=demo
"""

import logging
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

import psutil
import torch

from core.command import command
from core.errors import InputError
from core.files import read_json, sha256_of, write_json
from core.run import RunFiles
from data.stream.manifests import tokenizer_path
from data.tokenizer import EOS
from eval.config import EvaluationConfig
from eval.hf.compare import compare, compare_by_layer
from eval.hf.exported import sizes
from eval.subject import export_folder, find_checkpoint, identity_of, load_model
from model.checkpoint import CheckpointReader
from model.flops import parameter_count, parameter_shapes
from model.hf import hf_config, tensor_names, to_hf
from model.hf_writer import MAX_FILE_BYTES, Entry, json_bytes, plan_files, write_files

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# largest difference of logits, relative to the largest logit: two fp32 implementations
TOLERANCE = 1e-4
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
COMPARE_BYTES = 8  # per parameter: two models in fp32


def export(config: EvaluationConfig, max_bytes: int = MAX_FILE_BYTES) -> None:
    """Write, reload, compare; the folder takes its place only when the logits agree."""
    if find_spec("transformers") is None:  # before the weights are written, not after
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    folder = find_checkpoint(config)
    target = export_folder(config, folder)
    record = RunFiles.export_record(target)
    made_of = {
        **identity_of(folder),
        "dtype": config.export.dtype,
        "keep_fp32": config.export.keep_fp32,
        "tokenizer_sha256": sha256_of(tokenizer_path(config.data)),
    }
    if read_json(record) == {**made_of, "files": sizes(target)}:
        logger.info(f"reused: {target} holds {folder.name}")
        return
    try:
        description = hf_config(config.model, EOS, config.export.dtype)
    except ValueError as error:
        raise InputError(str(error)) from error
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    layout = plan_files(entries(config), max_bytes)
    if (free := shutil.disk_usage(config.run.folder).free) < layout.size:
        raise InputError(
            f"the export takes {layout.size / 1e9:.2f} GB, {config.run.folder} has "
            f"{free / 1e9:.2f} GB free"
        )
    part.mkdir(parents=True)
    logger.info(f"exporting {folder} as {config.export.dtype}")
    reader = CheckpointReader(folder)
    write_files(
        part,
        layout,
        lambda name, start, stop: to_hf(name, reader.read_rows("param", name, start, stop)),
        say,
    )
    (part / "config.json").write_bytes(json_bytes(description))
    (part / "generation_config.json").write_bytes(json_bytes(dict.fromkeys(TOKEN_IDS, EOS)))
    for name in TOKENIZER_FILES:
        shutil.copy(tokenizer_path(config.data).parent / name, part / name)
    verify(config, folder, part)
    record.unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    write_json(record, {**made_of, "files": sizes(target)})
    logger.info(f"the model lies in {target}")


def say(line: str) -> None:
    """Progress of a long export."""
    logger.info(f"  {line}")


def entries(config: EvaluationConfig) -> Iterator[Entry]:
    """Every tensor under transformers' name, shape and order, with its exported type."""
    shapes = parameter_shapes(config.model)
    known = {name.rsplit(".", 1)[-1] for name in shapes}
    if odd := sorted(set(config.export.keep_fp32) - known):
        raise InputError(
            f"export.keep_fp32 names {', '.join(odd)}; parameters end in {', '.join(sorted(known))}"
        )
    for ours, theirs in tensor_names(config.model.n_layer):
        kept = ours.rsplit(".", 1)[-1] in config.export.keep_fp32
        dtype = torch.float32 if kept else getattr(torch, config.export.dtype)
        shape = to_hf(ours, torch.empty(shapes[ours], device="meta")).shape
        yield Entry(ours, theirs, dtype, tuple(shape))


def verify(config: EvaluationConfig, folder: Path, part: Path) -> None:
    """Read the written folder with transformers and compare logits; InputError when they differ."""
    needed, free = COMPARE_BYTES * parameter_count(config.model), psutil.virtual_memory().available
    logger.info("loading it with transformers and comparing logits")
    if needed <= free:
        difference = compare(part, load_model(config, folder), entries(config))
    else:
        logger.info(
            f"  layer by layer: two models take {needed / 2**30:.0f} GiB, {free / 2**30:.0f} GiB "
            "are free"
        )
        difference = compare_by_layer(part, CheckpointReader(folder), config.model, entries(config))
    if not difference <= TOLERANCE:  # also when it is not a number
        raise InputError(
            f"transformers' logits differ by {difference:.2e} of the largest; {part} is kept to "
            "look at"
        )
    logger.info(f"logits agree to {difference:.1e}")


main = command(EvaluationConfig)(export)

if __name__ == "__main__":
    main()
