"""Whether this user has a key for a server, in the environment or in ~/.netrc."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit


def wandb_host() -> str:
    """Host of the W&B server."""
    return urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""


def has_wandb_key() -> bool:
    """Whether W&B finds a key: in WANDB_API_KEY, or where `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(wandb_host()) is not None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return False
