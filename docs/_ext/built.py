"""What is wrong with built pages: links and anchors that lead nowhere, and whatever would need a network."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "link": "href"}
STATED = {
    "canonical",
    "author",
    "index",
    "search",
    "next",
    "prev",
    "copyright",
}  # <link rel=...> that load nothing


class Page(HTMLParser):
    """The anchors of a page, the addresses it links to, and those that it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and given.get(LOADED[tag]) and given.get("rel") not in STATED:
            self.loads.append(given[LOADED[tag]])


def problems(folder: Path) -> Iterator[str]:
    """Say of every page under a folder what is wrong with it; addresses of other sites are not visited."""

    @cache
    def parsed(path: Path) -> Page:
        return Page(path.read_text(encoding="utf-8"))

    for path in sorted(folder.rglob("*.html")):
        page, name = parsed(path), path.relative_to(folder)
        for address in page.loads:
            if urlsplit(address).netloc:
                yield f"{name} loads {address}: the site must work without network"
        for address in [*page.loads, *page.links]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                yield f"{name} leads to {address}, which does not exist"
            elif target.suffix == ".html" and unquote(parts.fragment) not in {"", *parsed(target).anchors}:
                yield f"{name} leads to {address}, which has no such anchor"
