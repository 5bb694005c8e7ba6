"""One small export read by transformers, lm-evaluation-harness and llama.cpp: ids and logits.

A model of random weights with Falcon's vocabulary, once with one eps in all norms and once with the
released pair, of which llama.cpp knows only the block's. Its converter and the vocabulary are from
the source distribution of llama-cpp-python, llama.cpp itself from the wheel of cyllama; both are
downloaded from the package index into --cache and checked by hash. Prints the largest difference of
logits last, relative to their standard deviation. Fails where ids or the likeliest tokens differ,
or if the root mean square of the differences is above a limit: with the released pair the largest
one depends on the random weights (1e-3 to 8e-3 over twelve of them), the root mean square little.
"""

import argparse
import os
import platform
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import write_results
from core.errors import InputError
from core.files import sha256_of
from data.download import download
from data.pipeline import falcon
from data.tokenizer import load
from eval.hf.tokenizer import check_tokenizer, plain_ids, write_tokenizer
from eval.hf.transformers_model import load_transformers_model
from model.mamba import FalconMamba, ModelConfig
from tests.compose import run_config

WHEEL = "cyllama-0.2.18-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl"
WHEEL_SHA256 = "64bdb8d43f07d2cc3bf08babcc0d86f3650f6631dbc96719755dc3563652a562"
CONVERTER = "vendor/llama.cpp"
# the block's eps, that of the norms of dt, B and C, and the limit of the root mean square
EPS = {"one eps": (1e-5, 1e-5, 2e-5), "released pair": (1e-5, 1e-6, 2e-3)}
TEXTS = (
    " The 12345 lamps,  not all\n\n\tfoo(bar);\nbaz\n",
    "na\u00efve e\u0301 \u4e2d\u6587 \U0001f600 def main(): return 2024",
)


@dataclass
class Answer:
    """What one reader makes of a text."""

    ids: list[int]
    logits: np.ndarray  # [l, vocab_size]


@dataclass
class Difference:
    """Of logits, over their standard deviation."""

    root_mean_square: float
    largest: float


def unavailable_reason() -> str | None:
    """Why the wheel does not run here."""
    here = (platform.system(), platform.machine(), sys.version_info[:2])
    if here != ("Linux", "x86_64", (3, 11)):
        return f"{WHEEL} is for Python 3.11 on Linux and x86_64"
    return None


def fetch(cache: Path) -> tuple[Path, Path, Path]:
    """The source distribution, llama.cpp's converter and the unpacked wheel, in a folder.

    Raises InputError if one cannot be downloaded or has another hash.
    """
    cache.mkdir(parents=True, exist_ok=True)
    sdist, wheel = cache / falcon.SDIST, cache / WHEEL
    if not sdist.is_file():
        download("sdist", str(run_config("7b").data.tokenizer.url), sdist)
    if not wheel.is_file():
        requirements = cache / "requirements.txt"
        requirements.write_text(f"cyllama==0.2.18 --hash=sha256:{WHEEL_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes"]
        run([*command, "--only-binary", ":all:", "-d", str(cache), "-r", str(requirements)])
    for path, expected in ((sdist, falcon.SDIST_SHA256), (wheel, WHEEL_SHA256)):
        if sha256_of(path) != expected:
            raise InputError(f"{path} has another sha256 than {expected}: remove it")
    converter, site = cache / "llama.cpp", cache / "cyllama"
    with tarfile.open(sdist) as archive:
        prefix = f"{falcon.RELEASE}/{CONVERTER}/"
        for member in archive.getmembers():
            name = member.name.removeprefix(prefix)
            wanted = name.startswith(("gguf-py/", "conversion/", "convert_hf_to_gguf.py"))
            if member.isfile() and wanted and not (converter / name).exists():
                archive.extract(member.replace(name=name), converter, filter="data")
    if not site.is_dir():
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return sdist, converter, site


def run(command: list[str], *folders: Path) -> str:
    """Output of a command with folders on PYTHONPATH; raises InputError with its last line."""
    path = os.pathsep.join(map(str, folders))
    environment = {**os.environ, **({"PYTHONPATH": path} if folders else {})}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:]
        raise InputError(f"{' '.join(command[:5])} ended with {result.returncode}: {last}")
    return result.stdout


def write_export(folder: Path, tokenizer: Path, eps: float, mixer_eps: float) -> FalconMamba:
    """Write a model of random weights with Falcon's vocabulary as an export."""
    vocab_size = load(tokenizer).get_vocab_size()
    config = ModelConfig(
        d_model=64, n_layer=2, vocab_size=vocab_size, norm_eps=eps, mixer_norm_eps=mixer_eps
    )
    model = FalconMamba(config, seed=1)
    model.eos = load(tokenizer).token_to_id("<|endoftext|>")
    model.save_pretrained(folder)
    write_tokenizer(tokenizer, folder)
    check_tokenizer(tokenizer, folder, vocab_size)
    return model


def answers_of_transformers(folder: Path) -> list[Answer]:
    """As a user of transformers gets them."""
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_transformers_model(folder)
    answers = []
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        with torch.no_grad():
            answers.append(Answer(ids, model(torch.tensor([ids])).logits[0].double().numpy()))
    return answers


def answers_of_llama_cpp(folder: Path, converter: Path, site: Path) -> list[Answer]:
    """As llama.cpp gets them, from the converted export, in a process of its own."""
    gguf, output = folder / "model.gguf", folder / "answers.npz"
    script = [sys.executable, str(converter / "convert_hf_to_gguf.py"), str(folder)]
    run([*script, "--outfile", str(gguf), "--outtype", "f32"], converter / "gguf-py")
    root = Path(__file__).resolve().parents[1]
    reader = [sys.executable, "-m", "benchmarks.serving", "--read", str(gguf), str(output)]
    run(reader, site, root)
    with np.load(output) as arrays:
        return [Answer(arrays[f"ids{i}"].tolist(), arrays[f"logits{i}"]) for i in range(len(TEXTS))]


def read_with_llama_cpp(gguf: Path, output: Path) -> None:
    """Write llama.cpp's ids and logits of the texts; a new context for each prefix.

    The binding gives only the last position's logits reliably.
    """
    from cyllama.llama import llama_cpp

    class Model(llama_cpp.LlamaModel):  # type: ignore[misc]
        """The binding's contexts ask for n_vocab, which its model lacks."""

        @property
        def n_vocab(self) -> int:
            """Size of the vocabulary."""
            return int(self.get_vocab().n_vocab)

    llama_cpp.disable_logging()
    model = Model(str(gguf))
    arrays: dict[str, Any] = {}
    for index, text in enumerate(TEXTS):
        ids = model.get_vocab().tokenize(text, True, False)
        rows = []
        for length in range(1, len(ids) + 1):
            settings = llama_cpp.LlamaContextParams()
            settings.n_ctx = len(ids)
            context = llama_cpp.LlamaContext(model, settings)
            context.decode(llama_cpp.llama_batch_get_one(ids[:length]))
            rows.append(np.array(context.get_logits_ith(-1), dtype=np.float64))
        arrays |= {f"ids{index}": np.array(ids), f"logits{index}": np.stack(rows)}
    np.savez(output, **arrays)


def compare(found: list[Answer], expected: list[Answer], reader: str) -> Difference:
    """Compare the logits of the texts.

    Raises InputError where ids or the likeliest token of a position differ.
    """
    for answer, other in zip(found, expected, strict=True):
        if answer.ids != other.ids:
            raise InputError(f"{reader} has the ids {answer.ids}, training {other.ids}")
        if (answer.logits.argmax(1) != other.logits.argmax(1)).any():
            raise InputError(f"{reader}'s likeliest tokens differ")
    ours = np.concatenate([answer.logits for answer in expected])
    distance = np.concatenate([answer.logits for answer in found]) - ours
    return Difference(
        float(np.sqrt(np.square(distance).mean()) / ours.std()),
        float(np.abs(distance).max() / ours.std()),
    )


def harness_difference(folder: Path, expected: list[Answer]) -> Difference:
    """Relative difference of lm-evaluation-harness' log-likelihood of a text's second half."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    context, comma, continuation = TEXTS[0].partition(",")  # it moves spaces to the continuation
    context += comma
    model = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)
    request = Instance("loglikelihood", {}, (context, continuation), 0)
    ((found, _),) = model.loglikelihood([request], disable_tqdm=True)
    ids = expected[0].ids
    scores = torch.from_numpy(expected[0].logits).log_softmax(1)
    count = len(model.tok_encode(context))
    ours = sum(float(scores[i - 1, ids[i]]) for i in range(count, len(ids)))
    return Difference(abs(found / ours - 1), abs(found / ours - 1))


def main() -> None:
    """Run the chain, print a line per reader and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("runs/serving"))
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--read", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read_with_llama_cpp(*arguments.read)
        return
    if reason := unavailable_reason():
        raise SystemExit(f"error: {reason}")
    sdist, converter, site = fetch(arguments.cache)
    tokenizer = arguments.cache / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file():
        falcon.build(sdist, tokenizer)
    differences: dict[str, Difference] = {}
    for name, (eps, mixer_eps, allowed) in EPS.items():
        folder = arguments.cache / name.replace(" ", "-")
        model = write_export(folder, tokenizer, eps, mixer_eps)
        expected = []
        for text in TEXTS:
            ids = plain_ids(load(tokenizer), text)
            with torch.no_grad():
                expected.append(Answer(ids, model(torch.tensor([ids]))[0].double().numpy()))
        found = {
            "transformers": compare(answers_of_transformers(folder), expected, "transformers"),
            "lm-evaluation-harness": harness_difference(folder, expected),
            "llama.cpp": compare(
                answers_of_llama_cpp(folder, converter, site), expected, "llama.cpp"
            ),
        }
        positions = sum(len(answer.ids) for answer in expected)
        for reader, difference in found.items():
            print(
                f"{name}, {reader}: ids and likeliest tokens of {positions} positions equal; "
                f"logits differ by {difference.largest:.1e} at most, root mean square "
                f"{difference.root_mean_square:.1e}",
                flush=True,
            )
            if not difference.root_mean_square <= allowed:
                raise SystemExit(f"error: that is more than {allowed:.0e}")
            differences[f"{name}, {reader}"] = difference
    if not arguments.no_record:
        notes = {name: asdict(difference) for name, difference in differences.items()}
        print(write_results([], "serving", "CPU", {}, notes))
    one, pair = (
        max(each.largest for key, each in differences.items() if key.startswith(name))
        for name in EPS
    )
    print(f"largest relative difference: {one:.1e} with one eps, {pair:.1e} with the released pair")


if __name__ == "__main__":
    main()
