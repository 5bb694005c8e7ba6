"""Short keys of commands that read a model: `checkpoint=FOLDER` and `prompt=TEXT`."""

from pathlib import Path

from core.errors import exit_with_error
from core.quote import hydra_override
from core.run import RunFiles

SHORT_KEYS = {"checkpoint": "run.checkpoint", "prompt": "generate.prompt"}
NAMES_RUN = {"+experiment", "experiment", "run.name"}


def expand_short_keys(arguments: list[str]) -> list[str]:
    """Replace the short keys of a command line; their values are taken as they are.

    Without an experiment, `checkpoint=` also sets run.name and run.dir to those of the checkpoint's
    run. Hydra would read the word as a value of the `checkpoint` section. Exits in one line where
    nothing names a model.
    """
    pairs = [argument.split("=", 1) for argument in arguments]
    expanded = [
        hydra_override(SHORT_KEYS[key], value[0])
        if key in SHORT_KEYS and value
        else "=".join([key, *value])
        for key, *value in pairs
    ]
    given = {key: value[0] for key, *value in pairs if value}
    if NAMES_RUN & given.keys():
        return expanded
    if "checkpoint" in given:
        run = run_folder(Path(given["checkpoint"]).resolve())
        # first, because Hydra accepts no overrides after options
        expanded = [
            hydra_override("run.name", run.name or "root"),
            hydra_override("run.dir", str(run)),
            *expanded,
        ]
    elif not any(argument.startswith("-") for argument in arguments):
        exit_with_error(
            "no model: add checkpoint=FOLDER (a run, a checkpoint or a folder of transformers) or "
            "+experiment=NAME"
        )
    return expanded


def run_folder(folder: Path) -> Path:
    """The folder of the run that a run's folder, its checkpoints, one of them or an export is of.

    For a folder of another origin it is the folder around it.
    """
    if RunFiles(folder).checkpoints.is_dir():
        return folder
    run = folder.parent.parent
    return run if folder.parent == RunFiles(run).checkpoints else folder.parent
