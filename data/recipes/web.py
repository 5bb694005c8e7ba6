"""Web pages as RefinedWeb: address, main text, language, repetition, quality, line-wise corrections.

Near duplicates (near_duplicates: 14x8 or, as RefinedWeb, 93x15) and exact substrings (exact_substrings: 50) follow as
passes over all documents, where the source asks for them.
"""

import importlib
import pydoc
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from unittest import mock

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter

from data.config import Assets, Source
from data.recipes import host
from data.recipes.classifiers import English
from data.recipes.extraction import MainText
from data.recipes.lines import LineCorrections
from data.recipes.readers import HOST, Warc, open_input
from data.recipes.urls import blocklist

# Checked in the parent before the first document. Without lxml_html_clean, or without spacy's word splitter, datatrove
# counts every page as a timeout or fails in the middle, and reports success. pylibmagic comes before magic: it brings
# the system library that magic looks for.
REQUIRES = ("orjson", "warcio", "pylibmagic", "magic", "trafilatura", "lxml_html_clean", "spacy",
            "fasttext", "tldextract", "ahocorasick", "xxhash")  # fmt: skip
RECIPE_VERSION = 1
ASSETS = ("language_model",)

# Gopher's published values (datatrove's defaults) hold for crawls. The host's help pages repeat signatures and list
# terms, and the word splitter counts every bracket as a word without letters: Gopher's values, in brackets, drop nearly
# all of them.
HOST_REPETITION = {
    "dup_line_frac": 0.4,  # [0.3]
    "dup_line_char_frac": 0.3,  # [0.2]
    "dup_n_grams": ((5, 0.45), (6, 0.4), (7, 0.35), (8, 0.3), (9, 0.25), (10, 0.2)),  # [0.15 ... 0.10]
}
HOST_QUALITY = {
    "max_non_alpha_words_ratio": 0.4,  # the least share of words with a letter [0.8]
    "min_stop_words": 1,  # [2]
}


class Page(pydoc.HTMLDoc):
    """The help page of one module, without what would leak or repeat.

    Values of data stay out: they hold this machine's environment and paths. So do members defined elsewhere: their
    text belongs to another page, which may be on the other side of the held-out split.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def own(self, thing: object) -> bool:
        """Whether the module, or the C module behind it, defines the thing."""
        return getattr(thing, "__module__", None) in (self.module, "_" + self.module)

    def docother(self, object, name=None, mod=None, *ignored):  # type: ignore[no-untyped-def]
        """The name of a datum without its value."""
        return f"<strong>{name}</strong>" if name else ""

    def filelink(self, url, path):  # type: ignore[no-untyped-def]
        """No path of this machine."""
        return ""

    def formattree(self, tree, modname, parent=None):  # type: ignore[no-untyped-def]
        """No list of class names."""
        return ""

    def docclass(self, object, name=None, mod=None, *args, **kwargs):  # type: ignore[no-untyped-def]
        """A class that the module defines; its own members only."""
        if not self.own(object):
            return ""

        def own_members(cls):  # type: ignore[no-untyped-def]
            return [member for member in classify(cls) if member[2] is cls]

        classify = pydoc.classify_class_attrs
        with mock.patch.object(pydoc, "classify_class_attrs", own_members):
            return super().docclass(object, name, mod, *args, **kwargs)

    def docroutine(self, object, name=None, mod=None, funcs={}, classes={}, methods={}, cl=None, *rest):  # type: ignore[no-untyped-def]  # noqa: B006
        """A function that the module defines, or any method of a class that is shown."""
        if cl is None and not self.own(object):
            return ""
        return super().docroutine(object, name, mod, funcs, classes, methods, cl, *rest)


def help_page(name: str) -> str | None:
    """Help of a standard module as HTML, or None where the module does not exist on this system."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    page = Page(name)
    # Addresses in default arguments change with every process.
    return re.sub(r"(&nbsp;| )at(&nbsp;| )0x[0-9a-fA-F]+", "", page.page(name, page.docmodule(module, name)))


class HostPages(Warc):
    """Help pages of the standard library, written to web archives and read back like a crawl."""

    name = "Help pages"

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Documents of modules rank, rank + world_size, ..., by way of one archive per task."""
        names = [name for name, _ in host.modules_of("web")][rank::world_size]
        archive = f"{rank:05d}.warc.gz"
        with self.data_folder.open(archive, "wb") as stream:
            pages = ((name, html) for name in names if (html := help_page(name)) is not None)
            write_archive(stream, ((f"http://host.invalid/{name}.html", html) for name, html in pages))
        for document in self.read_files_shard([archive]):
            document.metadata["group"] = document.metadata["url"].rsplit("/", 1)[1].removesuffix(".html")
            yield document


def write_archive(stream, pages: Iterator[tuple[str, str]]) -> None:  # type: ignore[no-untyped-def]
    """Write (address, HTML) pairs as response records; identifiers and dates are fixed: equal pages, equal bytes."""
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    writer = WARCWriter(stream, gzip=True)
    for url, html in pages:
        record = writer.create_warc_record(
            url,
            "response",
            payload=BytesIO(html.encode("utf-8", "replace")),
            http_headers=StatusAndHeaders(
                "200 OK", [("Content-Type", "text/html; charset=utf-8")], protocol="HTTP/1.0"
            ),
            warc_headers_dict={
                "WARC-Record-ID": f"<urn:page:{url}>",
                "WARC-Date": "2000-01-01T00:00:00Z",
                "WARC-Identified-Payload-Type": "text/html",
            },
        )
        writer.write_record(record)


def preload(source: Source, assets: Assets) -> None:
    """Load the block lists in the process that forks the workers."""
    if source.input != HOST:
        blocklist(assets.url_blocklist.path)


def steps(source: Source, folder: Path, assets: Assets) -> list[PipelineStep]:
    """Clean documents of `source`; the archives of the host's pages lie in `folder`/raw while it is built.

    The host's pages have no addresses and are English; they meet milder thresholds. Text that is extracted already
    (jsonl, parquet) meets all rules but the address's where it has none.
    """
    if source.input == HOST:
        quality = [GopherRepetitionFilter(**HOST_REPETITION), GopherQualityFilter(**HOST_QUALITY)]
        return [HostPages(str(folder / "raw")), MainText(), *quality]
    reader = open_input(source, folder, html=True)
    pipeline: list[PipelineStep] = [reader]
    if isinstance(reader, Warc):
        pipeline += [blocklist(assets.url_blocklist.path), MainText()]
    pipeline += [English(str(assets.language_model.path)), GopherRepetitionFilter(), GopherQualityFilter()]
    return [*pipeline, LineCorrections()]
