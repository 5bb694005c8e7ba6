"""The commands verify, browse and download."""

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
from data.pipeline import page
from data.prepare import prepare
from data.stream.documents import Documents
from data.stream.loader import Loader, compile_plan
from data.stream.manifests import Manifest, ShardFile, open_manifests, source_folder
from data.stream.packing import measure_packing
from data.verify import verify

DEFAULTS = BrowseSettings(None, None, None, 2, 400, "unused", 50)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    root = tmp_path_factory.mktemp("commands")
    texts = [
        f"Page {i} speaks of <rivers> & of {' '.join(str(j * i) for j in range(20 + i % 7))}"
        for i in range(90)
    ]
    for name in ("web", "code"):
        (root / name).mkdir()
        rows = [
            {"text": f"{name} {text}", "url": f"http://h{i % 3}.example/{i}"}
            for i, text in enumerate(texts)
        ]
        (root / name / "a.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in [*rows, {"text": ""}])
        )
    tokenizer.train(texts, 400, root / "vocabulary")
    cfg = DataConfig(
        folder=str(root / "data"),
        seed=3,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=1,
        tokenizer=TokenizerConfig(str(root / "vocabulary" / tokenizer.FILE), None, 400, 1),
        sources={
            name: Source("mathematics", str(root / name), "CC0-1.0", 2.0, 1)
            for name in ("web", "code")
        },
        stages=[
            Stage("short", 640, 16, {"web": 3.0, "code": 1.0}),
            Stage("long", 640, 32, {"web": 1.0}),
        ],
    )
    prepare(cfg)
    return cfg


def test_browse_shows_the_sequence_at_a_token(
    built: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = open_manifests(built)
    loader = Loader(compile_plan(built, manifests), manifests)
    browse(built, replace(DEFAULTS, page=None, position=700, count=1))
    out = capsys.readouterr().out
    assert "token 672 of the run, stage long, sequence 1 of 32 tokens" in out
    batch = loader.read(loader.plan.stages[1], np.array([1]))
    text = tokenizer.load(Path(built.folder) / "tokenizer" / tokenizer.FILE).decode(
        batch.tokens[0].tolist()
    )
    assert text.split(tokenizer.EOS_TOKEN)[0].strip() in out
    for changed in ({"position": 1280}, {"stage": "decay"}, {"source": "books"}):
        with pytest.raises(
            InputError, match="the run has tokens 0 to 1279|has short, long|has web, code"
        ):
            browse(built, replace(DEFAULTS, page=None, **changed))
    browse(built, replace(DEFAULTS, page=None, source="code", stage="short"))
    out = capsys.readouterr().out
    assert out.count("code, document") == 2 and "code Page" in out and out.count("stage short") == 2


def test_the_page_is_complete_and_has_no_external_resources(
    built: DataConfig, tmp_path: Path
) -> None:
    browse(built, replace(DEFAULTS, page=str(tmp_path / "page.html")))
    page = (tmp_path / "page.html").read_text()
    for expected in (
        "Mixture over tokens",
        "empty 1",
        "h1.example",
        "documents per sequence",
        "on average",
    ):
        assert expected in page, expected
    assert re.search(r"web (70|80)\.0%", page), "3/4 of ten blocks"
    assert not re.search(r"<script|src=|href=|url\(", page) and "<rivers>" not in page
    assert "0.00G" not in page


def test_histograms_begin_at_the_shortest_document(built: DataConfig) -> None:
    for name, manifest in open_manifests(built).items():
        counts = page.lengths(source_folder(built, name), manifest)
        first, last = min(counts), max(counts)
        assert first > 0 and counts[first] and counts[last]
        assert [*counts] == [*range(first, last + 1)]


def test_verify_detects_a_flipped_bit(
    built: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify(built, VerifySettings(3, True))
    out = capsys.readouterr().out
    assert "all shards match their manifests" in out and re.search(
        r"web( +\d+| +[\d.]+k){2} +1,\d{3} ", out
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


def test_documents_are_read_whole_by_number(built: DataConfig) -> None:
    manifest = open_manifests(built)["web"]
    documents = Documents(Path(built.folder) / "shards" / "web", manifest, "train")
    all_ids = [documents.ids(number) for number in range(len(documents))]
    assert all((ids == tokenizer.EOS).sum() == 1 and ids[-1] == tokenizer.EOS for ids in all_ids)
    assert sum(map(len, all_ids)) == manifest.tokens("train")


def test_packing_matches_a_loop_over_sequences(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    sizes, files = [random.integers(1, 40, 50), random.integers(1, 90, 30)], []
    for index, lengths in enumerate(sizes):
        np.cumsum(lengths).astype("<u8").tofile(tmp_path / f"{index}.ds.index")
        files.append(ShardFile(f"{index}.ds", int(lengths.sum()), len(lengths), ""))
    manifest = Manifest("x", "", "", "", "", 11, 20, {"train": files, "heldout": []})
    packing = measure_packing(tmp_path, manifest, 32)
    document_of_token = np.repeat(np.arange(80), np.concatenate(sizes))
    sequences = np.split(document_of_token, range(32, len(document_of_token), 32))
    assert packing.fragments == sum(len(set(sequence.tolist())) for sequence in sequences)
    sequences_of = [np.flatnonzero(document_of_token == document) // 32 for document in range(80)]
    assert packing.split_documents == sum(numbers[0] != numbers[-1] for numbers in sequences_of)
    assert packing.documents == 80


def test_download_fetches_once_and_checks_the_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "origin").write_bytes(b"model")
    sha256 = hashlib.sha256(b"model").hexdigest()
    asset = Asset(str(tmp_path / "copy" / "lid.bin"), f"file://{tmp_path / 'origin'}", sha256)
    assert (
        fetch("lid", asset).startswith("downloaded from")
        and (tmp_path / "copy" / "lid.bin").read_bytes() == b"model"
    )
    (tmp_path / "origin").unlink()
    assert fetch("lid", asset).startswith("exists, 5 bytes")
    with pytest.raises(InputError, match="has sha256 .*, not 00: remove it"):
        fetch("lid", replace(asset, sha256="00"))
    with pytest.raises(InputError, match="cannot be downloaded"):
        fetch("lid", replace(asset, path=str(tmp_path / "other")))
    assert not list(tmp_path.glob("other*"))
    with pytest.raises(InputError, match="no url: put the file there"):
        fetch("lid", Asset(str(tmp_path / "other")))


def test_download_over_http(tmp_path: Path) -> None:
    (tmp_path / "lid.bin").write_bytes(b"model")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert fetch("lid", Asset(str(tmp_path / "copy"), f"{url}/lid.bin")).startswith(
            "downloaded"
        )
        with pytest.raises(InputError, match="HTTPError: HTTP Error 404"):
            fetch("lid", Asset(str(tmp_path / "other"), f"{url}/nothing"))
        server.shutdown()
    assert (tmp_path / "copy").read_bytes() == b"model"


def test_download_lists_every_asset(built: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    download_all(built)
    out = capsys.readouterr().out
    assert (
        re.search(r"tokenizer +exists, [\d,]+ bytes", out) and "language_model    not used" in out
    )
