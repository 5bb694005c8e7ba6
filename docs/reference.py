"""mkdocs hook: generate the page of every config key from the dataclasses and configs/.

A key's meaning is the comment on its field and the one on its value in configs/; MEANINGS holds
those of keys that need no comment in the code.
"""

import ast
import dataclasses
import enum
import inspect
import itertools
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # mkdocs loads a hook by its path

from omegaconf import DictConfig, OmegaConf

from core.command import compose_config
from data.config import BrowseConfig, PrepareConfig, VerifyConfig
from eval.config import EvaluationConfig
from launch.config import SubmitConfig
from launch.planning.dryrun_config import DryRunConfig

PAGE = "config.md"
SCHEMAS = (DryRunConfig, EvaluationConfig, PrepareConfig, SubmitConfig, VerifyConfig, BrowseConfig)
HEAD = """# Every config key

Values are those of `+experiment=7b`; an experiment changes what differs. Any of them is
one override away: `optim.clip_norm=0.5`. A value that no source gives is marked *assumed*.
"""
MEANINGS = {  # of fields whose names need no comment where they are used
    "run.dir": "folder that holds everything the run writes",
    "model.vocab_size": "rows of the embedding and of the head",
    "model.d_model": "width of the residual",
    "model.n_layer": "blocks",
    "model.d_inner": "channels of the mixer",
    "model.d_state": "state elements per channel",
    "model.d_conv": "width of the causal convolution",
    "model.dt_rank": "width of the low-rank projection of the time step",
    "model.dt_max": "see dt_min",
    "model.dt_floor": "see dt_min",
    "data.folder": "folder that data/prepare.py builds and the loader reads",
    "data.tokenizer.vocab_size": "ids of the tokenizer; a trained one gets as many",
    "data.sources.NAME.licence": "SPDX name, kept in the manifest",
    "optim.beta1": "decay of AdamW's first moment",
    "optim.beta2": "decay of AdamW's second moment",
    "optim.eps": "added to the root of the second moment",
    "schedule.min_lr": "rate at the end of the decay",
    "schedule.warmup_tokens": "tokens over which the rate grows linearly from zero",
    "schedule.batch_start_sequences": "batch of the first steps",
    "schedule.batch_end_sequences": "batch after the ramp",
    "schedule.ramp_tokens": "tokens over which the batch grows linearly",
    "checkpoint.every_tokens": "tokens between two saves",
    "checkpoint.keep_last": "number of newest checkpoints to keep",
    "cluster.nodes": "machines",
    "cluster.ranks_per_node": "processes of a machine, one per GPU",
    "generate.prompt": "text that the sample continues",
    "generate.sampling.seed": "seed of the sample",
    "validation.every_tokens": "tokens between two held-out losses",
    "validation.seq_len": "context of the held-out loss",
    "leaderboard.jobs.every_tokens": "tokens between two leaderboards",
    "leaderboard.suite.rows[].label": "its name in tables",
    "leaderboard.suite.rows[].task": "its name in lm-evaluation-harness",
    "leaderboard.suite.rows[].shots": "examples in the prompt",
    "leaderboard.suite.published": "scores of other models, in the order of the rows",
    "data.stages[].name": "shown in metrics and consoles",
    "leaderboard.suite.name": "name of its results' files",
    "slurm.account": "account that the jobs are charged to",
    "executor.poll_seconds": "seconds between two looks at the tasks",
}


def on_files(files: Any, config: Any) -> Any:
    """mkdocs' event: put the generated page among the written ones."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    return files


def page() -> str:
    """The whole page as Markdown."""
    composed = compose_config(["+experiment=7b"])
    sections: dict[str, type] = {}
    for schema in SCHEMAS:
        sections |= typing.get_type_hints(schema)
    single = [name for name, schema in sections.items() if not dataclasses.is_dataclass(schema)]
    notes = {
        name: note
        for schema in SCHEMAS
        for name, note in field_comments(schema).items()
        if name in single
    }
    cells = [
        row(name, type_name(sections.pop(name)), shown(composed.get(name)), notes[name])
        for name in single
    ]
    parts = [HEAD, "\n| key | type | value | meaning |\n|---|---|---|---|", *cells]
    for name, schema in sections.items():
        parts.append(
            f"\n## {name}\n\n{first_sentence(schema)}\n\n| key | type | value | meaning "
            "|\n|---|---|---|---|"
        )
        parts += [
            row(*entry) for entry in entries(schema, composed.get(name), name, comments_of(name))
        ]
    return "\n".join(parts) + "\n"


def entries(
    schema: type, values: Any, prefix: str, yaml: dict[str, str]
) -> list[tuple[str, str, str, str]]:
    """(key, type, value, meaning) of each leaf of a dataclass, or of a table's entries' fields."""
    found = []
    notes = field_comments(schema)
    for name, hint in typing.get_type_hints(schema).items():
        if name not in {field.name for field in dataclasses.fields(schema)}:
            continue
        key, value = f"{prefix}.{name}", raw(values, name)
        note = "; ".join(
            text for text in (notes.get(name) or MEANINGS.get(key), yaml.get(key)) if text
        )
        inner = next(
            (kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)),
            None,
        )
        if inner is None:
            found.append(
                (key, type_name(hint), shown(value), note or first_sentence(schema, of_enum=hint))
            )
            continue
        marks = {"dict": ".NAME", "list": "[]"}
        mark = marks.get(getattr(typing.get_origin(hint), "__name__", ""), "")
        if mark or note:
            found.append((key + mark, type_name(hint), "", note or first_sentence(inner)))
        found += entries(inner, value if not mark else None, key + mark, yaml)
    return found


def raw(values: Any, name: str) -> Any:
    """A value as it is written, interpolations unresolved."""
    return (
        OmegaConf.to_container(values, resolve=False).get(name)
        if isinstance(values, DictConfig)
        else (values or {}).get(name)
    )


def field_comments(schema: type) -> dict[str, str]:
    """The comments above and behind the fields of a dataclass."""
    source = textwrap.dedent(inspect.getsource(schema))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _, _, behind = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
            above = list(itertools.takewhile(is_comment, reversed(lines[: node.lineno - 1])))
            if note := " ".join([*(line.strip()[2:] for line in reversed(above)), behind]).strip():
                found[node.target.id] = note
    return found


def is_comment(line: str) -> bool:
    """Whether a line of Python or YAML is a comment."""
    return line.lstrip().startswith("# ")


def comments_of(section: str) -> dict[str, str]:
    """The comments above and behind the values in a section's files, by full key."""
    found: dict[str, str] = {}
    for path in [
        *sorted((ROOT / "configs" / section).glob("*.yaml")),
        ROOT / "configs" / "config.yaml",
    ]:
        parents = [] if path.name == "config.yaml" else [(-1, section)]
        above: list[str] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
            if is_comment(line):
                above += [line.strip()[2:]] if number else []  # the first line is the file's
            elif match := re.match(r"(\s*)(\w+):[^#]*?(?:\s#\s*(.+))?$", line):
                indent = len(match[1])
                parents = [(at, name) for at, name in parents if at < indent]
                parents.append((indent, match[2]))
                if note := " ".join([*above, match[3] or ""]).strip():
                    found.setdefault(".".join(name for _, name in parents), note)
                above = []
            else:
                above = []
    return found


def first_sentence(schema: type, of_enum: Any = None) -> str:
    """What a docstring says first; of an enum's key the enum's."""
    if of_enum is not None and not (inspect.isclass(of_enum) and issubclass(of_enum, enum.Enum)):
        return ""
    return (inspect.getdoc(of_enum or schema) or "").split("\n\n")[0].replace("\n", " ")


def type_name(hint: Any) -> str:
    """A type as a user writes its values."""
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return re.sub(
        r"\b[\w]+\.(?=\w)",
        "",
        hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint),
    )


def shown(value: Any) -> str:
    """A value, short."""
    if isinstance(value, list | dict) and len(str(value)) > 60:
        return f"{len(value)} entries"
    return "" if value is None else f"`{value}`"


def row(key: str, kind: str, value: str, note: str) -> str:
    """A line of a table; what would end a cell is escaped."""
    cells = (cell.replace("|", r"\|") for cell in (f"`{key}`", kind, value, note))
    return f"| {' | '.join(cells)} |"
