"""Which pages are not read at all: RefinedWeb's block lists and scored words.

The lists that datatrove carries hold 4.6 million domains and take about 0.8 GB; they are loaded
once, in the process that forks the workers, so that these share them. RefinedWeb also leaves out
the sites that are sources of their own.
"""

from copy import copy
from functools import lru_cache
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import URLFilter
from datatrove.pipeline.filters.base_filter import BaseFilter

from core.errors import InputError

# RefinedWeb (arXiv 2306.01116, appendix G.1) keeps these for curated sources.
CURATED_SITES = frozenset(
    "wikipedia.org wikibooks.org wikiquote.org wikisource.org wiktionary.org wikinews.org "
    "wikiversity.org arxiv.org stackexchange.com stackoverflow.com superuser.com serverfault.com "
    "askubuntu.com mathoverflow.net reddit.com github.com ycombinator.com nih.gov uspto.gov "
    "gutenberg.org".split()
)


class Blocklist(URLFilter):
    """datatrove's filter, without its look at the network, and with the curated sites."""

    name = "URL"

    def __init__(self, path: str | None) -> None:
        """`path` holds one domain a line in place of the lists that datatrove carries."""
        from tldextract import TLDExtract

        if path is not None and not Path(path).is_file():
            raise InputError(
                f"no block list at {path}: set data.assets.url_blocklist.path, or to null for "
                "datatrove's"
            )
        domains = (
            None
            if path is None
            else [line for line in Path(path).read_text().splitlines() if line.strip()]
        )
        super().__init__(extra_domains=domains, use_integrated_lists=path is None)
        self.tldextractor = TLDExtract(suffix_list_urls=())  # the list that the package carries

    def filter(self, document: Document) -> bool | tuple[bool, str]:
        """True, or (False, reason)."""
        url = document.metadata.get("url")
        if not url:
            return False, "no_url"
        if self.tldextractor(url).top_domain_under_public_suffix in CURATED_SITES:
            return False, "curated_site"
        return super().filter(document)


@lru_cache
def loaded(path: str | None) -> Blocklist:
    """The filter whose lists all others of this process and its children share."""
    found = Blocklist(path)
    found.download_data()
    return found


def blocklist(path: str | None) -> Blocklist:
    """A filter with shared lists and counts of its own."""
    fresh = copy(loaded(path))
    BaseFilter.__init__(fresh)
    return fresh
