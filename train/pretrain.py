"""Train a model: `torchrun --nproc-per-node N train/pretrain.py +experiment=NAME`. The entry point."""

import os
import sys
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # a script's own folder would hide the packages

from omegaconf import OmegaConf

from data.command import command
from data.loader import open_manifests
from train.config import RunConfig
from train.plan import check_memory


def plain(value: Any) -> Any:
    """A config as plain JSON-like values."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [plain(entry) for entry in value]
    return value.value if isinstance(value, Enum) else value


@command(RunConfig)
def main(config: RunConfig) -> None:
    """Check what can be checked without a model, then train."""
    world, local_world = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    from train.distributed import available_memory, check_device, present_device, ranks

    device = present_device(config.cluster.device)
    check_memory(config, world, local_world, device, available_memory(device))
    check_device(config.cluster.device, device, config.parallel)
    open_manifests(config.data)  # missing data is said before groups and models are built
    with ranks(device, config.parallel.tensor_parallel) as here:
        from train.loop import Trainer

        record = plain(asdict(config))
        if here.first:
            config.run.folder.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, here, record)  # refuses a folder that holds another run, before its record changes
        if here.first:
            part = config.run.folder / "config.yaml.part"
            OmegaConf.save(OmegaConf.create(record), part)
            part.rename(config.run.folder / "config.yaml")
        trainer.run()
        if here.first:
            from train.report import draw

            print(f"checkpoints: {config.run.checkpoints}\ncurves: {draw(config.run.folder)}", flush=True)


if __name__ == "__main__":
    main()
