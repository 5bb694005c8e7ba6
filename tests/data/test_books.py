"""Recipe books: notices of every age of Project Gutenberg are cut, and nothing of the book."""

from types import SimpleNamespace

import pytest

from data.recipes.books import BookBody
from tests.data.samples import PROSE

STORY = "\n\n".join(f"Chapter {i} of the tale.\n{PROSE}" for i in range(40))
SMALL_PRINT = (
    "Project Gutenberg's Etext of The River, by Ann Lee\n\nCopyright laws are changing all over "
    "the world.\n\n**START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START**\n"
    + "You can distribute copies of this etext if you agree to these terms.\n"
    * 300
)
ANNOUNCED = (
    "The Project Gutenberg EBook of The River, by Ann Lee\n\nThis eBook is for the use of anyone "
    "anywhere at no cost and with almost no restrictions whatsoever.\n\nRelease Date: May, 2004\n\n"
)
LICENCE = (
    "Updated editions will replace the previous one.\n\nTHE FULL PROJECT GUTENBERG LICENSE\n"
    + "PLEASE READ THIS BEFORE YOU DISTRIBUTE OR USE THIS WORK\n" * 300
)


def body_of(text: str) -> str:
    document = SimpleNamespace(text=text)
    assert BookBody().filter(document) is True  # type: ignore[arg-type]
    return str(document.text)


HEADERS = {
    "small print": SMALL_PRINT
    + "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n\n",
    "small print of 2001": SMALL_PRINT
    + "*END THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.10/04/01*END*\n",
    "this": ANNOUNCED + "*** START OF THIS PROJECT GUTENBERG EBOOK THE RIVER ***\n",
    "the": ANNOUNCED + "*** START OF THE PROJECT GUTENBERG EBOOK THE RIVER ***\n",
    "close": ANNOUNCED + "***START OF THE PROJECT GUTENBERG EBOOK THE RIVER***\n",
    "case": ANNOUNCED + "*** Start of the Project Gutenberg eBook, The River ***\n",
    "etext": ANNOUNCED + "*** START OF THE PROJECT GUTENBERG ETEXT THE RIVER ***\n",
    "two lines": ANNOUNCED
    + "*** START OF THE PROJECT GUTENBERG EBOOK THE RIVER AND THE MANY\nDITCHES OF ITS SHORE ***\n",
    "unclosed": ANNOUNCED + "*** START OF THE PROJECT GUTENBERG EBOOK THE RIVER\n",
    "copyrighted": ANNOUNCED + "*** START OF THE COPYRIGHTED PROJECT GUTENBERG EBOOK RIVER ***\n",
    "both": ANNOUNCED
    + "*** START OF THE PROJECT GUTENBERG EBOOK THE RIVER ***\n"
    + SMALL_PRINT
    + "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*\n",
    "credits": ANNOUNCED
    + "*** START OF THE PROJECT GUTENBERG EBOOK THE RIVER ***\n\n\n\n\nProduced by Bo Ek and the "
    "Online Distributed\nProofreading Team at http://www.pgdp.net\n\n\n[Transcriber's Note: the\n"
    "spelling of the printed book was kept.]\n\n",
    "other editions": ANNOUNCED
    + "*** START OF THE PROJECT GUTENBERG EBOOK THE RIVER ***\n\n\nE-text prepared by Bo Ek\n"
    "(http://www.pgdp.net)\n\nfrom page images generously made available by\nInternet Archive\n"
    "(http://www.archive.org)\n\n\n\nNote: Project Gutenberg also has an HTML version of this\n"
    "      file which includes the original illustrations.\n      See 1-h.htm or 1-h.zip\n\n\n"
    "      Images of the original pages are available through\n      Internet Archive.\n\n\n",
    "short": "Licence.\n*** START OF THE PROJECT GUTENBERG EBOOK RIVERS ***\n",
    "none": "",
}
FOOTERS = {
    "today": f"*** END OF THE PROJECT GUTENBERG EBOOK THE RIVER ***\n\n{LICENCE}",
    "2000s": "\n\nEnd of the Project Gutenberg EBook of The River, by Ann Lee\n\n"
    f"*** END OF THIS PROJECT GUTENBERG EBOOK THE RIVER ***\n\n***** This file should be named "
    f"1.txt *****\n{LICENCE}",
    "close": f"***END OF THE PROJECT GUTENBERG EBOOK THE RIVER***\n{LICENCE}",
    "1990s": "\nEnd of Project Gutenberg's Etext of The River, by Ann Lee\n",
    "french": "\n\nFin de Projet Gutenberg La Rivi\xe8re, par Ann Lee\n",
    "the 1990s": "\nEnd of The Project Gutenberg Etext of The River\n",
    "no mark": "*** START: FULL LICENSE ***\n\n" + LICENCE,
    "licence": "\nTHE FULL PROJECT GUTENBERG\u2122 LICENSE\n" + LICENCE,
    "small print": f"\n**START**THE SMALL PRINT!**FOR PUBLIC DOMAIN ETEXTS**START**\n{SMALL_PRINT}",
    "short": "*** END OF THE PROJECT GUTENBERG EBOOK RIVERS ***\nMore.",
    "none": "",
}


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("footer", FOOTERS)
def test_only_the_story_is_left(header: str, footer: str) -> None:
    assert body_of(f"{HEADERS[header]}\n{STORY}\n\n{FOOTERS[footer]}") == STORY.strip()


def test_a_short_story_with_a_long_header_is_kept() -> None:
    text = HEADERS["small print"] + PROSE + "\n\n" + FOOTERS["2000s"]
    assert body_of(text) == PROSE.strip()


@pytest.mark.parametrize(
    "quoted",
    [
        "*** START OF THE PROJECT GUTENBERG EBOOK THE SEA ***",
        "*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04.29.93*END*",
        "*** END OF THE PROJECT GUTENBERG EBOOK THE SEA ***",
        "End of Project Gutenberg's Etext of The Sea",
        "THE FULL PROJECT GUTENBERG LICENSE",
        "Produced by the baker, the bread was good.",
    ],
)
@pytest.mark.parametrize("position", [1, 20, 38])
@pytest.mark.parametrize(("header", "footer"), [("none", "none"), ("the", "2000s")])
def test_a_book_that_quotes_a_notice_is_not_cut(
    quoted: str, position: int, header: str, footer: str
) -> None:
    chapters = STORY.split("\n\n")
    story = "\n\n".join([*chapters[:position], 2 * f"{PROSE}\n", quoted, *chapters[position:]])
    assert body_of(f"{HEADERS[header]}\n{story}\n\n{FOOTERS[footer]}") == story.strip()


def test_words_in_a_sentence_are_no_marks() -> None:
    story = f"{PROSE}\nHe typed *** END OF THE PROJECT GUTENBERG EBOOK *** and slept.\n\n{PROSE}"
    assert body_of(story) == story.strip()


def test_page_numbers_and_hyphens_of_the_edition_are_removed() -> None:
    text = f"{PROSE}\nThe mill-\n12\nowner and the vil-\n [Page 13] \nlage slept.\nWell-\nKnown."
    assert body_of(text) == f"{PROSE}\nThe millowner and the village slept.\nWell-\nKnown."
    roman = "The\nxiv\nLXXXIX\n ccii\ncivil\nill\niiii\nend"
    assert body_of(roman) == "The\ncivil\nill\niiii\nend"
