"""Look whether the shards of a data set are what their manifests say, and what a run would read of
them.

Hashes every byte again, counts end tokens, decodes and encodes random documents, and prints tokens,
epochs and packing. Ends with exit code 2 at a fault.

examples:
  python data/verify.py +experiment=demo
  python data/verify.py +experiment=7b verify.hashes=false    # compares sizes, in seconds
"""

import sys
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from core.command import command
from core.errors import InputError
from data import tokenizer
from data.config import DataConfig, VerifyConfig, VerifySettings
from data.pipeline.shard import describe
from data.recipes import MEGATRON
from data.stream.documents import Documents
from data.stream.loader import compile_plan
from data.stream.manifests import SPLITS, Manifest, open_manifests, source_folder, tokenizer_path
from data.stream.mixture import Plan
from data.stream.packing import packing_table, plan_table


def verify_source(
    cfg: DataConfig, name: str, manifest: Manifest, settings: VerifySettings
) -> list[str]:
    """Faults of one source; prints a line for every file and split."""
    folder, faults = source_folder(cfg, name), []
    vocabulary = tokenizer.load(tokenizer_path(cfg))
    vocabulary.encode_special_tokens = True
    for split in SPLITS:
        for file in manifest.splits[split] if settings.hashes else ():
            try:
                found = describe(folder / file.name)
            except (AssertionError, OSError, ValueError) as error:
                faults.append(f"{name}: {error}")
                continue
            if found != file:
                faults.append(
                    f"{name}: {file.name} has sha256 {found.sha256[:12]}, its manifest says "
                    f"{file.sha256[:12]}"
                )
        documents = Documents(folder, manifest, split)
        random = np.random.default_rng([cfg.seed, len(split)])
        other = 0
        chosen = random.choice(
            len(documents), min(settings.samples, len(documents)), replace=False
        ).tolist()
        for number in chosen:
            ids = documents.ids(number)
            if len(ids) and ids.max() >= manifest.vocab_size:
                faults.append(
                    f"{name}: document {number} of {split} has id {ids.max()} of "
                    f"{manifest.vocab_size}"
                )
            text = vocabulary.decode(ids[:-1].tolist(), skip_special_tokens=False)
            other += vocabulary.encode(text, add_special_tokens=False).ids != ids[:-1].tolist()
        if other and manifest.recipe != MEGATRON:
            faults.append(f"{name}: {other} documents of {split} do not encode to their ids again")
        print(
            f"{name:<14}{split:<9}{len(manifest.splits[split]):>5} files{len(documents):>12,} "
            f"documents{manifest.tokens(split):>18,} tokens  "
            f"{'hashed' if settings.hashes else 'sizes only'}, {len(chosen)} documents "
            f"decoded{f', {other} encode otherwise' if other else ''}",
            flush=True,
        )
    return faults


def verify(cfg: DataConfig, settings: VerifySettings) -> None:
    """Check all sources; raises InputError with every fault."""
    manifests = open_manifests(cfg)
    faults = [
        fault for name in manifests for fault in verify_source(cfg, name, manifests[name], settings)
    ]
    if faults:
        raise InputError(
            "; ".join(faults) + ": remove the shards of these sources and prepare the data again"
        )
    plan: Plan = compile_plan(cfg, manifests)
    print("\n" + "\n".join(plan_table(plan)))
    print("\n" + "\n".join(packing_table(plan, manifests)))
    print(f"\nplan {plan.hash[:16]}: all is what the manifests say")


@command(VerifyConfig)
def main(cfg: VerifyConfig) -> None:
    """Verify the data of a composed config."""
    verify(cfg.data, cfg.verify)


if __name__ == "__main__":
    main()
