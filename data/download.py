"""Download assets and the tokenizer, on a machine with internet access.

Each has a path and a URL in the config; a file that exists at its path is only checked. Copy the
files to the cluster: preparation needs no internet access there.

Falcon's tokenizer.json is built from a package of the Python package index: no hub is needed.

examples:
  python data/download.py +experiment=7b
  python data/download.py tokenizer=falcon   # only that, to data.tokenizer.path
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
from data.config import Asset, DataConfig, TokenizerConfig
from data.pipeline import falcon
from data.recipes import urls

COPY_BYTES = 2**20
TIMEOUT_SECONDS = 60  # without a byte from the server
ONLY_TOKENIZER = "tokenizer=falcon"


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


def fetch_tokenizer(settings: TokenizerConfig) -> str:
    """Fetch a tokenizer.json, or build Falcon's if the url is of the package that holds it."""
    asset = Asset(settings.path, settings.url, settings.sha256)
    done = ""
    if asset.path is not None and asset.url is not None and asset.url.endswith(falcon.SDIST):
        path = Path(asset.path)
        if not path.is_file():
            package = path.with_name(falcon.SDIST)
            try:
                download("data.tokenizer", asset.url, package)
                falcon.build(package, path)
            except InputError as error:
                raise InputError(
                    f"{error}; elsewhere `{falcon.FETCH}` fetches the file to give as "
                    "data.tokenizer.url"
                ) from error
            finally:
                package.unlink(missing_ok=True)
            done = f"{path} built from {asset.url}: "
    return done + fetch("data.tokenizer", asset)


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
    print(f"{'tokenizer':<18}{fetch_tokenizer(cfg.tokenizer)}", flush=True)
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


@command(DownloadConfig)
def only_tokenizer(cfg: DownloadConfig) -> None:
    """Build Falcon's tokenizer.json where it is missing."""
    settings = cfg.data.tokenizer
    if settings.path is None or not (settings.url or "").endswith(falcon.SDIST):
        raise InputError(
            f"data.tokenizer.path is {settings.path} and data.tokenizer.url {settings.url}: set a "
            f"path, and the place of {falcon.SDIST} as url"
        )
    print(fetch_tokenizer(settings), flush=True)


if __name__ == "__main__":
    if ONLY_TOKENIZER in sys.argv:
        # its own word: a run has no name here
        sys.argv[sys.argv.index(ONLY_TOKENIZER)] = "run.name=falcon"
        only_tokenizer()
    else:
        main()
