"""Books of tales as plain text -> a list of tales: headings found, wrapped lines joined, the editor's apparatus dropped.

    tales = read_tales(Path("blue-fairy-book.txt"))

Each tale is its paragraphs joined by a blank line; a verse keeps one line each. Titles are left out, so that a tale starts
with its first sentence. Dialogue is between double quotes in every book, whatever the printer used.
"""
import re
from pathlib import Path
from typing import NamedTuple

SHORTEST = 600  # characters; what is shorter between two headings is a dedication, a list or a note
VERSE_WIDTH = 52  # prose is wrapped at 60 columns or more; a block of three lines below this is verse

# A heading that opens one of these closes the tale before it, and what follows it is not kept.
APPARATUS = re.compile(r"(contents|preface|dedication|notes?( and references)?|introduction|to |footnotes?|transcriber|"
                       r"preparer|by |edited|illustrat|list of|full.page|the fairy book series|index|end of|the end|"
                       r"how to get into|say this|you know how|new york|london|the brothers grimm)", re.I)
# A heading inside a tale: dropped, and the tale goes on.
PART = re.compile(r"(chapter\b.*|part\b.*|[ivxlc]+\.?( .*)?|\d+\.?( .*)?|(first|second|third|fourth|fifth|sixth|seventh) "
                  r"(story|voyage|part)\b.*|\W*)", re.I)
# A paragraph that is the editor's and not the tale's: a footnote, a source, a heading that was set as text.
NOTE = re.compile(r"\(\d+\) .*|\[.*\]?|\(.{0,120}\)|\*+ ?[A-Z(].*|footnotes?:?.*|"
                  r"(translated|adapted|taken|abridged) (from|by).*|"
                  r"(from )?the? ?['\"].{0,60}['\"]\.?|from (the )?['\"(A-Z].{0,70}|.{0,40}märchen.{0,40}|"
                  r"contes? .{0,60}|.{0,60}\b(asbj|grimm\.|d'aulnoy\.|perrault\.).{0,20}|the end\.?|end of the .*|finis\.?|chapter .*|"
                  r".{0,80} \d{1,3}|[IVX]+\. .{0,60}|(first|second|third|fourth|fifth|sixth|seventh) story\..*", re.I)
# A short paragraph at either end of a tale that says where it was taken from.
SOURCE = re.compile(r"deulin|denlin|saga\b|ralston|grimm\b|asbj|perrault|d'aulnoy|contes?\b|m[aä]h?rchen|schmidt|cabinet|tradition|"
                    r"arabian nights|s[eé]billot|cosquin|kletke|andersen|carroll|translat|adapted|story\.$|\bfrom (the|a) |"
                    r"caylus|princesse|f[eé]nelon|folk tale|highland|chapbook|la belle|marelles|hainaut|hibernian|cuentos|"
                    r"biblioth|nonchalante|oiseau|swift|simpleton", re.I)
BACK_MATTER = re.compile(r"(notes and references|notes|footnotes|transcriber.*|\*+|the brothers grimm)$", re.I)
MARKS = re.compile(r"\s?\[(\d+|\*|[a-z])\]|\(\d+\)|\[footnote[^\]]*\]|\[illustration[^\]]*\]|(?<=[\w.,!?'\"]) ?\*(?!\w)|_", re.I)
ELIDED = re.compile(r"'(tis|twas|twere|twill|twould|em|un|til|cause|ere|ll|d|m|re|ve|s|t|mid|neath|gainst)\b(?!')", re.I)


class Block(NamedTuple):
    blank: int          # empty lines before it
    lines: list[str]    # as printed, right side stripped


def _blocks(text: str) -> list[Block]:
    """The runs of lines that are not empty."""
    blocks, blank, lines = [], 2, []
    for line in [*text.splitlines(), ""]:
        line = line.rstrip()
        if line:
            lines.append(line)
            continue
        if lines:
            blocks.append(Block(blank, lines))
            blank, lines = 0, []
        blank += 1
    return blocks


def _is_heading(block: Block) -> bool:
    """Whether a block stands apart, is short, and is set as a title: in capitals or with its long words capitalised."""
    line = " ".join(part.strip(" _*") for part in block.lines)
    letters = re.sub(r"[^A-Za-z]", "", line)
    if len(block.lines) > 2 or len(line) > 90 or not letters:
        return False
    if letters.isupper():
        return block.blank >= 2 or (len(letters) > 8 and not line.endswith(("!", "?", "!'", '."', "!\"")) and block.blank > 1)
    if block.blank < 2 or line.startswith(("'", '"', "(")) or re.search(r"[,;:!?'\"]$", line):
        return False
    long_words = [w for w in re.findall(r"[A-Za-z][A-Za-z'-]*", re.sub(r"\[.*?\]", "", line)) if len(w) >= 5]
    return all(w[0].isupper() for w in long_words) and bool(long_words or PART.fullmatch(line))


def double_quotes(paragraph: str) -> str:
    """A paragraph printed with 'single' quotes, its dialogue between double ones and quotes within quotes single.

    A mark opens before a letter that nothing precedes, and closes after punctuation; between two letters, in 'tis and
    after a plural it is an apostrophe. One between a letter and a blank closes when a quote is open and the next mark opens.
    """
    marks = []
    for m in re.finditer("'", paragraph):
        i = m.start()
        before, after = paragraph[i - 1:i], paragraph[i + 1:i + 2]
        if before.isalnum() and after.isalnum() or (ELIDED.match(paragraph, i) and not before.isalnum()):
            continue
        if not before or before in " (\n-\"[" and after and after not in " \n.,;:!?)":
            marks.append((i, "open"))
        elif before in ".,!?;:-\")]":
            marks.append((i, "close"))
        elif not after.isalnum():
            marks.append((i, "either"))
    chars, depth = list(paragraph.replace('"', "\0")), 0
    for (i, kind), following in zip(marks, [*(k for _, k in marks[1:]), "open"], strict=False):
        plural = paragraph[i - 1] == "s" and paragraph[i + 1:i + 2] == " "
        if kind == "either" and (not depth or following != "open" and plural):
            continue
        chars[i] = '"'
        depth = 1 if kind == "open" else 0
    return "".join(chars).replace("\0", "'")


def _paragraph(block: Block, single_quoted: bool) -> str:
    """The text of a block: wrapped lines joined, a verse one line each, marks and italics gone; empty for a note."""
    lines = [" ".join(line.split()) for line in block.lines]
    indented = sum(line.startswith("  ") for line in block.lines)
    verse = len(lines) > 1 and (indented == len(lines) or len(lines) > 2 and max(map(len, lines)) < VERSE_WIDTH)
    text = ("\n" if verse else " ").join(lines)
    text = re.sub(r"[ \t]+", " ", MARKS.sub("", text)).strip()
    if NOTE.fullmatch(text.replace("\n", " ")) or not re.search(r"[a-z]", text) or "gutenberg" in text.lower():
        return ""
    text = re.sub(r" ?- ?-+ ?|--+", "--", text)
    text = re.sub(r"(?<=\w)- (?=[a-z])", "-", text)
    return double_quotes(text) if single_quoted else text


def _opening(text: str) -> str:
    """The tale with a first sentence printed in capitals written as a sentence: 'ONCE upon' -> 'Once upon'."""
    words = text.split(" ", 8)
    for i, word in enumerate(words[:-1]):
        if not word.isupper() and word not in ("a", "A", "I"):
            break
        words[i] = word if word == "I" else word.capitalize() if i == 0 else word.lower()
    return " ".join(words)


def _without_source(paragraphs: list[str]) -> list[str]:
    """The paragraphs of a tale without the editor's word on its origin, before or after it."""
    def tells(text):
        return not (len(text) < 100 and SOURCE.search(text)) or "\n" in text or re.match("Once|There|Long|In ", text)

    kept = list(paragraphs)
    while kept and not tells(kept[0]):
        kept.pop(0)
    while kept and not tells(kept[-1]):
        kept.pop()
    return kept


def read_tales(path: Path) -> list[str]:
    """The tales of one book, in order."""
    text = path.read_text(encoding="utf-8").replace("‘", "'").replace("’", "'").replace("“", '"').replace("”", '"')
    single_quoted = len(re.findall(r"(?m)(?:^|[\s(-])'\w", text)) > len(re.findall(r"(?m)(?:^|[\s(-])\"\w", text))
    tales, paragraphs, keep = [], [], False
    for block in [*_blocks(text), Block(2, ["THE END"])]:
        line = " ".join(" ".join(block.lines).split()).strip(" _*")
        if not _is_heading(block):
            if keep and (paragraph := _paragraph(block, single_quoted)):
                paragraphs.append(paragraph)
            continue
        if PART.fullmatch(line) and not APPARATUS.match(line):
            keep = True
            continue
        tale = "\n\n".join(_without_source(paragraphs))
        if len(tale) >= SHORTEST:
            tales.append(_opening(tale))
        if tales and BACK_MATTER.match(line):
            break
        paragraphs, keep = [], not APPARATUS.match(line)
    return tales
