"""Patch a copy of the code for torch 2.11, which GPU images contain: `old_torch.py ROOT`.

In torch 2.11, torch.compile has no recompile_limit and dynamo cannot trace is_autocast_available.
"""

import sys
from pathlib import Path

PATCHES = {
    "model/mamba.py": (
        ("fullgraph=True, recompile_limit=COMPILED_VARIANTS", "fullgraph=True"),
        (
            "        for layer in self.layers:\n            # torch's type stubs",
            "        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS\n"
            "        for layer in self.layers:\n            # torch's type stubs",
        ),
    ),
    "model/kernels/reference.py": (
        ("on = torch.amp.is_autocast_available(device) and", 'on = device in ("cpu", "cuda") and'),
    ),
}


def patch(root: Path) -> None:
    """Apply PATCHES; raises ValueError if the code to replace has changed."""
    for name, pairs in PATCHES.items():
        text = (root / name).read_text(encoding="utf-8")
        for old, new in pairs:
            if old not in text:
                raise ValueError(f"{name} does not contain {old!r}: update {__file__}")
            text = text.replace(old, new)
        (root / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    patch(Path(sys.argv[1]))
