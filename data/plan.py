"""What a run would read, before or after its data is prepared: `python data/plan.py +experiment=7b`.

Prints tokens and epochs per source and stage, and refuses a plan that reads a source too often. Sources without shards
count with their expected_tokens.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.command import command
from data.config import DataConfig, InputError
from data.loader import source_folder
from data.mixture import Plan
from data.packing import plan_table
from data.shards import MANIFEST, read_manifest


@dataclass
class PlanConfig:
    """The section of the config that this program reads."""

    data: DataConfig


def sizes(cfg: DataConfig) -> tuple[dict[str, int], list[str]]:
    """Train tokens of every source, and the names of those that are only expected."""
    tokens, expected = {}, []
    for name, source in cfg.sources.items():
        folder = source_folder(cfg, name)
        if (folder / MANIFEST).is_file():
            tokens[name] = read_manifest(folder).tokens("train")
        elif source.expected_tokens:
            tokens[name] = source.expected_tokens
            expected.append(name)
        else:
            raise InputError(
                f"source {name} has no shards in {folder} and no expected_tokens: prepare it, or say how many it has"
            )
    return tokens, expected


@command(PlanConfig)
def main(cfg: PlanConfig) -> None:
    """Print the plan of a composed config."""
    tokens, expected = sizes(cfg.data)
    begun = time.perf_counter()
    plan = Plan(cfg.data, tokens, dict.fromkeys(tokens, "expected"))
    seconds = time.perf_counter() - begun
    print("\n".join(plan_table(plan)))
    print(f"\ncompiled in {seconds:.3f} s; not prepared yet: {', '.join(expected) or 'none'}")


if __name__ == "__main__":
    main()
