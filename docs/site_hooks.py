"""Pages of the site that lie outside docs/, where GitHub looks for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# What a page of docs/ calls them, and what the site does. The README's place is taken by the first page.
LINKS = {f"../{name}": page for name, page in {**PAGES, "README.md": "index.md"}.items()}


def on_files(files: Files, config: Any) -> Files:
    for name, page in PAGES.items():
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    for name, page in LINKS.items():
        markdown = markdown.replace(name, page)
    return markdown
