"""Links between README, docs and files of the repository lead somewhere, anchors included. Nothing is fetched."""

import re

import pytest
from pages import PAGES, ROOT

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
FENCED = re.compile(r"^(```+).*?^\1\s*$", re.DOTALL | re.MULTILINE)
# Whom pages may point to; another is an address to be looked at before it is added.
KNOWN_HOSTS = {"arxiv.org", "github.com", "keepachangelog.com", "semver.org"}


def text_of(path) -> str:
    """A page without its fenced code."""
    return FENCED.sub("", path.read_text(encoding="utf-8"))


def anchors(text: str) -> set[str]:
    """Those that GitHub and mkdocs both give to headings."""
    plain = (re.sub(r"[^\w\- ]", "", heading.replace("`", "")).strip().lower() for heading in HEADING.findall(text))
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    for link in LINK.findall(text_of(page)):
        if re.match(r"\w+:", link):
            scheme, _, rest = link.partition("://")
            assert scheme == "https", f"{page.name}: {link}"
            assert rest.partition("/")[0] in KNOWN_HOSTS, f"{page.name}: {link}"
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.is_relative_to(ROOT), f"{page.name}: {link} leads out of the repository"
        assert path.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(text_of(path)), f"{page.name}: {link}: no such heading"


def test_links_are_found():
    links = [link for page in PAGES for link in LINK.findall(text_of(page))]
    assert len([link for link in links if "#" in link]) > 5
    assert len(links) > 60
