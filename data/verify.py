"""Verify the shards of a data set against their manifests, and print what a run reads of them.

Hashes every byte, counts end tokens, decodes and re-encodes random documents, and prints tokens,
epochs and packing. Exits with code 2 if a check fails.

examples:
  python data/verify.py +experiment=demo
  python data/verify.py +experiment=7b verify.hashes=false    # only sizes; takes seconds
"""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from core.command import command
from core.errors import InputError
from data import tokenizer
from data.config import DataConfig, VerifyConfig, VerifySettings
from data.pipeline.shard import describe_shard
from data.recipes import MEGATRON
from data.stream.documents import Documents
from data.stream.loader import compile_plan
from data.stream.manifests import SPLITS, Manifest, open_manifests, source_folder, tokenizer_path
from data.stream.mixture import Plan
from data.stream.packing import packing_table, plan_table


def verify_source(
    cfg: DataConfig, name: str, manifest: Manifest, settings: VerifySettings
) -> list[str]:
    """Errors of one source; prints a line per split."""
    folder = source_folder(cfg, name)
    errors: list[str] = []
    vocabulary = tokenizer.load(tokenizer_path(cfg))
    vocabulary.encode_special_tokens = True
    for split in SPLITS:
        for file in manifest.splits[split] if settings.hashes else ():
            try:
                actual = describe_shard(folder / file.name, manifest.eos, manifest.vocab_size)
            except (OSError, ValueError) as error:
                errors.append(f"{name}: {error}")
                continue
            if actual != file:
                found, expected = asdict(actual), asdict(file)
                key = next(key for key in expected if found[key] != expected[key])
                errors.append(
                    f"{name}: {file.name} has {key} {found[key]}, its manifest says {expected[key]}"
                )
        documents = Documents(folder, manifest, split)
        random = np.random.default_rng([cfg.seed, len(split)])
        mismatches = 0
        sample = random.choice(
            len(documents), min(settings.samples, len(documents)), replace=False
        ).tolist()
        for number in sample:
            ids = documents.ids(number)
            if len(ids) and ids.max() >= manifest.vocab_size:
                errors.append(
                    f"{name}: document {number} of {split} has id {ids.max()}, the vocabulary "
                    f"size is {manifest.vocab_size}"
                )
            text = vocabulary.decode(ids[:-1].tolist(), skip_special_tokens=False)
            mismatches += vocabulary.encode(text, add_special_tokens=False).ids != ids[:-1].tolist()
        if mismatches and manifest.recipe != MEGATRON:
            errors.append(
                f"{name}: {mismatches} documents of {split} do not re-encode to their ids"
            )
        print(
            f"{name:<14}{split:<9}{len(manifest.splits[split]):>5} files{len(documents):>12,} "
            f"documents{manifest.tokens(split):>18,} tokens  "
            f"{'hashed' if settings.hashes else 'sizes only'}, {len(sample)} documents "
            f"decoded{f', {mismatches} re-encode differently' if mismatches else ''}",
            flush=True,
        )
    return errors


def verify(cfg: DataConfig, settings: VerifySettings) -> None:
    """Check all sources; raises InputError with every error."""
    manifests = open_manifests(cfg)
    errors = [
        error for name in manifests for error in verify_source(cfg, name, manifests[name], settings)
    ]
    if errors:
        raise InputError(
            "; ".join(errors) + ": remove the shards of these sources and prepare the data again"
        )
    plan: Plan = compile_plan(cfg, manifests)
    print("\n" + "\n".join(plan_table(plan)))
    print("\n" + "\n".join(packing_table(plan, manifests)))
    print(f"\nplan {plan.hash_at(plan.tokens)[:16]}: all shards match their manifests")


@command(VerifyConfig)
def main(cfg: VerifyConfig) -> None:
    """Verify the data of a composed config."""
    verify(cfg.data, cfg.verify)


if __name__ == "__main__":
    main()
