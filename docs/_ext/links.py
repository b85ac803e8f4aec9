"""What the text of a page has: blocks of code, and relative links, turned into links of the site; no Sphinx.

A page links to other pages and to files of the repository by relative paths. Where the site has a page of the
file, the link goes there; else it becomes `source:path`, which `pages` makes a listing of. A page that
includes a file outside this folder is that file's page. A picture with a dark one beside it becomes both.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
LINK = re.compile(r"\[([^]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
IMAGE = re.compile(r"!\[([^]]*)\]\((?!\w+:)([^)\s]+)\)")
DARK = re.compile(r"<picture>|</picture>|<source [^>]*>\s*")  # GitHub's way to a second image
INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.M)
BLOCK = re.compile(  # its kind, and its code
    r"^```(python|python gpu|sh|\{code-cell\} python)\n(?::tags: [^\n]+\n\n)?(.*?)^```", re.M | re.S
)
FENCE = re.compile(r"^(?P<mark>`{3,}|~{3,}).*?^(?P=mark)", re.M | re.S)


def homes() -> dict[Path, Path]:
    """Return the files outside this folder that a page includes, with that page."""
    pages = [page for page in DOCS.rglob("*.md") if "_build" not in page.parts]
    found = {
        (page.parent / name).resolve(): page for page in pages for name in INCLUDE.findall(page.read_text())
    }
    return {**found, DOCS / "README.md": DOCS / "index.md"}  # GitHub's index of the folder, and the site's


def cells(text: str) -> list[str]:
    """Return the code of a page's cells, which its notebook has."""
    return [code for kind, code in BLOCK.findall(text) if kind == "{code-cell} python"]


def prose(text: str) -> list[tuple[bool, str]]:
    """Cut text at its code blocks; True marks what is none."""
    pieces, start = [], 0
    for fence in FENCE.finditer(text):
        pieces += [(True, text[start : fence.start()]), (False, fence[0])]
        start = fence.end()
    return [*pieces, (True, text[start:])]


def rebased(text: str, origin: Path, page: Path, homes: dict[Path, Path]) -> str:
    """Return text with the relative links that the file `origin` has, as `page` has to write them.

    Raises FileNotFoundError for a link that leads nowhere.
    """

    def link(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(origin.parent / match[2]))
        anchor = match[3] or ""
        target = homes.get(target, target)
        if not target.exists():
            raise FileNotFoundError(f"{origin} links to {match[2]}, which does not exist")
        inside = target.suffix == ".md" and target.is_relative_to(DOCS)
        to = os.path.relpath(target, page.parent) if inside else f"source:{target.relative_to(ROOT)}"
        return f"[{match[1]}]({to}{anchor})"

    def image(match: re.Match[str]) -> str:
        light = origin.parent / match[2]
        dark = light.with_stem(f"{light.stem}-dark")
        shown, other = (f"![{match[1]}]({os.path.relpath(path, page.parent)})" for path in (light, dark))
        return f"{shown}{{.only-light}}{other}{{.only-dark}}" if dark.is_file() else shown

    def one(piece: str) -> str:
        piece = DARK.sub("", piece)  # the theme has a switch of its own, by hand too
        images = [image(match) for match in IMAGE.finditer(piece)]
        texts = [LINK.sub(link, rest) for rest in IMAGE.split(piece)[:: IMAGE.groups + 1]]
        return "".join(part for pair in zip(texts, [*images, ""], strict=True) for part in pair)

    return "".join(one(piece) if is_prose else piece for is_prose, piece in prose(text))


def whole(page: Path) -> str:
    """Return a page with its links as the site wants them, and the files that it includes."""
    known = homes()

    def include(match: re.Match[str]) -> str:
        origin = (page.parent / match[1]).resolve()
        return rebased(origin.read_text(), origin, page, known)

    return INCLUDE.sub(include, rebased(page.read_text(), page, page, known))
