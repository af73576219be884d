"""One self-contained HTML file: data, style and script in their places in a template.

The page asks no server for anything and evaluates no strings. Its content-security policy allows exactly the inline
style and script whose hashes it names, so nothing that a token spells can run, even if it got into the markup. It
cannot get there either: all data is JSON in a data block that it cannot end, and the script only makes text nodes of
it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from unweave._errors import UnweaveError

_SIGNED = b"unweave</title>"
"""What the title of each page ends with."""


def check_replaceable(path: Path) -> None:
    """Refuse a file that is there already and is no page of ours.

    Raises:
        UnweaveError: It is another file, or a folder.
    """
    if path.is_dir():
        raise UnweaveError(f"the output {str(path)!r} is a folder; name a file.")
    if path.is_file() and _SIGNED not in path.read_bytes():
        raise UnweaveError(f"the file {str(path)!r} is there already and is no page of features: name another one.")


def render(data: dict[str, Any], *, title: str) -> str:
    """The page's text.

    Args:
        data: What `page.js` reads: `header`, `strings` and `latents`.
        title: Title of the document.
    """
    return _render("page", data, title)


def render_images(data: dict[str, Any], *, title: str) -> str:
    """The text of the page of a vision model's SAE.

    Args:
        data: What `images.js` reads: `header`, `classes`, `images` and `latents`.
        title: Title of the document.
    """
    return _render("images", data, title)


def _render(page: str, data: dict[str, Any], title: str) -> str:
    style, script = _asset(f"{page}.css"), _asset(f"{page}.js")
    return Template(_asset(f"{page}.html")).substitute(
        title=html.escape(title),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        data=embed_json(data),
    )


def embed_json(value: Any) -> str:
    """JSON that is inert inside a `<script>` element: ASCII without `<`, lone surrogates and U+2028 escaped."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _asset(name: str) -> str:
    return files("unweave.dashboard").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source expression of a content-security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
