"""Train a small Falcon Mamba in a plain loop, save it for Hugging Face, reload it and generate.

Needs the base install only.

  python examples/train_by_hand.py
  python -m examples.train_by_hand     # from a wheel
"""

import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
if (CHECKOUT / "model" / "mamba.py").is_file():  # false for a copy of this file
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
    """Train with AdamW on sequences that count upwards; returns the loss of every step."""
    decay: list[torch.nn.Parameter] = []
    no_decay: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decay if has_weight_decay(name) else no_decay).append(parameter)
    optimizer = torch.optim.AdamW(
        [
            {"params": decay, "weight_decay": 0.1},
            {"params": no_decay, "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=(0.9, 0.95),
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        first = torch.randint(CONFIG.vocab_size, (8, 1), generator=generator)
        tokens = (first + torch.arange(33)) % CONFIG.vocab_size
        token_losses, _ = model(tokens[:, :-1], tokens[:, 1:])
        loss = token_losses.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train with the fastest available kernels and the reference, then save, load and generate."""
    for backend in (Backend.auto, Backend.reference):
        kernels = load(backend, "cpu")
        model = build_model(CONFIG, kernels, seed=0, device=torch.device("cpu"))
        losses = train(model, 60)
        print(f"{kernels.name} kernels: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, Path(folder), EOS)
        # AutoModelForCausalLM.from_pretrained(folder) loads it as well
        reloaded = FalconMamba(HfFolder(Path(folder)).config, load(Backend.auto, "cpu"))
        load_hf_weights(reloaded, Path(folder))
    print("after 5 6 7:", *reloaded.generate([[5, 6, 7]], count=8)[0].tolist())


if __name__ == "__main__":
    main()
