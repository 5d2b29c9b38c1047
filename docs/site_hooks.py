"""What mkdocs needs to make a site of the pages as they stand in the repository.

README.md becomes the first page, and files of the repository that pages link to (../stages/...) come along below repository/.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)")
_CODE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    repository, docs = Path(config.docs_dir).parent, Path(config.docs_dir).name
    files.append(File.generated(config, "index.md", content=(repository / "README.md").read_text(encoding="utf-8")))
    linked = {link for file in files.documentation_pages() for link in _outside(file.src_uri, file.content_string, docs)}
    for path in sorted(linked):
        if (repository / path).is_file():  # what is not there stays a broken link, of which mkdocs warns
            files.append(File.generated(config, f"repository/{path}", abs_src_path=str(repository / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source, docs = page.file.src_uri, Path(config.docs_dir).name

    def moved(match: re.Match[str]) -> str:
        path = _in_repository(source, match[1], docs)
        inside = posixpath.relpath(path, docs) if path.startswith(f"{docs}/") else f"repository/{path}"
        return "](" + posixpath.relpath(inside, posixpath.dirname(source) or ".")

    parts = _CODE.split(markdown)
    return "".join(part if part.startswith("```") else _LINK.sub(moved, part) for part in parts)


def _outside(source: str, text: str, docs: str) -> list[str]:
    """Paths from the top of the repository, of what a page links to beside the pages."""
    linked = [_in_repository(source, link, docs) for link in _LINK.findall(_CODE.sub("", text))]
    return [path for path in linked if not path.startswith(f"{docs}/")]


def _in_repository(source: str, link: str, docs: str) -> str:
    """index.md is README.md, pages below repository/ lie where they say, all other pages lie below docs/."""
    if source == "index.md":
        place = "README.md"
    elif source.startswith("repository/"):
        place = source.removeprefix("repository/")
    else:
        place = posixpath.join(docs, source)
    return posixpath.normpath(posixpath.join(posixpath.dirname(place), link))
