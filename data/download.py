"""Download assets and the tokenizer, on a machine with internet access.

Each has a path and a URL in the config; a file that exists at its path is only checked. Copy the
files to the cluster: preparation needs no internet access there.

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
from core.files import make_folder, sha256_of, write_atomic
from data.config import Asset, DataConfig
from data.recipes import urls

COPY_BYTES = 2**20
TIMEOUT_SECONDS = 60  # without a byte from the server


@dataclass
class DownloadConfig:
    """Config sections of data/download.py."""

    data: DataConfig


def fetch(name: str, asset: Asset) -> str:
    """Download an asset if its file is missing, check its hash, and return what was done.

    Raises InputError if the download fails or the hash differs from the config.
    """
    if asset.path is None:
        return "not used: its path is null"
    path = Path(asset.path)
    status = "exists"
    if not path.is_file():
        if asset.url is None:
            raise InputError(
                f"{name}: no file at {path} and no url: put the file there, or set {name}.url"
            )
        download(name, asset.url, path)
        status = f"downloaded from {asset.url}"
    sha256 = sha256_of(path)
    if asset.sha256 is not None and sha256 != asset.sha256:
        raise InputError(
            f"{name}: {path} has sha256 {sha256}, not {asset.sha256}: remove it, or set "
            f"{name}.sha256"
        )
    pinned = "as pinned" if asset.sha256 is not None else f"not pinned: set {name}.sha256"
    return f"{status}, {path.stat().st_size:,} bytes, sha256 {sha256} ({pinned})"


def download(name: str, url: str, path: Path) -> None:
    """Download a URL to a file, which is complete or absent afterwards."""
    make_folder(path.parent)

    def copy(target: BinaryIO) -> None:
        with open_url(url) as source:
            shutil.copyfileobj(source, target, COPY_BYTES)
            # of http.client: announced bytes that did not arrive
            if missing := getattr(source, "length", 0):
                raise OSError(f"the connection closed {missing} bytes early")

    try:
        write_atomic(path, copy)
    except ImportError as error:
        raise InputError(f"{name}: {url} needs a package ({error}): pip install it") from error
    except Exception as error:  # each fsspec filesystem has its own exceptions
        raise InputError(
            f"{name}: {url} cannot be downloaded ({type(error).__name__}: {error})"
        ) from error


def open_url(url: str) -> AbstractContextManager[IO[bytes]]:
    """Open a URL; http with the standard library, since fsspec would need aiohttp."""
    if url.startswith(("https://", "http://")):
        stream: AbstractContextManager[IO[bytes]] = urlopen(url, timeout=TIMEOUT_SECONDS)
    else:
        stream = fsspec.open(url, "rb")
    return stream


def download_all(cfg: DataConfig) -> None:
    """Download or check everything that a preparation reads besides its input."""
    vocabulary = Asset(cfg.tokenizer.path, cfg.tokenizer.url, cfg.tokenizer.sha256)
    print(f"{'tokenizer':<18}{fetch('data.tokenizer', vocabulary)}", flush=True)
    for name, asset in vars(cfg.assets).items():
        print(f"{name:<18}{fetch(f'data.assets.{name}', asset)}", flush=True)
    if cfg.assets.url_blocklist.path is None and any(
        source.recipe == "web" for source in cfg.sources.values()
    ):
        domains = len(urls.load_blocklist(None).block_listed_domains)
        print(f"{'url lists':<18}from datatrove, {domains:,} domains")


@command(DownloadConfig)
def main(cfg: DownloadConfig) -> None:
    """Download the assets of a composed config."""
    download_all(cfg.data)


if __name__ == "__main__":
    main()
