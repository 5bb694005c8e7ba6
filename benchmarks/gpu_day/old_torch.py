"""Change a copy of the code so that it runs with torch 2.11, which GPU images carry: `old_torch.py
ROOT`.

torch.compile has no recompile_limit there, and dynamo cannot trace is_autocast_available.
"""

import sys
from pathlib import Path

CHANGES = {
    "model/mamba.py": (
        ("fullgraph=True, recompile_limit=COMPILED_VARIANTS", "fullgraph=True"),
        (
            "        for layer in self.layers:\n            # torch's own types",
            "        torch._dynamo.config.recompile_limit = COMPILED_VARIANTS\n"
            "        for layer in self.layers:\n            # torch's own types",
        ),
    ),
    "model/kernels/reference.py": (
        ("on = torch.amp.is_autocast_available(device) and", 'on = device in ("cpu", "cuda") and'),
    ),
}


def change(root: Path) -> None:
    """Replace what CHANGES names; raises ValueError where the code has moved on."""
    for name, pairs in CHANGES.items():
        text = (root / name).read_text(encoding="utf-8")
        for old, new in pairs:
            if old not in text:
                raise ValueError(f"{name} does not hold {old!r}: mend {__file__}")
            text = text.replace(old, new)
        (root / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    change(Path(sys.argv[1]))
