"""Export a run's newest checkpoint to Hugging Face format and verify it with transformers.

Writes runs/NAME/hf in the layout of tiiuae/falcon-mamba-7b; the bytes do not depend on the layout
of ranks. Weights are streamed a few rows at a time: writing takes well under 1 GB at any model
size. The verification compares logits with both models in memory, or layer by layer if they do
not fit.

examples:
  python eval/export.py +experiment=demo
"""

import logging
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

import psutil
import torch

from core.command import command
from core.errors import InputError
from core.files import (
    TEMP_SUFFIX,
    make_folder,
    publish_folder,
    sha256_of,
    write_bytes,
    write_json,
    write_text,
)
from core.run import RunFiles
from data.stream.manifests import tokenizer_path
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig
from eval.hf.card import model_card
from eval.hf.compare import compare, compare_by_layer
from eval.hf.exported import ExportRecord, foreign_files, read_export
from eval.hf.llama_cpp import log_lines
from eval.hf.tokenizer import check_tokenizer, token_ids, write_tokenizer
from eval.model_source import (
    checkpoint_provenance,
    export_folder,
    find_checkpoint,
    load_model,
)
from model.checkpoint import CheckpointReader
from model.checkpoint_records import FileRecord
from model.flops import parameter_count, parameter_shapes
from model.hf import hf_config, tensor_names, to_hf
from model.hf_writer import MAX_FILE_BYTES, Entry, json_bytes, plan_files, write_files

logger = logging.getLogger(__name__)

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# max difference of logits relative to the largest logit, between two fp32 implementations
TOLERANCE = 1e-4
COMPARE_BYTES = 8  # per parameter: two models in fp32


def export(config: EvaluationConfig, max_bytes: int = MAX_FILE_BYTES) -> None:
    """Write a temporary folder, verify it, then rename it to its final name."""
    if find_spec("transformers") is None:  # fail before the weights are written
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
    checkpoint = find_checkpoint(config)
    target = export_folder(config, checkpoint)
    temp_folder = target.with_name(f"{target.name}{TEMP_SUFFIX}")
    record = ExportRecord(
        **checkpoint_provenance(checkpoint),
        dtype=config.export.dtype,
        keep_fp32=list(config.export.keep_fp32),
        tokenizer_sha256=sha256_of(tokenizer_path(config.data)),
        files={},
    )
    if reuse(temp_folder, target, record):
        logger.info(f"reused: {target} already contains {checkpoint.name}, all hashes agree")
        return
    eos, pad = token_ids(tokenizer_path(config.data))
    try:
        hf_config_json = hf_config(config.model, eos, config.export.dtype, pad)
    except ValueError as error:
        raise InputError(str(error)) from error
    if foreign := foreign_files(target):
        raise InputError(
            f"{target} has {', '.join(foreign)}, which is not the export's: move it away, since a "
            "new export replaces the folder"
        )
    shutil.rmtree(temp_folder, ignore_errors=True)
    tokenizer = load_tokenizer(tokenizer_path(config.data))
    card = model_card(config.run.folder, checkpoint, config.model, tokenizer)
    layout = plan_files(entries(config), max_bytes)
    if (free := shutil.disk_usage(config.run.folder).free) < layout.size:
        raise InputError(
            f"the export needs {layout.size / 1e9:.2f} GB, {config.run.folder} has "
            f"{free / 1e9:.2f} GB free: free some space"
        )
    make_folder(temp_folder)
    logger.info(f"exporting {checkpoint} as {config.export.dtype}")
    reader = CheckpointReader(checkpoint)
    reader.require(parameter_shapes(config.model), ("param",))
    hashes = write_files(
        temp_folder,
        layout,
        lambda name, start, stop: to_hf(name, reader.read_rows("param", name, start, stop)),
        log_progress,
    )
    write_bytes(temp_folder / "config.json", json_bytes(hf_config_json))
    generation_config = {key: hf_config_json[key] for key in TOKEN_IDS}
    write_bytes(temp_folder / "generation_config.json", json_bytes(generation_config))
    write_tokenizer(tokenizer_path(config.data), temp_folder)
    check_tokenizer(tokenizer_path(config.data), temp_folder, config.model.vocab_size)
    verify(config, checkpoint, temp_folder)
    write_text(RunFiles(temp_folder).card, card)
    files = {
        path.name: FileRecord(path.stat().st_size, hashes.get(path.name) or sha256_of(path))
        for path in sorted(temp_folder.iterdir())
    }
    write_json(RunFiles.export_record(temp_folder), asdict(replace(record, files=files)))
    publish_folder(temp_folder, target)
    for line in log_lines(config.model, tokenizer):
        logger.info(line)
    logger.info(f"exported to {target}")


def reuse(temp_folder: Path, target: Path, expected: ExportRecord) -> bool:
    """Whether `target` is whole and as expected, also by a rename that a kill prevented."""
    for folder in (target, temp_folder):
        try:
            found = read_export(folder)
        except InputError as error:
            if folder.is_dir() and folder == target:
                logger.info(f"exporting again: {error}")
            continue
        if replace(found, files={}) == expected:
            if folder == temp_folder:
                publish_folder(temp_folder, target)
            for suffix in (TEMP_SUFFIX, f".old{TEMP_SUFFIX}"):  # left by a killed export
                shutil.rmtree(target.with_name(target.name + suffix), ignore_errors=True)
            return True
    return False


def log_progress(line: str) -> None:
    """Log a line of progress, indented."""
    logger.info(f"  {line}")


def entries(config: EvaluationConfig) -> Iterator[Entry]:
    """Yield every tensor in transformers' order, with its transformers name, shape and dtype."""
    shapes = parameter_shapes(config.model)
    known = {name.rsplit(".", 1)[-1] for name in shapes}
    if unknown := sorted(set(config.export.keep_fp32) - known):
        raise InputError(
            f"export.keep_fp32 names {', '.join(unknown)}; parameters end in "
            f"{', '.join(sorted(known))}"
        )
    for name, hf_name in tensor_names(config.model.n_layer):
        keep_fp32 = name.rsplit(".", 1)[-1] in config.export.keep_fp32
        dtype = torch.float32 if keep_fp32 else getattr(torch, config.export.dtype)
        shape = to_hf(name, torch.empty(shapes[name], device="meta")).shape
        yield Entry(name, hf_name, dtype, tuple(shape))


def verify(config: EvaluationConfig, checkpoint: Path, exported: Path) -> None:
    """Load the exported folder with transformers; raise InputError if logits differ from ours."""
    needed = COMPARE_BYTES * parameter_count(config.model)
    free = psutil.virtual_memory().available
    logger.info("loading the export with transformers and comparing logits")
    if needed <= free:
        difference = compare(exported, load_model(checkpoint), entries(config))
    else:
        logger.info(
            f"  layer by layer: two models need {needed / 2**30:.0f} GiB, "
            f"{free / 2**30:.0f} GiB are free"
        )
        difference = compare_by_layer(
            exported, CheckpointReader(checkpoint), config.model, entries(config)
        )
    if not difference <= TOLERANCE:  # true for NaN as well
        raise InputError(
            f"transformers' logits differ by {difference:.2e} of the largest logit, allowed "
            f"{TOLERANCE:.0e}; inspect {exported}"
        )
    logger.info(f"logits agree to {difference:.1e}")


main = command(EvaluationConfig)(export)

if __name__ == "__main__":
    main()
