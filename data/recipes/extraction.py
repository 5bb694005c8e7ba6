"""Extracts the main text of HTML pages; counts and reports every page that is dropped."""

from collections.abc import Callable

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.extractors.base import ExtractorSandbox
from datatrove.pipeline.writers.disk_base import DiskWriter

from data.readers.base import IS_HTML
from data.readers.normalize import normalize

# Long enough that a busy machine drops no page; with datatrove's default of 1 s it would.
TIMEOUT_SECONDS = 60


class MainTextExtractor(Trafilatura):
    """Runs Trafilatura in a child process that a broken page may kill.

    datatrove counts a failed page under other names and never writes it out. This class drops it
    like any other document, with the reason `timeout`, `crash`, `error` or `no_text`.
    """

    def __init__(self) -> None:
        # With deduplicate a page's text would depend on the pages before it.
        super().__init__(favour_precision=True, timeout=TIMEOUT_SECONDS, deduplicate=False)
        self.exclusion_writer: DiskWriter | None = None

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Yield documents with the page's main text as text, and other documents unchanged."""
        with ExtractorSandbox(timeout=self.timeout, warmup_text="") as sandbox:
            for document in data:
                self.stat_update("total")
                if not document.metadata.get(IS_HTML):  # text, or extracted by the crawler
                    self.stat_update("forwarded", "unchanged")
                    self.update_doc_stats(document)
                    yield document
                    continue
                with self.track_time():
                    text, reason = try_extract(sandbox, document.text, self.extract)
                if text and (text := normalize(text)):  # entities may be odd characters
                    document.text = text
                    self.stat_update("forwarded")
                    self.update_doc_stats(document)
                    yield document
                else:
                    self.exclude(document, reason, rank)
        if self.exclusion_writer is not None:
            self.exclusion_writer.close()

    def exclude(self, document: Document, reason: str, rank: int) -> None:
        """Count a page without text, and write it out if there is an exclusion writer."""
        self.stat_update("dropped", f"dropped_{reason}")
        if self.exclusion_writer is not None:
            document.metadata["filter_reason"] = reason
            self.exclusion_writer.write(document, rank)


def try_extract(
    sandbox: ExtractorSandbox, page: str, extract: Callable[[str], str]
) -> tuple[str | None, str]:
    """Return the page's text, if any, and the reason to drop a page without text."""
    try:
        return sandbox.process_document(page, extract), "no_text"
    except TimeoutError:
        return None, "timeout"
    except EOFError:
        return None, "crash"
    except Exception:  # any error of the parser at bad markup
        return None, "error"
