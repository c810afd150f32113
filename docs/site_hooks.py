"""What mkdocs does here beyond its own: the site is made of the files as they lie in the repository.

README.md, CONTRIBUTING.md and CHANGELOG.md at the root are pages of the site. Links that lead out of docs/, which work
on GitHub, lead to a copy of the file in the site.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# Pages of the site by their sources at the root.
AT_THE_ROOT = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# In the navigation once they are there.
OPTIONAL = ("results.md", "contributing.md", "changelog.md")
COPIES = "repository"

_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FENCED = re.compile(r"^(```+).*?^\1\s*$", re.DOTALL | re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leaves the optional pages that are not there out of the navigation."""
    config.nav = _present(config.nav)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie at the root, and copies of what pages link to outside of docs/."""
    for page, source in AT_THE_ROOT.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for file in list(files.documentation_pages()):
        for path in sorted(_linked_outside(file.content_string, _directory(file.src_uri))):
            if files.get_file_from_path(f"{COPIES}/{path}") is None:
                files.append(File.generated(config, f"{COPIES}/{path}", abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between files of the site."""

    def in_site(match: re.Match) -> str:
        path = _in_repository(match[2], _directory(page.file.src_uri))
        pages = {source: name for name, source in AT_THE_ROOT.items()}
        if path in pages:
            target = pages[path]
        elif path.startswith("docs/"):
            target = path.removeprefix("docs/")
        else:
            target = f"{COPIES}/{path}"
        return f"{match[1]}{posixpath.relpath(target, posixpath.dirname(page.file.src_uri) or '.')}{match[3]}"

    return _outside_fences(markdown, lambda text: _LINK.sub(in_site, text))


def _present(nav: list) -> list:
    kept = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            kept.append({title: _present(target)})
        elif target not in OPTIONAL or (ROOT / AT_THE_ROOT.get(target, f"docs/{target}")).is_file():
            kept.append(entry)
    return kept


def _directory(page: str) -> str:
    """Where the source of a page of the site lies in the repository."""
    return posixpath.dirname(AT_THE_ROOT.get(page, f"docs/{page}"))


def _in_repository(link: str, directory: str) -> str:
    return posixpath.normpath(posixpath.join(directory, link))


def _linked_outside(markdown: str, directory: str) -> set[str]:
    """The files that a page links to which are no part of docs/ and no page."""
    found = set()

    def note(text: str) -> str:
        found.update(_in_repository(match[2], directory) for match in _LINK.finditer(text))
        return text

    _outside_fences(markdown, note)
    outside = {path for path in found if not path.startswith("docs/") and path not in AT_THE_ROOT.values()}
    for path in outside:
        if not (ROOT / path).is_file():
            raise PluginError(f"a page links to {path}, which the repository does not have")
    return outside


def _outside_fences(markdown: str, change) -> str:
    """Applies `change` to what is not in a fenced block."""
    parts, end = [], 0
    for match in _FENCED.finditer(markdown):
        parts += [change(markdown[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, change(markdown[end:])])
