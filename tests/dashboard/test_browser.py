"""The page in headless Chromium, from file://, as a reader uses it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from unweave.dashboard import dashboard, page
from unweave.models import LoadedModel
from unweave.sae import SAE

pytestmark = pytest.mark.browser

Browse = Callable[..., str]


@pytest.fixture
def features(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> Path:
    return dashboard(sae, model=model, data=texts, path=tmp_path / "features.html", tokens=5000, n_features=20)


@pytest.fixture
def driven(monkeypatch: pytest.MonkeyPatch, features: Path) -> Path:
    """The same page with the driver at the end of its script, which the page's policy then allows by its hash."""
    driver = Path(__file__).with_name("driver.js").read_text(encoding="utf-8")
    original = page._asset
    monkeypatch.setattr(page, "_asset", lambda name: original(name) + (driver if name == "page.js" else ""))
    found = re.search(r'id="data">(.*?)</script>', features.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    path = features.with_name("driven.html")
    path.write_text(page.render(json.loads(found[1]), title="driven"), encoding="utf-8")
    return path


def seen_in(dom: str) -> dict[str, Any]:
    found = re.search(r'data-seen="(.*?)"', dom)
    assert found, "the driver did not finish"
    return json.loads(html.unescape(found[1]))


def latents_of(path: Path) -> list[dict[str, Any]]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])["latents"]


def test_the_page_draws_itself(browse: Browse, features: Path) -> None:
    wanted = latents_of(features)[4]["index"]
    dom = browse(f"{features.as_uri()}#latent={wanted}")
    assert f"<h2>Latent {wanted}</h2>" in dom
    assert dom.count("<mark") >= 5
    assert "<title>tiny · transformer.h.0 · unweave</title>" in dom
    body = dom.partition("<body>")[2].partition('<script type="application/json"')[0]
    assert dom.count("<rect") > 5
    assert dom.count('class="effects') == 2
    assert len(re.findall(r'class="item"', body)) == 20


def test_pitfall_340_hostile_tokens_are_text(browse: Browse, features: Path) -> None:
    """Every latent whose contexts hold markup is opened; none of it becomes an element or runs."""
    text = features.read_text(encoding="utf-8")
    assert "\\u003cimg src=x onerror=alert(1)>" in text
    assert "\\u003c/script>\\u003cscript>alert(2)\\u003c/script>" in text
    latents = [latent["index"] for latent in latents_of(features)]
    seen = ""
    for latent in latents[:3]:
        dom = browse(f"{features.as_uri()}#latent={latent}")
        seen += dom.partition("<main")[2].partition("</main>")[0]
        assert dom.count("<script") == 2
    assert "<img" not in seen
    assert "&lt;img" in seen
    assert "&lt;/script&gt;" in seen
    assert "\\u2028" in seen
    assert "\\u202e" in seen


@pytest.mark.parametrize(("size", "dark"), [("1280,900", False), ("420,900", False), ("1280,900", True)])
def test_a_reader_at_work(browse: Browse, driven: Path, size: str, dark: bool) -> None:
    scheme = [] if not dark else ["--blink-settings=preferredColorScheme=0"]
    seen = seen_in(browse(driven.as_uri(), *scheme, size=size))
    latents = latents_of(driven)
    order = [latent["index"] for latent in latents]
    assert seen["all"] == order
    assert seen["start"] == [f"Latent {order[0]}", ""]
    assert seen["next"] == [f"Latent {order[1]}", f"#latent={order[1]}", str(order[1])]
    assert seen["first"] == seen["typingIsNoCommand"] == f"Latent {order[0]}"
    assert seen["searching"] == "search"
    assert seen["nothing"] == [0, "0 of 20 latents"]
    assert order[3] in seen["byIndex"]
    assert seen["cleared"] == [20, "latent"]
    assert seen["byDensity"] == [latent["index"] for latent in sorted(latents, key=lambda x: -x["density"])]
    assert seen["clicked"] == [f"Latent {seen['byDensity'][2]}", f"#latent={seen['byDensity'][2]}"]
    assert seen["followed"] == f"Latent {order[1]}"
    assert seen["tip"][0] is False
    assert re.search(r'^".*"  -?[\d.,]+$', seen["tip"][1])
    assert all(columns == 1 for columns in seen["aligned"])
    assert max(seen["shaded"]) == 1
    assert min(seen["shaded"]) > 0
    assert seen["overflow"] <= 0
    assert seen["nameless"] == seen["repeatedIds"] == seen["foreign"] == 0
    assert seen["dark"] is dark
    assert (seen["background"] == "rgb(20, 21, 23)") is dark


def test_an_empty_page(browse: Browse, tmp_path: Path) -> None:
    data = {"header": {"subject": "m", "facts": [], "more": []}, "strings": [], "latents": []}
    path = tmp_path / "empty.html"
    path.write_text(page.render(data, title="empty"), encoding="utf-8")
    assert "No latent fired on these tokens." in browse(path.as_uri())
