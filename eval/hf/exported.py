"""The record of an export: what it was made from, and size and SHA-256 of every file."""

import logging
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from core.files import sha256_of
from core.records import DamagedRecord, read_typed
from core.run import MANIFEST, RunFiles
from model.checkpoint_records import FileRecord

# names that an export writes, of any version and size
FILES = re.compile(
    r"(model(-\d{5,}-of-\d{5,})?\.safetensors|model\.safetensors\.index\.json|(generation_)?"
    r"config\.json|tokenizer(_config)?\.json|special_tokens_map\.json|export\.json)(\..*\.part)?"
)
logger = logging.getLogger(__name__)

HASH_BYTES_PER_SECOND = 1.5e9  # of SHA-256 on one core, for the log
LOGGED_SECONDS = 2.0  # shorter checks are not announced


@dataclass(frozen=True)
class ExportRecord:
    """Content of `export.json` in the folder of an export."""

    checkpoint: str  # name of its folder
    manifest_sha256: str  # of the checkpoint's manifest
    tokens: int
    dtype: str
    keep_fp32: list[str]
    tokenizer_sha256: str
    files: dict[str, FileRecord]  # all files of the folder but the record


def read_export(folder: Path) -> ExportRecord:
    """Read the record of an export and compare every file but its card with it, by size and hash.

    A file that the record does not name, a link and a folder are faults too. Raises InputError.
    """
    path = RunFiles.export_record(folder)
    if not path.is_file():
        raise InputError(f"{folder} is no complete export: it has no {path.name}")
    record = read_typed(path, ExportRecord)
    card = RunFiles(folder).card.name  # a user may edit or remove it
    expected_files = {name: each for name, each in record.files.items() if name != card}
    found = {each.name for each in folder.iterdir()} - {path.name, card}
    if different := sorted(found ^ expected_files.keys()):
        problem = "is not in" if different[0] in found else "is missing, but in"
        raise InputError(f"{folder / different[0]} {problem} {path.name}")
    for name, expected in expected_files.items():
        status = (folder / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{folder / name} is a link or a folder, not a file of the export")
        if status.st_size != expected.bytes:
            raise InputError(f"{folder / name} has {status.st_size} bytes, not {expected.bytes}")
    total = sum(each.bytes for each in expected_files.values())
    if (seconds := total / HASH_BYTES_PER_SECOND) > LOGGED_SECONDS:
        logger.info(f"hashing {folder}, {total / 1e9:.1f} GB, about {seconds:.0f} s")
    for name, expected in expected_files.items():
        if sha256_of(folder / name) != expected.sha256:
            raise InputError(f"{folder / name} is damaged: its SHA-256 differs from {path.name}")
    return record


def foreign_files(folder: Path) -> list[str]:
    """Names in a folder that no export has written: files of a user, and a card that was edited."""
    if not folder.is_dir():
        return []
    card = RunFiles(folder).card
    own = {card.name} if card.is_file() and sha256_of(card) == recorded_hash(card) else set()
    names = {path.name for path in folder.iterdir()} - own
    return sorted(name for name in names if not FILES.fullmatch(name))


def recorded_hash(path: Path) -> str | None:
    """The hash of a file in the record of its export; None if the record has none."""
    try:
        record = read_typed(RunFiles.export_record(path.parent), ExportRecord)
    except (OSError, DamagedRecord):
        return None
    return record.files[path.name].sha256 if path.name in record.files else None


def require_export(hf_folder: Path, checkpoint: Path) -> None:
    """Raise InputError unless hf_folder is the complete export of a checkpoint folder."""
    try:
        record = read_export(hf_folder)
        if record.checkpoint != checkpoint.name:
            raise InputError(f"{hf_folder} is an export of {record.checkpoint}")
        if record.manifest_sha256 != sha256_of(checkpoint / MANIFEST):
            raise InputError(f"{hf_folder} is an export of another {checkpoint.name}")
    except InputError as error:
        raise InputError(
            f"{hf_folder} is no export of {checkpoint.name} ({error}): run `python eval/export.py` "
            "with the same overrides first"
        ) from error


def check_if_export(folder: Path) -> None:
    """Raise InputError if a Hugging Face folder is an export of ours that was damaged."""
    if RunFiles.export_record(folder).is_file():
        try:
            read_export(folder)
        except InputError as error:
            raise InputError(f"{error}: export or copy the folder again") from error
