"""Papers: TeX is read by its grammar, prose stays prose."""

from pathlib import Path

import pytest

from data.recipes.papers import is_tex, mask, plain_body, strip_comments, tex_body
from tests.data.samples import PROSE, make_source, run_recipe, write_rows

PREAMBLE = "\\documentclass{article}\n\\begin{document}\n\\maketitle\n"


def body_of(text: str) -> str:
    stripped = strip_comments(text)
    return tex_body(stripped) if is_tex(mask(stripped)) else plain_body(text)


def test_papers_lose_preamble_comments_and_references(tmp_path: Path) -> None:
    head = "\\documentclass{article}\n\\usepackage{x}\n"
    tex = head + f"\\section{{Rivers}}\n{PROSE}% note\n%all\n5\\% of it.\n\\bibliography{{b}}"
    plain = f"Rivers\n\n{PROSE}\n\nReferences\n[1] A. Author, 1999.\n"
    write_rows(
        tmp_path / "raw" / "a.jsonl",
        [{"text": tex}, {"text": plain}, {"text": "\\documentclass{a} none"}],
    )
    rows, steps = run_recipe(make_source("technical", tmp_path / "raw"), tmp_path / "clean")
    assert rows[0]["text"] == f"\\section{{Rivers}}\n{PROSE}\n5\\% of it."
    assert rows[1]["text"] == f"Rivers\n\n{PROSE}\n" and steps[1].dropped == {"no_heading": 1}


@pytest.mark.parametrize(
    "heading",
    [
        "\\part{First}",
        "\\chapter{One}",
        "\\section{One}",
        "\\section*{One}",
        "\\section * {One}",
        "\\section[Short]{A long {\\em title} of {it {all}}}",
        "\\section\n[Short]\n{Long}",
        "\\subsection {One}",
        "\\subsubsection{One}",
        "\\paragraph{One}",
        "\\subparagraph{One}",
        "\\begin{abstract}",
        "\\abstract{One}",
        "\\newsec{One}",
        "\\beginsection One\\par",
        "\\head 1. One\\endhead",
    ],
)
@pytest.mark.parametrize(
    "end",
    [
        "\\appendix\n",
        "\\begin{appendices}\n",
        "\\bibliography{refs}\n",
        "\\bibliography {refs}\n",
        "\\begin{thebibliography}{9}\n",
        "\\begin{references}\n",
        "\\begin{REFERENCES}\n",
        "\\printbibliography\n",
        "\\printbibliography[heading=none]\n",
        "\\end{document}\n",
    ],
)
def test_the_body_is_between_the_first_heading_and_the_back_matter(heading: str, end: str) -> None:
    assert (
        body_of(f"{PREAMBLE}Title\n{heading}\n{PROSE}\n{end}More.") == f"{heading}\n{PROSE}".strip()
    )


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("a % b\nc", "a \nc"),
        ("a\n  % b\nc", "a\nc"),
        ("5\\% of b", "5\\% of b"),
        ("a \\\\% b\nc", "a \\\\\nc"),  # a line break, then a comment
        ("\\url{http://h.invalid/a%20b} % c\n", "\\url{http://h.invalid/a%20b} \n"),
        ("\\href{http://h.invalid/%7e}{x} % c", "\\href{http://h.invalid/%7e}{x} "),
        ("\\verb|%a| % b", "\\verb|%a| "),
        ("\\verb*+%a+ % b", "\\verb*+%a+ "),
        ("\\lstinline[x]!%a! % b", "\\lstinline[x]!%a! "),
        *(
            (
                f"\\begin{{{name}}}\n% a\n\\end{{{name}}}% b",
                f"\\begin{{{name}}}\n% a\n\\end{{{name}}}",
            )
            for name in ("verbatim", "verbatim*", "Verbatim", "lstlisting", "minted")
        ),
        ("a\\begin{comment}\nb\n\\end{comment}c", "ac"),
        ("a\\iffalse b \\fi c", "a c"),
        ("a\\iffalse b\\else c % d\n\\fi e", "a c \n e"),
        ("a\\iffalse b \\ifx c \\else d \\fi e \\fi f", "a f"),
        ("a\\iffalse b \\iff \\ifthenelse{c}{d}{e} \\fi f", "a f"),
        ("a\\iffalse b\\else \\ifx c \\else d \\fi e\\fi f", "a \\ifx c \\else d \\fi e f"),
        ("a \\iffalse b % c\nd", "a \\iffalse b \nd"),  # never ends
        ("\\lstinline{a % b} c % d", "\\lstinline{a % b} c "),
        ("\\lstinline[x]{if {%a}} % b", "\\lstinline[x]{if {%a}} "),
        (
            "\\mintinline{c}{a % b} \\mintinline[x]{c}|%| % d",
            "\\mintinline{c}{a % b} \\mintinline[x]{c}|%| ",
        ),
        ("\\url{a/{b}%20} \\path|a%b| % c", "\\url{a/{b}%20} \\path|a%b| "),
        ("\\path (0,0) -- (1,1); % c (", "\\path (0,0) -- (1,1); "),
        ("\\verbatiminput{a} % b | |", "\\verbatiminput{a} "),
    ],
)
def test_comments_are_removed_and_literal_text_is_kept(text: str, without: str) -> None:
    assert strip_comments(text) == without


@pytest.mark.parametrize(
    "line",
    [
        "% \\bibliography{old}",
        "Text. %\\appendix moved to the end",
        "\\verb|\\appendix| ends a paper.",
        "\\begin{verbatim}\n\\appendix\n\\end{document}\n\\end{verbatim}",
        "\\begin{comment}\n\\appendix\n\\end{comment}",
        "A line\\\\appendix is no command.",
        "\\appendixname is another command.",
        "\\bibliographystyle{plain}",
    ],
)
def test_what_only_looks_like_back_matter_ends_nothing(line: str) -> None:
    text = f"{PREAMBLE}\\section{{One}}\n{line}\n\\section{{Two}}\n{PROSE}\\bibliography{{b}}"
    assert body_of(text).endswith(f"\\section{{Two}}\n{PROSE}".strip())


@pytest.mark.parametrize(
    "line",
    [
        "% \\section{Old plan}",
        "\\newcommand{\\plan}{\\section{Plan}}",
        "\\titleformat{\\section}{\\large}{}{0pt}{}",
        "\\renewcommand{\\abstract}{\\appendix}",
        "\\begin{comment}\n\\section{Old}\n\\end{comment}",
    ],
)
def test_a_heading_in_the_preamble_is_none(line: str) -> None:
    text = f"\\documentclass{{a}}\n{line}\n\\begin{{document}}\nTitle\n\\section{{One}}\n{PROSE}"
    assert body_of(text) == f"\\section{{One}}\n{PROSE}".strip()


def test_macros_without_arguments_are_replaced() -> None:
    text = (
        "\\documentclass{a}\n\\newcommand{\\be}{\\begin{equation}}\n\\def\\ee{\\end{equation}}\n"
        "\\newcommand\\R{\\mathbb{R}}\n\\newcommand*{\\Rn}{\\R^n}\n\\newcommand{\\two}[1]{#1#1}\n"
        "\\def\\sect{\\section}\n% \\def\\Rn{X}\n\\def\\loop{\\loop\\loop}\n\\def\\section{none}\n"
        "\\begin{document}\n\\sect{One}\n\\be x \\in \\Rn, \\Rnn \\two{a} \\ee \\verb|\\R| \\loop\n"
    )
    assert body_of(text) == (
        "\\section{One}\n\\begin{equation} x \\in \\mathbb{R}^n, \\Rnn \\two{a} \\end{equation} "
        "\\verb|\\R| \\loop\\loop"
    )


def test_macros_cannot_blow_up_a_text() -> None:
    names = [chr(97 + i) * 3 for i in range(20)]
    definitions = "".join(
        f"\\def\\{name}{{\\{before}\\{before}}}\n"
        for before, name in zip(names, names[1:], strict=False)
    )
    body = body_of(f"\\documentclass{{x}}\n{definitions}\\section{{One}}\n" + "\\ttt " * 100)
    assert len(body) < 100 * 200 + 100


@pytest.mark.parametrize(
    "text",
    [
        f"{PROSE}\nBegin with \\documentclass{{article}} and go on.\n{PROSE}",
        f"{PROSE}\nBegin with\n\\documentclass{{article}}\nand go on.\n{PROSE}",
        f"{PROSE}\nA part begins with\n\\section{{Name}}\nand ends where the next begins.\n",
        f"\\section is a command. {PROSE}",
        f"{PROSE}\n\n```latex\n\\documentclass{{a}}\n\\begin{{document}}\n\\section{{A}}\n"
        f"\\section{{B}}\n\\end{{document}}\n```\n\n{PROSE}",
        f"About 5% of it and $x$. {PROSE}",
    ],
)
def test_prose_that_mentions_commands_stays_prose(text: str) -> None:
    assert body_of(text) == text


@pytest.mark.parametrize(
    "head",
    [
        "\\documentstyle[12pt]{article}\n\\begin{document}\n",
        "% a comment\n\n\\documentclass[a4paper,\n twocolumn]{article}\n",
        "\\input harvmac\n\\Title{Rivers}\n",
        "\\input{macros}\n",
        "\\magnification=1200\n\\def\\x{y}\n",
        "\\font\\big=cmr10\n",
        "\\usepackage{x}\n",
        "",
    ],
)
def test_every_kind_of_tex_is_recognised(head: str) -> None:
    assert (
        body_of(f"{head}% c\n\\section{{One}}\n{PROSE}% c\n")
        == f"\\section{{One}}\n{PROSE}".strip()
    )


def test_a_document_after_other_text_is_recognised_by_its_end() -> None:
    text = f"Received in May.\n{PREAMBLE}\\section{{One}}\n{PROSE}% c\n\\end{{document}}\n"
    assert body_of(text) == f"\\section{{One}}\n{PROSE}".strip()


@pytest.mark.parametrize(
    "text",
    [
        f"{PREAMBLE}\\input{{one}}\n\\input{{two}}\n\\end{{document}}",
        f"\\magnification=1200\n{PROSE}\n\\bye",
        f"{PREAMBLE}% \\section{{Old}}\n{PROSE}",
    ],
)
def test_tex_without_a_heading_has_no_body(text: str) -> None:
    assert body_of(text) == ""
