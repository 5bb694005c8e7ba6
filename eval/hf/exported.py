"""Check that an exported folder matches its record."""

from pathlib import Path

from core.errors import InputError
from core.files import read_json
from core.run import RunFiles


def require_export(hf_folder: Path, checkpoint: Path) -> None:
    """Raise InputError unless hf_folder is the complete export of a checkpoint folder."""
    record = read_json(RunFiles.export_record(hf_folder))
    if record.get("checkpoint") != checkpoint.name or file_sizes(hf_folder) != record["files"]:
        raise InputError(
            f"{hf_folder} is no export of {checkpoint.name}: run `python eval/export.py` with the "
            "same overrides first"
        )


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}
