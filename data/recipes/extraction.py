"""From a page's HTML to its main text, with every page accounted for."""

from collections.abc import Callable

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.extractors import Trafilatura
from datatrove.pipeline.extractors.base import ExtractorSandbox
from datatrove.pipeline.writers.disk_base import DiskWriter

# What is dropped must not depend on how busy the machine is; datatrove's second per page would make
# it so.
TIMEOUT_SECONDS = 60


class MainText(Trafilatura):
    """Trafilatura in a child process that a broken page may kill.

    datatrove counts a page that failed under names of its own and never writes it out; here it is
    dropped like any other document, for `timeout`, `crash`, `error` or `no_text`.
    """

    def __init__(self) -> None:
        # deduplicate keeps a memory across pages, so a page's text would depend on the pages before
        # it.
        super().__init__(favour_precision=True, timeout=TIMEOUT_SECONDS, deduplicate=False)
        self.exclusion_writer: DiskWriter | None = None

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Documents whose text is the page's main text."""
        with ExtractorSandbox(timeout=self.timeout, warmup_text="") as sandbox:
            for document in data:
                self.stat_update("total")
                with self.track_time():
                    text, reason = attempt(sandbox, document.text, self.extract)
                if text:
                    document.text = text
                    self.stat_update("forwarded")
                    self.update_doc_stats(document)
                    yield document
                else:
                    self.exclude(document, reason, rank)
        if self.exclusion_writer is not None:
            self.exclusion_writer.close()

    def exclude(self, document: Document, reason: str, rank: int) -> None:
        """Count a page without text and write it out where that is wanted."""
        self.stat_update("dropped", f"dropped_{reason}")
        if self.exclusion_writer is not None:
            document.metadata["filter_reason"] = reason
            self.exclusion_writer.write(document, rank)


def attempt(
    sandbox: ExtractorSandbox, page: str, extract: Callable[[str], str]
) -> tuple[str | None, str]:
    """(text, "") or (None, reason)."""
    try:
        return sandbox.process_document(page, extract), "no_text"
    except TimeoutError:
        return None, "timeout"
    except EOFError:
        return None, "crash"
    except Exception:  # whatever the parser raises at bad markup
        return None, "error"
