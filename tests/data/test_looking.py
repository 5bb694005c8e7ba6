"""Verifying, browsing and fetching: what is shown is what lies there, and a fault is named."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from core.errors import InputError
from data import tokenizer
from data.browse import browse
from data.config import (
    Asset,
    BrowseSettings,
    DataConfig,
    Source,
    Stage,
    TokenizerConfig,
    VerifySettings,
)
from data.download import download_all, fetch
from data.prepare import prepare
from data.stream.documents import Documents
from data.stream.loader import Loader, compile_plan
from data.stream.manifests import Manifest, ShardFile, open_manifests
from data.stream.packing import measure_packing
from data.verify import verify

NOTHING = BrowseSettings(None, None, None, 2, 400, "unused", 50)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    home = tmp_path_factory.mktemp("looking")
    texts = [
        f"Page {i} speaks of <rivers> & of {' '.join(str(j * i) for j in range(20 + i % 7))}"
        for i in range(90)
    ]
    for name in ("web", "code"):
        (home / name).mkdir()
        rows = [
            {"text": f"{name} {text}", "url": f"http://h{i % 3}.example/{i}"}
            for i, text in enumerate(texts)
        ]
        (home / name / "a.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}])
        )
    tokenizer.train(texts, 400, home / "vocabulary")
    cfg = DataConfig(
        folder=str(home / "data"),
        seed=3,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=1,
        tokenizer=TokenizerConfig(str(home / "vocabulary" / tokenizer.FILE), None, 400, 1),
        sources={
            name: Source("mathematics", str(home / name), "CC0-1.0", 2.0, 1)
            for name in ("web", "code")
        },
        stages=[
            Stage("short", 640, 16, {"web": 3.0, "code": 1.0}),
            Stage("long", 640, 32, {"web": 1.0}),
        ],
    )
    prepare(cfg)
    return cfg


def test_what_the_model_saw_at_a_token(
    built: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = open_manifests(built)
    loader = Loader(compile_plan(built, manifests), manifests)
    browse(built, replace(NOTHING, page=None, position=700, count=1))
    shown = capsys.readouterr().out
    assert "token 672 of the run, stage long, sequence 1 of 32 tokens" in shown
    batch = loader.read(loader.plan.stages[1], np.array([1]))
    text = tokenizer.load(Path(built.folder) / "tokenizer" / tokenizer.FILE).decode(
        batch.tokens[0].tolist()
    )
    assert text.split(tokenizer.EOS_TOKEN)[0].strip() in shown
    for changed in ({"position": 1280}, {"stage": "decay"}, {"source": "books"}):
        with pytest.raises(
            InputError, match="the run has tokens 0 to 1279|has short, long|has web, code"
        ):
            browse(built, replace(NOTHING, page=None, **changed))
    browse(built, replace(NOTHING, page=None, source="code", stage="short"))
    shown = capsys.readouterr().out
    assert (
        shown.count("code, document") == 2
        and "code Page" in shown
        and shown.count("stage short") == 2
    )


def test_the_page_holds_all_and_loads_nothing(built: DataConfig, tmp_path: Path) -> None:
    browse(built, replace(NOTHING, page=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text()
    for part in (
        "Mixture over tokens",
        "empty 1",
        "h1.example",
        "documents per sequence",
        "on average",
    ):
        assert part in page, part
    assert re.search(r"web (70|80)\.0%", page), "3 of 4 of ten blocks"
    assert not re.search(r"<script|src=|href=|url\(", page) and "<rivers>" not in page


def test_verify_sees_one_flipped_bit(
    built: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(built, VerifySettings(3, True))
    shown = capsys.readouterr().out
    assert "all is what the manifests say" in shown and re.search(
        r"web +0\.00G +0\.00G +1,\d{3}", shown
    )
    shutil.copytree(built.folder, tmp_path / "data")
    shard = next((tmp_path / "data" / "shards" / "web").glob("train*.ds"))
    content = bytearray(shard.read_bytes())
    content[40] ^= 1
    shard.write_bytes(content)
    broken = replace(built, folder=str(tmp_path / "data"))
    with pytest.raises(InputError, match=r"web: .*: remove the shards of these sources"):
        verify(broken, VerifySettings(0, True))
    verify(broken, VerifySettings(0, False))


def test_documents_come_whole_by_number(built: DataConfig) -> None:
    manifest = open_manifests(built)["web"]
    documents = Documents(Path(built.folder) / "shards" / "web", manifest, "train")
    found = [documents.ids(number) for number in range(len(documents))]
    assert all((ids == tokenizer.EOS).sum() == 1 and ids[-1] == tokenizer.EOS for ids in found)
    assert sum(map(len, found)) == manifest.tokens("train")


def test_packing_stats_equal_a_count_by_loop(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lengths_by_file = [random.integers(1, 40, 50), random.integers(1, 90, 30)]
    files = []
    for index, lengths in enumerate(lengths_by_file):
        np.cumsum(lengths).astype("<u8").tofile(tmp_path / f"{index}.ds.index")
        files.append(ShardFile(f"{index}.ds", int(lengths.sum()), len(lengths), ""))
    manifest = Manifest("x", "", "", "", "", 11, 20, {"train": files, "heldout": []})
    stats = measure_packing(tmp_path, manifest, 32)
    document_of_token = np.repeat(np.arange(80), np.concatenate(lengths_by_file))
    sequences = [
        document_of_token[start : start + 32] for start in range(0, len(document_of_token), 32)
    ]
    assert stats.fragments == sum(len(set(sequence.tolist())) for sequence in sequences)
    sequence_of_token = np.arange(len(document_of_token)) // 32
    split = 0
    for document in range(80):
        indices = sequence_of_token[document_of_token == document]
        split += indices[0] != indices[-1]
    assert stats.split_documents == split and stats.documents == 80


def test_prefetch_fetches_once_and_knows_another_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "origin").write_bytes(b"model")
    sha256 = hashlib.sha256(b"model").hexdigest()
    asset = Asset(str(tmp_path / "here" / "lid.bin"), f"file://{tmp_path / 'origin'}", sha256)
    assert (
        fetch("lid", asset).startswith("fetched from")
        and (tmp_path / "here" / "lid.bin").read_bytes() == b"model"
    )
    (tmp_path / "origin").unlink()
    assert fetch("lid", asset).startswith("there, 5 bytes")
    with pytest.raises(InputError, match="has sha256 .*, not 00: remove it"):
        fetch("lid", replace(asset, sha256="00"))
    with pytest.raises(InputError, match="cannot be fetched"):
        fetch("lid", replace(asset, path=str(tmp_path / "other")))
    assert not list(tmp_path.glob("other*"))
    with pytest.raises(InputError, match="no url: put the file there"):
        fetch("lid", Asset(str(tmp_path / "other")))


def test_prefetch_speaks_http(tmp_path: Path) -> None:
    (tmp_path / "lid.bin").write_bytes(b"model")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert fetch("lid", Asset(str(tmp_path / "copy"), f"{url}/lid.bin")).startswith("fetched")
        with pytest.raises(InputError, match="HTTPError: HTTP Error 404"):
            fetch("lid", Asset(str(tmp_path / "other"), f"{url}/nothing"))
        server.shutdown()
    assert (tmp_path / "copy").read_bytes() == b"model"


def test_prefetch_lists_everything(built: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    download_all(built)
    shown = capsys.readouterr().out
    assert (
        re.search(r"tokenizer +there, [\d,]+ bytes", shown)
        and "language_model    not used" in shown
    )
