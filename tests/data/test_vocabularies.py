"""Tokenizers of other kinds than Falcon's: prepared, trained on, exported and read back."""

import gzip
import json
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, processors

from core.errors import InputError
from core.run import Run
from data import tokenizer, vocabulary
from data.browse import decode
from data.config import DataConfig, Source, Stage, TokenizerConfig, VerifySettings
from data.pipeline.adoption import adopt
from data.pipeline.shard import encode, find_seam, pieces_of
from data.prepare import prepare
from data.stream.documents import Documents
from data.stream.loader import Loader, compile_plan
from data.stream.manifests import (
    SPLITS,
    WIDE,
    id_dtype,
    open_manifests,
    read_manifest,
    source_folder,
)
from data.stream.shards import Shards
from data.tokenizer import copy_tokenizer
from data.verify import verify
from data.vocabulary import byte_lengths, end_id, end_token
from eval.config import EvalConfig, EvaluationConfig
from eval.export import export
from eval.generate import stream
from eval.heldout import evaluate
from model.generation import GREEDY
from tests.checkpoints import save_checkpoint
from tests.compose import typed
from tests.tiny import TINY, model_of
from tests.vocabularies import END_IDS, KINDS, TEXTS, neox, write_vocabulary

HARD_TEXTS = [
    "a",
    " leading and trailing ",
    "  \n\n\t x  ",
    "cut <|endoftext|> here </s> and <s> or <|im_end|>, <0x0A>, <unk>",
    "run        of spaces, <tool_call> and \u2581 a lower block",
    "e\u0301 \u4e2d\u6587 \U0001f600 \u0000 \u00df",
    *TEXTS[:2],
]
WORDS = "river stone cloud lantern meadow copper window harvest thunder silver garden winter " * 3


def curated(root: Path, vocabulary_file: Path, vocab_size: int) -> DataConfig:
    """One source of 90 documents with hard texts, not prepared."""
    raw = root / "raw"
    raw.mkdir(parents=True)
    rows = [
        {"text": f"{WORDS} {number}: {HARD_TEXTS[number % len(HARD_TEXTS)]}.", "id": str(number)}
        for number in range(90)
    ]
    (raw / "0.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return DataConfig(
        folder=str(root / "data"),
        seed=3,
        block_tokens=64,
        heldout_percent=20.0,
        reset_state=True,
        workers=1,
        tokenizer=TokenizerConfig(str(vocabulary_file), None, vocab_size, 1),
        sources={"text": Source("curated", str(raw), "CC0-1.0", 1.0, 1)},
        stages=[Stage("only", 640, 64, {"text": 1.0})],
    )


@dataclass
class Prepared:
    """A tokenizer of a kind, and data prepared with it."""

    kind: str
    config: DataConfig
    tokenizer: Tokenizer  # as written, with special tokens inside text as plain text
    eos: int


@pytest.fixture(scope="module", params=list(KINDS))
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    root = tmp_path_factory.mktemp(request.param)
    file = write_vocabulary(request.param, root / "vocabulary")
    loaded = tokenizer.load(file)
    size = -(-vocabulary.required_vocab_size(loaded) // 64) * 64
    config = curated(root, file, size)
    prepare(config)
    loaded.encode_special_tokens = True
    return Prepared(request.param, config, loaded, END_IDS[request.param])


def normal(kind: str, text: str) -> str:
    """The text that a kind's normalizer leaves; sentencepiece's sign for a space becomes one."""
    return text.replace("\u2581", " ") if kind == "llama" else unicodedata.normalize("NFC", text)


def documents(prepared: Prepared) -> list[np.ndarray]:
    """Ids of every document, both splits, each with its end token."""
    folder = source_folder(prepared.config, "text")
    manifest = read_manifest(folder)
    splits = [Documents(folder, manifest, split) for split in SPLITS]
    return [each.ids(number) for each in splits for number in range(len(each))]


def test_shards_hold_every_text_and_one_end_token(prepared: Prepared) -> None:
    manifest = open_manifests(prepared.config)["text"]
    assert manifest.eos == prepared.eos
    assert manifest.dtype == ("<u4" if prepared.kind == "qwen" else "<u2")
    folder = source_folder(prepared.config, "text")
    for file in manifest.files():
        size = (folder / file.name).stat().st_size
        assert size == file.tokens * (4 if prepared.kind == "qwen" else 2)
    all_ids = documents(prepared)
    assert all((ids == prepared.eos).sum() == 1 and ids[-1] == prepared.eos for ids in all_ids)
    decoded = {
        prepared.tokenizer.decode(ids[:-1].tolist(), skip_special_tokens=False) for ids in all_ids
    }
    (clean,) = (Path(prepared.config.folder) / "clean" / "text").glob("*.jsonl.gz")
    with gzip.open(clean, "rt") as lines:
        texts = {normal(prepared.kind, json.loads(line)["text"]) for line in lines}
    assert decoded == texts and len(texts) == 90
    if prepared.kind == "qwen":
        assert any((ids[:-1] >= 2**16).any() for ids in all_ids)
    verify(prepared.config, VerifySettings(samples=90, hashes=True))


def test_preparing_again_and_adopting_reuse_the_shards(
    prepared: Prepared, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(prepared.config)
    adopt(prepared.config)
    prepare(prepared.config)
    out = capsys.readouterr().out
    assert f"({prepared.eos})" in out and "tokens into" not in out
    assert out.count("text: reused") == 4  # clean documents and shards, twice


def test_bytes_of_ids_are_those_of_the_text(prepared: Prepared) -> None:
    lengths = byte_lengths(prepared.tokenizer, prepared.eos)
    for text in HARD_TEXTS:
        (ids,) = encode(prepared.tokenizer, prepared.eos, WIDE, [text])
        assert lengths[ids].sum() == len(normal(prepared.kind, text).encode()), text


def test_the_loader_resets_after_the_end_token(prepared: Prepared) -> None:
    manifests = open_manifests(prepared.config)
    loader = Loader(compile_plan(prepared.config, manifests), manifests)
    stage = loader.plan.stages[0]
    batch = loader.read(stage, np.arange(stage.tokens // stage.seq_len))
    assert batch.doc_starts is not None and batch.doc_starts.any()
    ends = batch.tokens[:, :-1] == prepared.eos
    assert torch.equal(batch.doc_starts[:, 1:], ends)
    sequence = batch.tokens[0].numpy()
    shown = decode(prepared.tokenizer, prepared.eos, sequence)
    name = prepared.tokenizer.id_to_token(prepared.eos)
    assert shown.count(f"\n{name}\n") == (sequence == prepared.eos).sum()


def test_a_run_trains_and_its_export_reads_the_same_ids(prepared: Prepared, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = prepared.config
    manifests = open_manifests(config)
    loader = Loader(compile_plan(config, manifests), manifests)
    stage = loader.plan.stages[0]
    batch = loader.read(stage, np.arange(4))
    shape = replace(TINY, vocab_size=config.tokenizer.vocab_size)
    model = model_of(shape)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        loss = model(batch.tokens, batch.targets, batch.doc_starts)[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    evaluation = replace(
        typed(EvaluationConfig, "demo"),
        run=Run("small", str(tmp_path), 0),
        model=shape,
        data=config,
        eval=EvalConfig(seq_len=16, batch_sequences=8, max_tokens=10**6),
    )
    save_checkpoint(evaluation.run, shape, model)
    export(evaluation)
    folder = evaluation.run.files.hf
    written = json.loads((folder / "config.json").read_text())
    pad = {"neox": 0, "llama": 2, "qwen": 66_002}[prepared.kind]
    assert [written[f"{key}_token_id"] for key in ("bos", "eos", "pad")] == [
        prepared.eos,
        prepared.eos,
        pad,
    ]
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token) == (prepared.eos, pad, None)
    exported = tokenizer.load(folder / "tokenizer.json")
    for text in (*TEXTS[:2], " leading", "run        of spaces"):
        ids = prepared.tokenizer.encode(text, add_special_tokens=False).ids
        assert loaded(text)["input_ids"] == ids == exported.encode(text).ids
        assert loaded.decode(ids) == text
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == (
        config.tokenizer.vocab_size
    )
    shards = Shards(source_folder(config, "text"), manifests["text"], "heldout")
    ids = shards.read(0, shards.tokens)
    ((_, score),) = evaluate(model.eval(), config, manifests, 16, 8, 10**6)
    texts = [
        prepared.tokenizer.decode(part[:-1].tolist(), skip_special_tokens=False)
        for part in np.split(ids, np.flatnonzero(ids == prepared.eos) + 1)[:-1]
    ]
    first = prepared.tokenizer.decode(ids[:1].tolist())
    # the first token is not predicted; Llama's holds the space that is no part of the text
    extra = -1 if prepared.kind == "llama" else 0
    assert score.bytes == len("".join(texts).encode()) - len(first.encode()) + extra


def test_generation_keeps_spaces_and_stops_at_the_end_token(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The river runs past\n the stone house.\nGr\u00f6\u00dfe"
    ids = prepared.tokenizer.encode(text, add_special_tokens=False).ids
    model = model_of(TINY)
    for cut in range(1, len(ids)):
        prompt = prepared.tokenizer.decode(ids[:cut])
        if prepared.tokenizer.encode(prompt, add_special_tokens=False).ids != ids[:cut]:
            continue  # cut inside a character or a word
        generated = [*ids[cut:], prepared.eos, *ids[:3]]
        monkeypatch.setattr(
            model, "stream", lambda *_, ids=generated: (torch.tensor([id]) for id in ids)
        )
        pieces = stream(model, prepared.tokenizer, prepared.eos, prompt, 99, GREEDY)
        assert prompt + "".join(pieces) == text


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "a",
                "river",
                "7",
                "123",
                ".",
                ");",
                "):",
                "...",
                "</s>",
                " ",
                "  ",
                "\n",
                "\n\n",
                "\xe9",
            ]
        ),
        max_size=60,
    ).map("".join),
    st.integers(1, 40),
)
@pytest.mark.parametrize("kind", list(KINDS))
def test_pieces_tokenize_like_the_whole_text(kind: str, text: str, size: int) -> None:
    loaded = TOKENIZERS[kind]
    pieces = pieces_of(loaded, text, size)
    assert "".join(pieces) == text
    ids = [id for piece in pieces for id in loaded.encode(piece, add_special_tokens=False).ids]
    assert ids == loaded.encode(text, add_special_tokens=False).ids


def test_seams_depend_on_the_tokenizer() -> None:
    code, prose = "f(x):\ny():\n" * 20, "a river\nruns past\n" * 20
    seams = {kind: find_seam(TOKENIZERS[kind], prose, 0, 100) for kind in KINDS}
    assert seams == {"neox": 97, "llama": None, "qwen": 97}
    assert find_seam(TOKENIZERS["neox"], code, 0, 100) == 98
    assert find_seam(TOKENIZERS["qwen"], code, 0, 100) is None


def plain(kind: str) -> Tokenizer:
    loaded, _ = KINDS[kind]()
    loaded.encode_special_tokens = True
    return loaded


TOKENIZERS = {kind: plain(kind) for kind in KINDS}


def settings_of(file: Path, eos_token: str | None = None) -> TokenizerConfig:
    return TokenizerConfig(str(file), None, 70_000, 1, eos_token=eos_token)


def test_the_end_token_is_set_or_found(tmp_path: Path) -> None:
    file = write_vocabulary("qwen", tmp_path)
    loaded = tokenizer.load(file)
    assert end_token(file, loaded) == "<|endoftext|>"
    assert end_token(file, loaded, "<|im_end|>") == "<|im_end|>"
    copy_tokenizer(settings_of(file, "<|im_end|>"), tmp_path / "copy")
    copied = tmp_path / "copy" / "tokenizer.json"
    assert end_id(copied, tokenizer.load(copied)) == 66_002
    config = file.with_name("tokenizer_config.json")
    config.unlink()
    assert end_token(file, loaded) == "<|endoftext|>"  # by its name
    loaded.add_special_tokens(["</s>"])
    with pytest.raises(InputError, match=r"data.tokenizer.eos_token to one of <\|endof.*, </s>"):
        end_token(file, loaded)
    with pytest.raises(InputError, match="names the end token filler3, which is no special token"):
        end_token(file, loaded, "filler3")
    config.write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(InputError, match="tokenizer_config.json names the end token <.end.>"):
        end_token(file, loaded)
    config.write_text("[]")
    with pytest.raises(InputError, match="is not a JSON object: mend or remove it"):
        end_token(file, loaded)
    config.write_text('{"eos_token": null}')
    other = Tokenizer(models.BPE())
    other.add_special_tokens(["<|stop|>"])
    with pytest.raises(InputError, match=r"eos_token to one of <\|stop\|>$"):
        end_token(file, other)


def test_tokenizers_that_lose_text_are_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    words.add_special_tokens(["</s>"])
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(InputError, match="neither byte-level nor has byte fallback"):
        copy_tokenizer(settings_of(tmp_path / "words.json"), tmp_path / "out")
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    unigram = Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    unigram.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    unigram.add_special_tokens(["</s>"])
    unigram.save(str(tmp_path / "unigram.json"))
    with pytest.raises(InputError, match="encodes the text '</s>' with its end token"):
        copy_tokenizer(settings_of(tmp_path / "unigram.json"), tmp_path / "out")


def test_truncation_padding_and_templates_of_a_file_are_not_used(tmp_path: Path) -> None:
    limited, _ = neox()
    limited.enable_truncation(4)
    limited.enable_padding(length=9)
    limited.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    limited.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizer.load(tmp_path / "tokenizer.json")
    (ids,) = encode(loaded, 0, WIDE, ["a river of ten words and more"])
    assert loaded.decode(ids[:-1].tolist()) == "a river of ten words and more"


def test_shards_widen_above_65536_ids() -> None:
    assert [id_dtype(size).itemsize for size in (300, 65_536, 65_537, 152_064)] == [2, 2, 4, 4]


def test_training_names_another_end_token(prepared: Prepared) -> None:
    settings = replace(prepared.config.tokenizer, eos_token="<other>")
    with pytest.raises(InputError, match="data.tokenizer.eos_token is <other>, but the shards"):
        open_manifests(replace(prepared.config, tokenizer=settings))
    path = source_folder(prepared.config, "text") / "manifest.json"
    written = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(written) | {"eos": 10**6}))
        with pytest.raises(InputError, match="is not a manifest .eos 1000000 and vocab_size"):
            open_manifests(prepared.config)
    finally:
        path.write_text(written)
