"""The drawn pictures of docs/method.md are those that its script draws, and all are well-formed."""

import importlib.util
import xml.etree.ElementTree as ElementTree

import pytest
from pages import DOCS

spec = importlib.util.spec_from_file_location("method_figures", DOCS / "method_figures.py")
method_figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(method_figures)


@pytest.mark.parametrize("name", ["slots", "passes"])
def test_a_drawing_is_the_present_one(name: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(method_figures, "DOCS", tmp_path)
    getattr(method_figures, name)()
    drawn, committed = ((folder / f"method_{name}.svg").read_text(encoding="utf-8") for folder in (tmp_path, DOCS))
    assert drawn == committed, "run `python docs/method_figures.py`"


def test_pictures_have_titles_and_need_nothing_else():
    pictures = list(DOCS.glob("*.svg"))
    assert len(pictures) == 3
    for path in pictures:
        root = ElementTree.parse(path).getroot()
        assert root.find("{http://www.w3.org/2000/svg}title").text
        assert not [element for element in root.iter() if any("href" in key for key in element.attrib)]
