"""Build the engine of a run."""

from model.mamba import FalconMamba
from train.config import EngineKind, Optim, Parallel, Precision
from train.distributed import Ranks
from train.engines.protocol import Engine


def build_engine(
    model: FalconMamba, optim: Optim, parallel: Parallel, precision: Precision, ranks: Ranks
) -> Engine:
    """Build the engine that the config chooses; only its own library is imported."""
    if parallel.zero_stage == 0:
        from train.engines.reference import PlainEngine

        return PlainEngine(model, optim, ranks)
    if parallel.engine is EngineKind.megatron:
        from train.engines.megatron import MegatronEngine

        return MegatronEngine(model, optim, ranks, precision, parallel.bucket_elements)
    from train.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(model, optim, ranks, parallel.zero_stage, parallel.bucket_elements)
