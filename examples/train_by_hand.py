"""Build a small Falcon Mamba, train it by hand, save it for Hugging Face, load it and generate.

Needs the base install only, no extra.

  python examples/train_by_hand.py
  python -m examples.train_by_hand     # from a wheel
"""

import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
if (CHECKOUT / "model" / "mamba.py").is_file():  # not where this file is copied to
    sys.path[0] = str(CHECKOUT)

import torch

from model.config import Backend, ModelConfig
from model.hf import HfFolder, load_hf_weights, save_hf
from model.kernels import load
from model.mamba import FalconMamba
from model.parallel.build import build_model
from model.parameters import has_weight_decay

EOS = 0
CONFIG = ModelConfig(
    vocab_size=32,
    d_model=32,
    n_layer=2,
    d_inner=64,
    d_state=8,
    d_conv=4,
    dt_rank=4,
    norm_eps=1e-5,
    mixer_norm_eps=1e-6,
    mixer_norms=True,
    embedding_std=0.02,
    dt_min=1e-3,
    dt_max=0.1,
    dt_floor=1e-4,
)


def train(model: FalconMamba, steps: int) -> list[float]:
    """AdamW on sequences that count upwards; returns the loss of every step."""
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in named if has_weight_decay(name)], "weight_decay": 0.1},
            {"params": [p for name, p in named if not has_weight_decay(name)], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        first = torch.randint(CONFIG.vocab_size, (8, 1), generator=generator)
        tokens = (first + torch.arange(33)) % CONFIG.vocab_size
        per_token, _ = model(tokens[:, :-1], tokens[:, 1:])
        loss = per_token.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train with the fastest kernels that are here and with the reference, then go by disk."""
    for backend in (Backend.auto, Backend.reference):
        kernels = load(backend, "cpu")
        model = build_model(CONFIG, kernels, seed=0, device=torch.device("cpu"))
        losses = train(model, 60)
        print(f"{kernels.name} kernels: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder), EOS)
        # AutoModelForCausalLM.from_pretrained(folder) reads it too
        again = FalconMamba(HfFolder(Path(folder)).config, load(Backend.auto, "cpu"))
        load_hf_weights(again, Path(folder))
    print("after 5 6 7:", *again.generate([[5, 6, 7]], count=8)[0].tolist())


if __name__ == "__main__":
    main()
