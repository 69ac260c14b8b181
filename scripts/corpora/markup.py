"""Paragraphs of pages in HTML, XML, roff and LyX, of catalogues and dictionaries, without code and navigation."""

import re
import struct
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

    BREAKS = re.compile(
        r"p|h[1-6]|li|d[tdl]|t[dhr]|table|[uo]l|div|title|body|section|blockquote"
        r"|(simp|formal)?para|(list)?item|term|entry|row|note|chapter|sect[1-5]"
    )
    LEFT_OUT = re.compile(
        r"pre|script|style|nav|header|footer|aside|noscript|button|screen|programlisting|info|comment"
    )

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
        parser.feed(_decode(html))
        parser.close()
    except AssertionError as error:  # of the standard library's parser
        raise DataError(f"no HTML ({error})") from error
    parser.flush(("", "", ""))
    return parser.blocks


def _decode(html: bytes) -> str:
    """UTF-8, or else what the page declares; what cannot be decoded becomes U+FFFD."""
    declared = re.search(rb"charset=[\"']?(iso-8859-1|iso-8859-15|windows-1252|koi8-r)\b", html[:2048], re.IGNORECASE)
    try:
        return html.decode()
    except UnicodeDecodeError:
        return html.decode(declared[1].decode() if declared else "utf-8", errors="replace")


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


def read_xml(page: bytes) -> list[str]:
    """Paragraphs of a DocBook or Mallard page, by the tags they share with HTML and their own."""
    # A title of HTML holds no markup, and is read to its end as it stands; one of these pages may.
    return [block.text for block in read_blocks(re.sub(rb"<(/?)title\b", rb"<\1h2", page))]


# Of LyX: layouts that are not text, and insets whose content is not part of the sentence around them.
LYX_LISTINGS = {"LyX-Code", "Verbatim", "Verbatim*", "Author", "Date"}
LYX_WORDS = {"LyX": "LyX", "TeX": "TeX", "LaTeX": "LaTeX", "LaTeX2e": "LaTeX2e", "ldots": "…", "nobreakdash": "-"}
LYX_WORDS |= {"menuseparator": " > ", "endofsentence": ".", "slash": "/", "breakableslash": "/"}
LYX_ASIDE = ("Quotes", "Newline", "space", "Index", "CommandInset label", "Note", "Foot")
LYX_QUOTES = {"qld": "“", "qrd": "”", "eld": "“", "erd": "”", "gld": "„", "grd": "“", "cld": "« ", "crd": " »"}


def read_lyx(document: str) -> list[str]:
    """Paragraphs of a LyX document that hold only words: those with formulas, references or code are left out."""
    paragraphs, text, whole, insets = [], "", True, list[str]()
    _, _, body = document.partition("\\begin_body")
    for line in body.splitlines():
        command, _, rest = line.partition(" ")
        if command == "\\begin_inset":
            if not insets:
                whole = whole and rest.startswith(LYX_ASIDE)
                text += LYX_QUOTES.get(rest.removeprefix("Quotes "), " " * rest.startswith(("Newline", "space")))
            insets.append(rest)
        elif command == "\\end_inset":
            insets = insets[:-1]
        elif insets:
            continue
        elif command == "\\begin_layout":
            text, whole = "", rest not in LYX_LISTINGS
        elif command == "\\end_layout":
            if whole and (words := " ".join(text.split())):
                paragraphs.append(words)
        elif command == "\\backslash":
            whole = False
        elif "\\SpecialChar " in line:  # on a line of its own, or at the end of one
            before, _, word = line.partition("\\SpecialChar ")
            text += before + LYX_WORDS.get(word, "")
        elif not line.startswith("\\"):
            text += line
    return paragraphs


def read_catalogue(messages: bytes) -> list[tuple[str, str]]:
    """Original and translation of every message in a compiled gettext catalogue (.mo), in its order.

    Raises:
        DataError: not a catalogue, or not in UTF-8.
    """
    try:
        order = {0x950412DE: "<", 0xDE120495: ">"}[struct.unpack_from("<I", messages)[0]]
        _, number, *starts = struct.unpack_from(f"{order}4I", messages, 4)
        columns = []
        for start in starts:
            places = struct.iter_unpack(f"{order}2I", messages[start : start + 8 * number])
            columns.append([messages[at : at + length].decode() for length, at in places])
        return [pair for pair in zip(*columns, strict=True) if pair[0]]
    except (KeyError, struct.error, UnicodeDecodeError, ValueError) as error:
        raise DataError(f"no gettext catalogue ({error})") from error


def read_stardict(index: bytes, entries: bytes) -> list[tuple[str, str]]:
    """First headword and markup of every entry of a StarDict dictionary, in the order of its file.

    Raises:
        DataError: an index that does not fit the entries.
    """
    found: dict[tuple[int, int], str] = {}
    for word, at, length in re.findall(rb"([^\0]+)\0(.{4})(.{4})", index, re.DOTALL):
        found.setdefault((int.from_bytes(at, "big"), int.from_bytes(length, "big")), word.decode(errors="replace"))
    if any(at + length > len(entries) for at, length in found):
        raise DataError("an index that goes beyond its dictionary")
    return [(word, entries[at : at + length].decode(errors="replace")) for (at, length), word in sorted(found.items())]


def read_descriptions(index: str) -> list[tuple[str, list[str]]]:
    """Package and paragraphs of every description in apt's file of translations; lists and examples are left out."""
    found = []
    for stanza in index.split("\n\n"):
        name = re.search(r"^Package: (.*)", stanza, re.MULTILINE)
        description = re.search(r"^Description-(?!md5)[\w-]+: (.*)\n((?: .*(?:\n|$))*)", stanza, re.MULTILINE)
        if name and description:
            lines = [line.removeprefix(" ") for line in description[2].splitlines()]
            # A line that is indented further belongs to a list or an example, with the lines under it.
            parts = "\n".join("" if line == "." else line for line in lines).split("\n\n")
            prose = [" ".join(part.split()) for part in parts if not re.search(r"^\s|^[-*•–] |<trans>", part, re.M)]
            found.append((name[1], [description[1], *prose]))
    return found
