"""The README and the pages of docs/: their Python runs and asserts, their links lead somewhere, their commands exist.

Two pages have tests of their own for their code: tests/test_migrating.py, and tests/integrations/test_lightning.py, as lightning is
installed there alone.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fastelbo

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """(lines before it, source) of every fenced block of one of the languages."""
    # All blocks are found, in pairs of fences: the end of one looks like the beginning of another.
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start(2)].count("\n"), m.group(2)) for m in found if m.group(1) in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# ---- code ------------------------------------------------------------------------------------------------------------------------

ELSEWHERE = {"migrating.md", "lightning.md"}
WITH_CODE = [page for page in PAGES if page.name not in ELSEWHERE and blocks(page.read_text(), "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_blocks_run(page: Path) -> None:
    """In order, in one namespace. A page without an assertion would pass whatever its code computes."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    sources = blocks(page.read_text(), "python")
    assert re.search(r"\bassert\b|assert_close", "".join(source for _, source in sources)), f"{name_of(page)} asserts nothing"
    for line, source in sources:
        # Padded, so that a traceback names the page's own line.
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


# ---- links -----------------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them and as mkdocs.yml asks for them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?)\s*$", prose(page), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        # A second heading of the same words is numbered, by each in its own way: nobody should link to it.
        found.add(slug)
    return found


def links(page: Path) -> Iterator[str]:
    inline = re.sub(r"`[^`\n]*`", "", prose(page))
    return (link.split(' "')[0] for link in re.findall(r"\]\(([^)\s]+(?: \"[^\"]*\")?)\)", inline))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        url = urllib.parse.urlsplit(link)
        if url.scheme:
            assert url.scheme == "https", link
            assert re.fullmatch(r"[\w-]+(\.[\w-]+)+", url.netloc), link
            continue
        target = (page.parent / url.path).resolve() if url.path else page
        assert target.exists(), link
        assert ROOT in target.parents, link
        if url.fragment:
            assert url.fragment in anchors(target), link


# ---- what GitHub and the site must both show -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", DOCS, ids=name_of)
def test_reads_the_same_on_github_and_on_the_site(page: Path) -> None:
    text = prose(page)
    assert not re.search(r"^(!!!|\?\?\?|===) ", text, re.MULTILINE), "GitHub shows admonitions and tabs as they are typed"
    # Python-Markdown makes a list only of what follows a blank line, or another item.
    follows = re.findall(r"^(?![-*|#] |\d+\. |\s|\|)(\S.*)\n(?=[-*] |\d+\. )", text, re.MULTILINE)
    assert not follows, f"a blank line is missing before the list after {follows[0]!r}"


def test_every_public_name_is_in_the_api_reference() -> None:
    reference = "".join(page.read_text() for page in DOCS if page.parent.name == "api")
    shown = re.findall(r"^::: fastelbo\.(\w+)$", reference, re.MULTILINE)
    assert sorted(shown) == sorted(fastelbo.__all__)


# ---- commands --------------------------------------------------------------------------------------------------------------------

MAKEFILE = (ROOT / "Makefile").read_text()
PROGRAM = r"(?:make|fastelbo|python -m (?:fastelbo|benchmarks)(?:\.\w+)?)(?= )"


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of this repository that the page names, in a console block or in a line of text."""
    text = page.read_text()
    consoles = "".join(source for _, source in blocks(text, "", "bash", "console", "sh"))
    inline = "\n".join(span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose(page)))
    for line in re.findall(rf"^(?:\$ )?(?:\w+=\S* )*({PROGRAM}.*)$", f"{consoles}\n{inline}", re.MULTILINE):
        yield shlex.split(line, comments=True)


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=name_of)
def test_commands_exist(page: Path) -> None:
    """Each target, subcommand and option."""
    for program, *rest in commands(page):
        if program == "make":
            for word in rest:
                name, is_variable, _ = word.partition("=")
                assert re.search(rf"^{name} *(?:\?=|:)" if is_variable else rf"^{name}:", MAKEFILE, re.MULTILINE), f"make {word}"
            continue
        module = "fastelbo.cli" if program == "fastelbo" or rest[1] == "fastelbo" else rest[1]
        found = importlib.util.find_spec("benchmarks.__main__" if module == "benchmarks" else module)
        assert found is not None, module
        source = Path(str(found.origin)).read_text()
        words = rest if program == "fastelbo" else rest[2:]
        if words and module in ("benchmarks", "fastelbo.cli") and not words[0].startswith("-"):
            assert re.search(rf'add_parser\(\s*"{words[0]}"', source), f"{module} {words[0]}"
        for option in re.findall(r"--[a-z][a-z-]*", " ".join(words)):
            assert f'"{option}"' in source or option == "--help", f"{module} {option}"


# ---- the site --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["index.md#a-heading", "missing.md", "index.md#missing", "../README.md", "/index.md"])
def test_a_broken_link_fails_the_build(link: str, tmp_path: Path) -> None:
    """By the rules of mkdocs.yml, and `make docs`, which is strict."""
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    assert re.search(r"^\t.* -m mkdocs build --strict$", MAKEFILE, re.MULTILINE)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# A heading\n\n[link]({link})\n")
    own = {"docs_dir": str(tmp_path / "docs"), "site_dir": str(tmp_path / "site"), "theme": {"name": "mkdocs"}}
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, nav=["index.md"], plugins=[], hooks=[], **own)
    if link == "index.md#a-heading":
        build(config)
    else:
        with pytest.raises(Abort):
            build(config)
