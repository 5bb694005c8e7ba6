"""Learning rate, batch, sequence length and stage as pure functions of the tokens seen. Torch-free.

Nothing of it is checkpointed.

Falcon Mamba (arXiv 2410.05355, section 3, and its model card): linear warmup, constant peak,
exponential decay peak * (min / peak)^r over the last tokens; batch ramped linearly in tokens;
BatchScaling keeps lr / sqrt(batch) constant during the ramp. It multiplies the maximal rate
(tiiuae/Falcon-H1, docs/post_training_details.md), so it multiplies the warmup too.

Other decay shapes, for ablations, are min + (peak - min) f(r), with r the completed fraction of the
decay: f = 1 - r (linear) and 1 - sqrt(r) (one_minus_sqrt), which Haegele et al. compare (arXiv
2405.18392), and (1 + cos(pi r)) / 2 (cosine: SGDR, arXiv 1608.03983).
"""

import math
from dataclasses import dataclass

from data.config import DataConfig
from train.config import DecayShape, ScheduleConfig


@dataclass(frozen=True)
class StepSchedule:
    """Settings of the step that starts at a token count."""

    lr: float
    batch: int  # sequences
    seq_len: int
    stage: str

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.batch * self.seq_len


def decay_factor(shape: DecayShape, r: float, min_factor: float) -> float:
    """Factor of the peak rate at fraction r in [0, 1] of the decay, from 1 to `min_factor`."""
    if shape is DecayShape.exponential:
        return min_factor**r
    falling = {
        DecayShape.linear: 1 - r,
        DecayShape.cosine: (1 + math.cos(math.pi * r)) / 2,
        DecayShape.one_minus_sqrt: 1 - math.sqrt(r),
    }
    return min_factor + (1 - min_factor) * falling[shape]


class Schedule:
    """The schedule of one run."""

    def __init__(self, config: ScheduleConfig, peak_lr: float, data: DataConfig) -> None:
        self.config = config
        self.peak_lr = peak_lr
        self.stages: list[tuple[int, int, str]] = []  # (end of the stage in tokens, seq_len, name)
        end = 0
        for stage in data.stages:
            end += data.tokens_of(stage)
            self.stages.append((end, stage.seq_len, stage.name))
        self.total = end

    @property
    def stage_ends(self) -> frozenset[int]:
        """Token counts at which stages end."""
        return frozenset(end for end, _, _ in self.stages)

    def batch(self, tokens: int) -> int:
        """Sequences of a full step at `tokens`: linear from batch_start_ to batch_end_sequences."""
        c = self.config
        if tokens >= c.ramp_tokens:
            return c.batch_end_sequences
        return (
            c.batch_start_sequences
            + (c.batch_end_sequences - c.batch_start_sequences) * tokens // c.ramp_tokens
        )

    def lr(self, tokens: int, batch: int) -> float:
        """Learning rate of a step of `batch` sequences that ends at `tokens`."""
        c = self.config
        lr = self.peak_lr
        if c.batch_scaling:
            lr *= math.sqrt(batch / c.batch_end_sequences)
        if tokens < c.warmup_tokens:
            lr *= tokens / c.warmup_tokens
        into_decay = tokens - (self.total - c.decay_tokens)
        if into_decay > 0:
            lr *= decay_factor(c.decay_shape, into_decay / c.decay_tokens, c.min_lr / self.peak_lr)
        return lr

    def at(self, tokens: int) -> StepSchedule:
        """Return the step that starts at `tokens` in [0, total).

        No step crosses the end of a stage: the stage's last step is shortened. Its rate is still
        that of a full batch. The rate is taken at the end of the step, so that the first step has a
        rate above 0 and the last one reaches min_lr.
        """
        assert 0 <= tokens < self.total, tokens
        stage_end, seq_len, stage = next(entry for entry in self.stages if tokens < entry[0])
        full_batch = self.batch(tokens)
        batch = min(full_batch, (stage_end - tokens) // seq_len)
        return StepSchedule(self.lr(tokens + batch * seq_len, full_batch), batch, seq_len, stage)
