"""A checkpoint without a run: what export and evaluation read."""

from core.run import Run
from model.config import ModelConfig
from model.kernels import REFERENCE
from model.mamba import FalconMamba
from model.parallel.build import build_model
from tests.compose import run_config
from train.checkpoint.manager import CheckpointManager, TrainState
from train.config import CheckpointConfig, Optim, Precision
from train.distributed import init_distributed
from train.engines.build import build_engine


def save_checkpoint(run: Run, config: ModelConfig, trained: FalconMamba | None = None) -> None:
    """Write the checkpoint of step 0: of `trained`, or of an untrained model."""
    with init_distributed("cpu", 1) as ranks:
        model = build_model(config, REFERENCE, 0, ranks.device)
        if trained is not None:
            model.load_state_dict(trained.state_dict())
        engine = build_engine(
            model,
            Optim(1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, 0.0),
            run_config("demo").parallel,
            Precision.fp32,
            ranks,
        )
        state = TrainState(0, 0, 0, "", {**config.__dict__})
        settings = CheckpointConfig(1, 1, None, False, retry_seconds=0.0, max_failures=1)
        CheckpointManager(run.files.checkpoints, settings, ranks, frozenset()).save_and_wait(
            state, engine
        )
