"""URL filter for web pages: RefinedWeb's block lists, scored words and curated sites.

datatrove's block lists have 4.6 million domains and take about 0.8 GB. They are loaded once, in the
process that forks the workers, so that all workers share them.
"""

from copy import copy
from functools import lru_cache
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import URLFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from core.errors import InputError
from data.readers.base import IS_PAGE

# RefinedWeb (arXiv 2306.01116, appendix G.1) excludes sites that are separate curated sources.
CURATED_SITES = frozenset(
    "wikipedia.org wikibooks.org wikiquote.org wikisource.org wiktionary.org wikinews.org "
    "wikiversity.org arxiv.org stackexchange.com stackoverflow.com superuser.com serverfault.com "
    "askubuntu.com mathoverflow.net reddit.com github.com ycombinator.com nih.gov uspto.gov "
    "gutenberg.org".split()
)


class BlocklistFilter(URLFilter):
    """datatrove's URL filter, without network access and with the curated sites."""

    name = "URL"

    def __init__(self, path: str | None) -> None:
        """`path`: file of one domain per line that replaces datatrove's lists."""
        from tldextract import TLDExtract

        if path is not None and not Path(path).is_file():
            raise InputError(
                f"no block list at {path}: set data.assets.url_blocklist.path to a file, or to "
                "null for datatrove's lists"
            )
        domains = None
        if path is not None:
            try:
                text = Path(path).read_text(encoding="utf-8")
            except UnicodeError as error:
                raise InputError(
                    f"block list {path} is not UTF-8 ({error}): fix data.assets.url_blocklist"
                ) from error
            domains = [line for line in text.splitlines() if line.strip()]
        super().__init__(extra_domains=domains, use_integrated_lists=path is None)
        self.tldextractor = TLDExtract(suffix_list_urls=())  # use the packaged list

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason); documents that are no pages, and files of pages, pass."""
        url = document.metadata.get("url")
        if not url or not document.metadata.get(IS_PAGE):
            return True
        if self.tldextractor(url).top_domain_under_public_suffix in CURATED_SITES:
            return False, "curated_site"
        return super().filter(document)


@lru_cache
def load_blocklist(path: str | None) -> BlocklistFilter:
    """Load the lists that all filters of this process and its children share."""
    blocklist = BlocklistFilter(path)
    blocklist.download_data()
    return blocklist


def make_blocklist_filter(path: str | None) -> BlocklistFilter:
    """Return a filter with shared lists and its own statistics."""
    filter_step = copy(load_blocklist(path))
    BaseFilter.__init__(filter_step)
    return filter_step
