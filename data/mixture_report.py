"""Print tokens and epochs per source and stage of a run, before or after its data is prepared.

Exits with an error if the plan reads a source more often than its max_epochs. A source without
shards counts with its expected_tokens.

examples:
  python data/mixture_report.py +experiment=7b
  python data/mixture_report.py +experiment=7b data.sources.web.expected_tokens=2e12
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from core.command import command
from data.config import DataConfig
from data.stream.manifests import actual_or_expected_tokens
from data.stream.mixture import Plan
from data.stream.packing import plan_table


@dataclass
class MixtureConfig:
    """Config sections of data/mixture_report.py."""

    data: DataConfig


@command(MixtureConfig)
def main(cfg: MixtureConfig) -> None:
    """Print the mixture of a composed config."""
    tokens, expected = actual_or_expected_tokens(cfg.data)
    started_at = time.perf_counter()
    plan = Plan(cfg.data, tokens, dict.fromkeys(tokens, "expected"))
    seconds = time.perf_counter() - started_at
    print("\n".join(plan_table(plan)))
    print(f"\ncompiled in {seconds:.3f} s; not prepared yet: {', '.join(expected) or 'none'}")


if __name__ == "__main__":
    main()
