"""The page without a browser: what is in the file, and what is not."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unweave.dashboard.page import embed_json, render

HOSTILE = ["<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", "\u2028", "\u2029", "\ud800", "<!--"]
DATA = {"header": {"subject": "<b>m</b>", "facts": [], "more": []}, "strings": HOSTILE, "latents": []}


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.inside: str | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = (dict(attrs).get("id") or tag) if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:
        self.inside = None

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[self.inside] = self.texts.get(self.inside, "") + data


@pytest.fixture(scope="module")
def page() -> str:
    return render(DATA, title="a & <b>")


def test_pitfall_327_no_address_but_the_name_of_svg(page: str) -> None:
    assert set(re.findall(r"\b(?:https?|wss?|ftp):[^\s\"'`)]*", page)) == {"http://www.w3.org/2000/svg"}
    elements = Elements(page)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in elements.tags}
    assert not {"src", "action"} & {name for _, attributes in elements.tags for name in attributes}
    style, script = elements.texts["style"], elements.texts["script"]
    assert "url(" not in style
    assert "@import" not in style
    for word in ("eval(", "Function(", "fetch(", "XMLHttp", "import(", "innerHTML", "outerHTML", "document.write"):
        assert word not in script


def test_pitfall_340_hostile_tokens_stay_data(page: str) -> None:
    elements = Elements(page)
    assert json.loads(elements.texts["data"]) == DATA
    assert [tag for tag, _ in elements.tags].count("script") == 2
    assert not any(name.startswith("on") for _, attributes in elements.tags for name in attributes)
    assert "<b>" not in page


@given(st.lists(st.text(st.characters(exclude_categories=()))))
@settings(max_examples=50, deadline=None)
def test_pitfall_340_embedded_json_is_inert_and_comes_back(value: list[str]) -> None:
    text = embed_json(value)
    assert text.isascii()
    assert "<" not in text
    assert json.loads(text) == value


def test_the_policy_allows_exactly_what_is_there(page: str) -> None:
    elements = Elements(page)
    (policy,) = [a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    hashes = {
        name: base64.b64encode(hashlib.sha256(elements.texts[name].encode()).digest()).decode()
        for name in ("style", "script")
    }
    assert policy is not None
    assert {part.strip() for part in policy.split(";")} == {
        "default-src 'none'", f"style-src 'sha256-{hashes['style']}'", f"script-src 'sha256-{hashes['script']}'",
        "base-uri 'none'", "form-action 'none'",
    }  # fmt: skip
    assert not any("style" in attributes for _, attributes in elements.tags)


def test_logic_and_style_are_small() -> None:
    assert len(render({"header": {}, "strings": [], "latents": []}, title="")) < 60_000
