"""Train a model, from the newest checkpoint that verifies to the end of the last stage.

examples:
  torchrun --nproc-per-node 2 train/pretrain.py +experiment=demo
  torchrun --nproc-per-node 2 train/pretrain.py +experiment=demo optim.clip_norm=0.5 \\
    run.name=clipped
  torchrun --nproc-per-node 2 train/pretrain.py +experiment=demo \\
    train.profile.steps=3   # a trace and a table
  torchrun --nnodes 32 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 \\
    train/pretrain.py +experiment=7b
"""

import logging
import os
import sys
from pathlib import Path

# a script's own folder would hide the packages
sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from core.command import command
from core.errors import InputError
from core.launcher import launcher_pid
from core.log import BestEffortStream
from data.stream.manifests import require_data
from train.config import RunConfig
from train.costs.memory import check_memory
from train.metrics.trackers import check_trackers

logger = logging.getLogger(__name__)
LAUNCHER = launcher_pid()  # before the long imports, during which it may end


@command(RunConfig)
def main(config: RunConfig) -> None:
    """Check what needs no model, then train."""
    sys.stdout, sys.stderr = BestEffortStream(sys.stdout), BestEffortStream(sys.stderr)
    check_trackers(config.metrics)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    logger.info("loading torch, DeepSpeed and megatron-core")
    from train.device import available_bytes, check_device, check_local_rank, select_device

    device = select_device(config.cluster.device)
    check_local_rank(device)
    # a model of another size first: on a laptop, 7b has no setting that helps
    check_memory(config, world_size, local_world_size, device, available_bytes(device))
    check_device(config.cluster.device, device, config.parallel)
    require_data(config.data)  # before process groups and the model are built
    from train.run_context import start

    if LAUNCHER not in (None, os.getppid()):
        raise InputError("the launcher of this rank ended before the ranks connected: start again")
    outcome = start(config, device, LAUNCHER)
    logger.info(outcome.reason)
    if outcome.code:
        sys.exit(outcome.code)


if __name__ == "__main__":
    main()
