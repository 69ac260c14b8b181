"""Text of HTML pages and of manual pages in roff, as blocks or paragraphs, without code and navigation."""

import re
from html.parser import HTMLParser
from typing import NamedTuple

from fat5.errors import DataError


class Block(NamedTuple):
    """A paragraph, heading, item or cell: tag, id and class of its element, and its text."""

    tag: str
    identity: str
    kind: str
    text: str


class _Blocks(HTMLParser):
    """Cuts a page into blocks of text. Code and navigation are left out."""

    BREAKS = re.compile(r"p|h[1-6]|li|d[tdl]|t[dhr]|table|[uo]l|div|title|body|section|blockquote")
    LEFT_OUT = re.compile(r"pre|script|style|nav|header|footer|aside|noscript|button")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.blocks: list[Block] = []
        self._head, self._text, self._left_out = ("", "", ""), "", 0
        self._spans: list[int | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if self.LEFT_OUT.fullmatch(tag):
            self._left_out += 1
        elif self.BREAKS.fullmatch(tag):
            self.flush((tag, given.get("id", ""), given.get("class", "")))
        elif tag == "br":
            self._text += " "
        elif tag == "span":
            # Of the wordings for each system or module, hidden until a script picks one, the last stays: the default.
            if given.get("hidden") == "true" and self._spans and self._spans[-1] is not None:
                self._text = self._text[: self._spans[-1]]
                self._spans.append(None)
            else:
                self._spans.append(len(self._text) if given.get("class") == "switchinline" else None)

    def handle_endtag(self, tag: str) -> None:
        if self.LEFT_OUT.fullmatch(tag):
            self._left_out = max(0, self._left_out - 1)
        elif self.BREAKS.fullmatch(tag):
            self.flush(("", "", ""))
        elif tag == "span" and self._spans:
            self._spans.pop()

    def handle_data(self, data: str) -> None:
        if not self._left_out:
            self._text += data

    def flush(self, head: tuple[str, str, str]) -> None:
        if text := re.sub(r"[ \t\r\n]+", " ", self._text).strip(" "):
            self.blocks.append(Block(*self._head, text))
        self._head, self._text = head, ""
        self._spans = [None] * len(self._spans)


def read_blocks(html: bytes) -> list[Block]:
    """The blocks of an HTML page, in its order; white space is collapsed, no-break spaces stay.

    Raises:
        DataError: a declaration that is no HTML.
    """
    parser = _Blocks()
    try:
        parser.feed(html.decode(errors="replace"))
        parser.close()
    except AssertionError as error:  # of the standard library's parser
        raise DataError(f"no HTML ({error})") from error
    parser.flush(("", "", ""))
    return parser.blocks


# Of a listing, a table, a macro of the page's own: first and last line.
LISTINGS = {".nf": ".fi", ".EX": ".EE", ".TS": ".TE", ".de": ".."}

SIGNS = {"aq": "'", "dq": '"', "em": "—", "en": "–", "bu": "•", "ha": "^", "ti": "~", "lq": "“", "rq": "”"}


def read_roff(page: str) -> list[str]:
    """Paragraphs of a manual page in the man macros, headings included; listings and tables are left out."""
    paragraphs, listing = [""], False
    for line in page.splitlines():
        macro, _, rest = line.partition(" ")
        if macro in LISTINGS or macro in LISTINGS.values():
            listing = macro in LISTINGS
        elif listing or line.startswith(('.\\"', "'\\\"")):
            continue
        elif macro in (".SH", ".SS", ".PP", ".P", ".LP", ".TP", ".IP", ".HP", ".sp"):
            paragraphs.append(rest.strip('"') if macro in (".SH", ".SS") else "")
            if macro in (".SH", ".SS"):
                paragraphs.append("")
        elif re.fullmatch(r"\.[BIR]{1,2}|\.S[MB]", macro):
            words = [quoted or plain for quoted, plain in re.findall(r'"([^"]*)"|(\S+)', rest)]
            paragraphs[-1] += " " + ("" if re.fullmatch(r"\.[BIR]{2}", macro) else " ").join(words)
        elif not line.startswith((".", "'")):
            paragraphs[-1] += " " + line
    return [text for paragraph in paragraphs if (text := " ".join(_unescape(paragraph).split()))]


def _unescape(roff: str) -> str:
    text = re.sub(r"\\f(\(..|\[[^]]*\]|.)|\\s[+-]?\d|\\[&|^/,c%:]", "", roff)
    text = re.sub(r"\\\((..)|\\\[(\w+)\]|\\\*\(..", lambda sign: SIGNS.get(sign[1] or sign[2] or "", ""), text)
    return re.sub(r"\\(.)", lambda sign: {"e": "\\", "~": " ", "0": " "}.get(sign[1], sign[1]), text)
