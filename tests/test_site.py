"""The site builds without a warning and needs nothing from elsewhere; links and images of the pages lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from documents import PAGES, ROOT, around_blocks, blocks

DOCS = ROOT / "docs"
PROGRAM = shutil.which("zensical", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
LINK = re.compile(r"!?\[(?:[^\]\[]|\[[^\]]*\])*\]\(([^)\s]+)\)")


def without_code(page: str) -> str:
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("[", "").replace("]", ""), around_blocks(page))


def anchors(page: str) -> set[str]:
    """Those of its headings that are the same in the repository's view and on the site."""
    found = set()
    for _, title in HEADING.findall(without_code(page)):
        words = re.sub(r"[`*]", "", title).lower()
        in_repository = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        on_site = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", words).strip())
        if in_repository == on_site:
            found.add(on_site)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images_of_a_page_lead_somewhere_in_the_repository_and_on_the_site(page: str) -> None:
    for target in LINK.findall(without_code(page)):
        to = urlsplit(target)
        if to.scheme:
            continue
        file = (ROOT / page).parent / unquote(to.path) if to.path else ROOT / page
        assert file.is_file(), target
        # The site has nothing but docs/.
        assert page == "README.md" or file.resolve().is_relative_to(DOCS), f"{target} leads out of docs/"
        if to.fragment:
            assert to.fragment in anchors(str(file.resolve().relative_to(ROOT))), target


def named(entries: list[Any]) -> Iterator[str]:
    """The pages of the navigation."""
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            if isinstance(value, str):
                yield value
            else:
                yield from named(value)


def test_the_navigation_has_every_page_once_and_no_other() -> None:
    config = tomllib.loads((DOCS / "zensical.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(f"docs/{name}" for name in named(config["nav"])) == sorted(
        page for page in PAGES if page != "README.md"
    )


def test_a_page_begins_with_its_title_and_has_one() -> None:
    for page in PAGES:
        levels = [len(level) for level, _ in HEADING.findall(without_code(page))]
        assert (levels[0], levels.count(1)) == (1, 1), page


class Loads(HTMLParser):
    """What a page has a browser load, and where its links to pages of the site lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.linked: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.loaded += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]
        if tag == "link":
            self.loaded.append(given.get("href", ""))
        elif tag == "a":
            self.linked.append(given.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if PROGRAM is None:
        pytest.skip("zensical is not installed: pip install 'pglimits[docs]'")
    # A copy, as several of these tests may run at once.
    docs = tmp_path_factory.mktemp("site") / "docs"
    shutil.copytree(DOCS, docs, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    command = [PROGRAM, "build", "--strict", "-f", str(docs / "zensical.toml")]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, cwd=docs.parent)
    said = built.stdout + built.stderr
    assert (built.returncode, "No issues found" in said, "arning" in said) == (0, True, False), said
    return docs / ".site"


def test_the_site_has_every_page_and_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in PAGES:
        if page != "README.md":
            assert (site / page.removeprefix("docs/")).with_suffix(".html").is_file(), page
    for file in site.rglob("*.html"):
        for target in Loads(file.read_text(encoding="utf-8")).loaded:
            to = urlsplit(target)
            assert to.scheme in ("", "data"), f"{file.name} loads {target}"
            assert to.netloc == "", f"{file.name} loads {target}"
            if to.path and not to.scheme:
                base = site if to.path.startswith("/") else file.parent
                assert (base / unquote(to.path).lstrip("/")).exists(), f"{file.name} loads {target}"
    for file in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", file.read_text(encoding="utf-8")), file


def test_links_of_the_site_lead_to_pages_and_headings_that_are_there(site: Path) -> None:
    texts = {file: file.read_text(encoding="utf-8") for file in site.rglob("*.html") if file.name != "404.html"}
    known = {file: set(re.findall(r'\bid="([^"]+)"', text)) for file, text in texts.items()}
    for file, text in texts.items():
        for target in Loads(text).linked:
            to = urlsplit(target)
            if to.scheme or not target:
                continue
            there = (file.parent / unquote(to.path)).resolve() if to.path not in ("", ".") else file
            assert there.exists(), f"{file.name}: {target}"
            if to.fragment and there in known:
                assert unquote(to.fragment) in known[there], f"{file.name}: {target}"


def test_nothing_of_the_generator_is_published(site: Path) -> None:
    assert [file for file in site.rglob("*") if file.suffix in (".py", ".toml", ".md")] == []


def test_every_block_that_says_it_is_toml_yaml_or_json_is() -> None:
    import json

    from ruamel.yaml import YAML

    readers = {"toml": tomllib.loads, "json": json.loads, "yaml": YAML(typ="safe", pure=True).load}
    for page in PAGES:
        for block in blocks(page, *readers):
            readers[block.language](block.code)
