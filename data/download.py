"""Fetch what no package brings, on a machine with a network.

Every asset and the vocabulary have a path and an address in the config; what lies at its path is
only checked. Copy the paths to the cluster, and nothing asks for a network there.

examples:
  python data/download.py +experiment=7b
"""

import shutil
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO
from urllib.request import urlopen

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

import fsspec

from core.command import command
from core.errors import InputError
from core.files import sha256_of, write_atomic
from data.config import Asset, DataConfig
from data.recipes import urls

PIECE = 2**20
SILENCE_SECONDS = 60  # a server that says nothing for so long is taken for dead


@dataclass
class DownloadConfig:
    """The section of the config that this program reads."""

    data: DataConfig


def fetch(name: str, asset: Asset) -> str:
    """Make sure that an asset lies at its path; returns what was done.

    Raises InputError when it cannot be fetched or is another file than the config says.
    """
    if asset.path is None:
        return "not used: its path is null"
    path = Path(asset.path)
    done = "there"
    if not path.is_file():
        if asset.url is None:
            raise InputError(
                f"{name}: nothing at {path} and no url: put the file there, or set its url in "
                "the config"
            )
        download(name, asset.url, path)
        done = f"fetched from {asset.url}"
    found = sha256_of(path)
    if asset.sha256 is not None and found != asset.sha256:
        raise InputError(
            f"{name}: {path} has sha256 {found}, not {asset.sha256}: remove it, or mend sha256"
        )
    pinned = "as pinned" if asset.sha256 is not None else "not pinned: set its sha256"
    return f"{done}, {path.stat().st_size:,} bytes, sha256 {found} ({pinned})"


def download(name: str, url: str, path: Path) -> None:
    """Copy an address to a file that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def copy(target: BinaryIO) -> None:
        with opened(url) as source:
            shutil.copyfileobj(source, target, PIECE)
            # http.client's: bytes announced and not sent
            if missing := getattr(source, "length", 0):
                raise OSError(f"the connection ended {missing} bytes early")

    try:
        write_atomic(path, copy)
    except ImportError as error:
        raise InputError(f"{name}: {url} needs a package ({error}): pip install it") from error
    except Exception as error:  # every filesystem of fsspec has errors of its own
        raise InputError(
            f"{name}: {url} cannot be fetched ({type(error).__name__}: {error})"
        ) from error


def opened(url: str) -> AbstractContextManager[IO[bytes]]:
    """A stream of an address; http by the standard library, since fsspec's needs aiohttp."""
    if url.startswith(("https://", "http://")):
        stream: AbstractContextManager[IO[bytes]] = urlopen(url, timeout=SILENCE_SECONDS)
    else:
        stream = fsspec.open(url, "rb")
    return stream


def download_all(cfg: DataConfig) -> None:
    """Fetch or check everything that a preparation reads besides its input."""
    vocabulary = Asset(cfg.tokenizer.path, cfg.tokenizer.url, cfg.tokenizer.sha256)
    print(f"{'tokenizer':<18}{fetch('data.tokenizer', vocabulary)}", flush=True)
    for name, asset in vars(cfg.assets).items():
        print(f"{name:<18}{fetch(f'data.assets.{name}', asset)}", flush=True)
    if cfg.assets.url_blocklist.path is None and any(
        source.recipe == "web" for source in cfg.sources.values()
    ):
        domains = len(urls.load_blocklist(None).block_listed_domains)
        print(f"{'url lists':<18}unpacked from datatrove, {domains:,} domains")


@command(DownloadConfig)
def main(cfg: DownloadConfig) -> None:
    """Download for a composed config."""
    download_all(cfg.data)


if __name__ == "__main__":
    main()
