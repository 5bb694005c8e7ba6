"""mkdocs hook: generate the page of every config key from the dataclasses and configs/, and copy
the README of data/, train/ and eval/ into the site.

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

from core.compose import compose_config
from core.ranges import range_of
from core.schema import without_none
from data.config import BrowseConfig, PrepareConfig, VerifyConfig
from eval.config import EvaluationConfig
from launch.config import SubmitConfig
from launch.planning.dryrun_config import DryRunConfig

PAGE = "config.md"
READMES = ("data", "train", "eval")  # folders; their READMEs become the pages data.md, ...
SCHEMAS = (DryRunConfig, EvaluationConfig, PrepareConfig, SubmitConfig, VerifyConfig, BrowseConfig)
HEAD = """# Every config key

Values are those of `+experiment=7b`. Override any of them on the command line:
`optim.clip_norm=0.5`. Values without a published source are marked *assumed*; in a checkout
`grep -rn assumed: configs/` lists them. An empty value is `null`.
"""
STAGES = """
### Stages of `7b`

The sources' shares of tokens in percent. The paper (arXiv 2410.05355) has tokens and shares only in
its figure 1, without numbers: all of them are *assumed*, except the tokens of the decay (model
card). The share of instructions is published; that it is of the decay stage is assumed.

| stage | tokens | seq_len | shares | note |
|---|---|---|---|---|
"""
SOURCES = """
### Sources of `7b`

`expected_tokens` plans a run before the data is prepared. The web's is the model card's; the others
are *assumed*, and so is every `max_epochs` except that of instructions (4 epochs).

| source | recipe | expected_tokens | max_epochs | note |
|---|---|---|---|---|
"""
OFF = {  # keys that their value 0 switches off
    "optim.z_loss",
    "optim.weight_decay",
    "schedule.ramp_tokens",
    "schedule.warmup_tokens",
    "schedule.decay_tokens",
    "train.profile.steps",
    "slurm.max_restarts",
    "health.max_rollbacks",
}
MEANINGS = {  # of fields without a comment in the code
    "run.dir": "folder that holds everything the run writes",
    "model.vocab_size": "rows of the embedding and the head",
    "model.d_model": "width of the residual stream",
    "model.n_layer": "blocks",
    "model.d_inner": "channels of the mixer",
    "model.d_state": "state elements per channel",
    "model.d_conv": "kernel size of the causal convolution",
    "model.dt_rank": "width of the low-rank projection of the time step",
    "model.dt_max": "see dt_min",
    "model.dt_floor": "see dt_min",
    "data.folder": "folder that data/prepare.py writes and the loader reads",
    "data.tokenizer.vocab_size": "number of ids; a trained tokenizer gets as many",
    "data.sources.NAME.licence": "SPDX name, stored in the manifest",
    "optim.beta1": "decay of AdamW's first moment",
    "optim.beta2": "decay of AdamW's second moment",
    "optim.eps": "added to the root of the second moment",
    "schedule.min_lr": "learning rate at the end of the decay",
    "schedule.warmup_tokens": "tokens over which the learning rate rises linearly from zero",
    "schedule.batch_start_sequences": "batch size of the first steps, in sequences",
    "schedule.batch_end_sequences": "batch size after the ramp, in sequences",
    "schedule.ramp_tokens": "tokens over which the batch grows linearly",
    "checkpoint.every_tokens": "tokens between two saves",
    "checkpoint.keep_last": "number of newest checkpoints to keep",
    "cluster.nodes": "number of machines",
    "cluster.ranks_per_node": "processes per machine, one per GPU",
    "generate.prompt": "text that the sample continues",
    "generate.sampling.seed": "seed of the sample",
    "validation.every_tokens": "tokens between two validations",
    "validation.seq_len": "context length of validation",
    "leaderboard.jobs.every_tokens": "tokens between two leaderboards",
    "leaderboard.suite.rows[].label": "name in tables",
    "leaderboard.suite.rows[].task": "name in lm-evaluation-harness",
    "leaderboard.suite.rows[].shots": "examples in the prompt",
    "leaderboard.suite.published": "published scores of other models, in the order of the rows",
    "data.stages[].name": "name shown in metrics and on the console",
    "leaderboard.suite.name": "name of the suite, part of the names of its result files",
    "slurm.account": "account that the jobs are charged to",
    "executor.poll_seconds": "seconds between two polls of the tasks",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to the site (an event hook of mkdocs)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=page()))
    for folder in READMES:
        files.append(File.generated(config, f"{folder}.md", content=readme_page(folder)))
    return files


def readme_page(folder: str) -> str:
    """README of a folder, with links into docs/ rewritten and others reduced to their text."""
    text = (ROOT / folder / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\(\.\./docs/(?:pages/)?", "](", text)
    return re.sub(r"\[([^]]+)\]\((?!https?:|#|design/|log/|\w+\.md)[^)]*\)", r"\1", text)


def page() -> str:
    """The page as Markdown."""
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
        row(name, type_name(sections.pop(name)), format_value(composed.get(name)), notes[name])
        for name in single
    ]
    parts = [HEAD]
    if cells:
        parts += ["\n| key | type | value | meaning |\n|---|---|---|---|", *cells]
    for name, schema in sections.items():
        parts.append(
            f"\n## {name}\n\n{first_sentence(schema)}\n\n| key | type | value | meaning "
            "|\n|---|---|---|---|"
        )
        parts += [
            row(*entry) for entry in entries(schema, composed.get(name), name, comments_of(name))
        ]
        if name == "data":
            parts += data_tables(composed.data)
    return "\n".join(parts) + "\n"


def data_tables(data: Any) -> list[str]:
    """Tables of the stages and sources of a data set, with the comments of their file."""
    text = (ROOT / "configs" / "data" / "falcon_mamba.yaml").read_text(encoding="utf-8")
    notes = dict(re.findall(r"^  - name: ([\w-]+)  # (.+)$", text, re.M))
    stages = [
        table_row(
            stage.name,
            short_count(stage.tokens),
            f"{stage.seq_len:,}",
            ", ".join(f"{source} {share:g}" for source, share in stage.mixture.items()),
            notes[stage.name],
        )
        for stage in data.stages
    ]
    notes = dict(re.findall(r"^  (\w+):  # (.+)$", text, re.M))
    sources = [
        table_row(
            name,
            f"`{source.recipe}`",
            short_count(source.expected_tokens),
            f"{source.max_epochs:g}",
            notes.get(name, ""),
        )
        for name, source in data.sources.items()
    ]
    return [STAGES + "\n".join(stages), SOURCES + "\n".join(sources)]


def short_count(tokens: int) -> str:
    """A count of tokens in its largest unit: 2.5T, 40G."""
    return f"{tokens / 1e12:g}T" if tokens >= 1e12 else f"{tokens / 1e9:g}G"


def entries(
    schema: type, values: Any, prefix: str, yaml: dict[str, str]
) -> list[tuple[str, str, str, str]]:
    """(key, type, value, meaning) of each leaf field of a dataclass."""
    rows = []
    notes = field_comments(schema)
    annotated = typing.get_type_hints(schema, include_extras=True)
    for name, hint in typing.get_type_hints(schema).items():
        if name not in {field.name for field in dataclasses.fields(schema)}:
            continue
        key = f"{prefix}.{name}"
        value = raw_value(values, name)
        note = join_notes(notes.get(name) or MEANINGS.get(key), yaml.get(key))
        inner = next(
            (kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)),
            None,
        )
        if inner is None:
            rows.append(
                (
                    key,
                    type_name(hint) + range_text(annotated[name]),
                    format_value(value) + (" (off)" if key in OFF and value == 0 else ""),
                    note or first_sentence(schema, of_enum=hint),
                )
            )
            continue
        suffixes = {"dict": ".NAME", "list": "[]"}
        suffix = suffixes.get(getattr(typing.get_origin(hint), "__name__", ""), "")
        if suffix or note:
            rows.append((key + suffix, type_name(hint), "", note or first_sentence(inner)))
        rows += entries(inner, value if not suffix else None, key + suffix, yaml)
    return rows


def join_notes(meaning: str | None, value_note: str | None) -> str:
    """A field's meaning and the comment on its value, without what is said twice."""
    if meaning and value_note and value_note in meaning:
        return meaning
    return "; ".join(text for text in (meaning, value_note) if text)


def raw_value(values: Any, name: str) -> Any:
    """A value with interpolations unresolved."""
    return (
        OmegaConf.to_container(values, resolve=False).get(name)
        if isinstance(values, DictConfig)
        else (values or {}).get(name)
    )


def field_comments(schema: type) -> dict[str, str]:
    """Comments of the fields of a dataclass: above, and at the end of the line."""
    source = textwrap.dedent(inspect.getsource(schema))
    lines = source.splitlines()
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    comments = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _, _, trailing = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")
            above = list(itertools.takewhile(is_comment, reversed(lines[: node.lineno - 1])))
            if note := " ".join(
                [*(line.strip()[2:] for line in reversed(above)), trailing]
            ).strip():
                comments[node.target.id] = note
    return comments


def is_comment(line: str) -> bool:
    """Whether a line of Python or YAML is a comment."""
    return line.lstrip().startswith("# ")


def comments_of(section: str) -> dict[str, str]:
    """Comments of the values in the files of a config section, by full key."""
    comments: dict[str, str] = {}
    for path in [
        *sorted((ROOT / "configs" / section).glob("*.yaml")),
        ROOT / "configs" / "config.yaml",
    ]:
        parents = [] if path.name == "config.yaml" else [(-1, section)]
        above: list[str] = []
        lines = path.read_text(encoding="utf-8").splitlines()
        # the comment at the top describes the file
        for line in itertools.dropwhile(is_comment, lines):
            if is_comment(line):
                above.append(line.strip()[2:])
            elif match := re.match(r"(\s*)(\w+):[^#]*?(?:\s#\s*(.+))?$", line):
                indent = len(match[1])
                parents = [(at, name) for at, name in parents if at < indent]
                parents.append((indent, match[2]))
                if note := " ".join([*above, match[3] or ""]).strip():
                    comments.setdefault(".".join(name for _, name in parents), note)
                above = []
            else:
                above = []
    return comments


def first_sentence(schema: type, of_enum: Any = None) -> str:
    """First paragraph of the docstring of a dataclass, or of the enum for a key of that type."""
    if of_enum is not None and not (inspect.isclass(of_enum) and issubclass(of_enum, enum.Enum)):
        return ""
    return (inspect.getdoc(of_enum or schema) or "").split("\n\n")[0].replace("\n", " ")


def type_name(hint: Any) -> str:
    """A type, or the values of an enum, for users."""
    if inspect.isclass(hint) and issubclass(hint, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return re.sub(
        r"\b[\w]+\.(?=\w)",
        "",
        hint.__name__ if inspect.isclass(hint) and not typing.get_args(hint) else str(hint),
    )


def range_text(hint: Any) -> str:
    """The range that a field's annotation declares for its number, or for those of its entries."""
    hint = without_none(hint)
    if typing.get_origin(hint) in (list, dict):
        return range_text(typing.get_args(hint)[-1])
    limits = range_of(hint)
    return "" if limits is None else f", {limits.text()}"


def format_value(value: Any) -> str:
    """A value; the number of entries for a long list or dict."""
    if isinstance(value, list | dict) and len(str(value)) > 60:
        return f"{len(value)} entries"
    return "" if value is None else f"`{value}`"


def row(key: str, kind: str, value: str, note: str) -> str:
    """The table row of a key."""
    return table_row(f"`{key}`", kind, value, note)


def table_row(*cells: str) -> str:
    """A table row with `|` escaped."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
