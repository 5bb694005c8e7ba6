"""What an exported folder was made of, and whether it is untouched."""

from pathlib import Path

from core.errors import InputError
from core.files import read_json
from core.run import RunFiles


def require_export(home: Path, folder: Path) -> None:
    """Raise InputError unless `home` is the untouched export of a checkpoint folder."""
    record = read_json(RunFiles.export_record(home))
    if record.get("checkpoint") != folder.name or sizes(home) != record["files"]:
        raise InputError(
            f"{home} does not hold {folder.name}: run `python eval/export.py`, same overrides, "
            "first"
        )


def sizes(folder: Path) -> dict[str, int]:
    """Size of every file of a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*"))}
