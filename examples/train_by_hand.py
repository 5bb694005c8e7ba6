"""Train a small Falcon Mamba in a plain loop, save it for transformers, reload it and generate.

python examples/train_by_hand.py      # from a wheel: python -m examples.train_by_hand
"""

import sys
import tempfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
if (CHECKOUT / "model" / "mamba.py").is_file():  # false for a copy of this file
    sys.path[0] = str(CHECKOUT)

import torch

from model.mamba import FalconMamba, ModelConfig
from model.parameters import has_weight_decay

torch.manual_seed(0)
model = FalconMamba(ModelConfig(vocab_size=32, d_model=32, n_layer=2))
groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
for name, parameter in model.named_parameters():
    groups[has_weight_decay(name)].append(parameter)
optimizer = torch.optim.AdamW(
    [{"params": groups[key], "weight_decay": 0.1 * key} for key in groups],
    lr=1e-2,
    betas=(0.9, 0.95),
)
for step in range(61):
    tokens = (torch.randint(32, (8, 1)) + torch.arange(33)) % 32  # counting upwards
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step}: loss {loss.item():.3f} with {model.kernels.name} kernels")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)  # AutoModelForCausalLM.from_pretrained reads it, too
    reloaded = FalconMamba.from_pretrained(folder)
print("after 5 6 7:", *reloaded.generate([[5, 6, 7]], count=8)[0].tolist())
