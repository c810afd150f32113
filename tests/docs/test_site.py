"""The site builds without a warning, from files as they lie in the repository, and needs nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import DOCS, ROOT

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")

# What a browser would fetch: other than links, these must be the site's own.
FETCHED = re.compile(r"<(?:script|img|link|iframe|source)\b[^>]*?(?:src|href)=\"?([^\"\s>]+)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; strict, so that a warning fails."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    # What the theme says of its own future is no warning about our pages.
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return directory


def html_of(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_site(site: Path):
    for path in DOCS.glob("*.md"):
        assert (site / path.stem / "index.html").is_file(), path.name
    assert "latentjax pretrains language models" in html_of(site, ".")


def test_nothing_is_fetched_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 15
    for path in pages:
        for address in FETCHED.findall(path.read_text(encoding="utf-8")):
            assert not re.match(r"(https?:)?//", address), f"{path.relative_to(site)} fetches {address}"


def test_pages_have_what_they_are_for(site: Path):
    assert (site / "search" / "search_index.json").stat().st_size > 100_000
    for picture in ("method_slots.svg", "method_passes.svg", "method_settling.svg"):
        assert f'src="../{picture}"' in html_of(site, "method")
        assert (site / picture).is_file()
    api = html_of(site, "api")
    for name in ("latentjax.opening.load_pretrained", "latentjax.recurrence.base.Recurrence.decode"):
        assert f'id="{name}"' in api


def test_links_out_of_docs_lead_to_copies(site: Path):
    assert 'href="../repository/launch/gke/tpu.yaml"' in html_of(site, "launching")
    copy = site / "repository" / "launch" / "gke" / "tpu.yaml"
    assert copy.read_bytes() == (ROOT / "launch" / "gke" / "tpu.yaml").read_bytes()
    assert 'href="repository/latentjax/config.py"' in html_of(site, ".")
    assert 'href="launching/"' in html_of(site, ".")  # docs/launching.md in the README
