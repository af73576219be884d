"""Everything that the README and the docs show runs (pitfall_358).

Each page in an empty folder of its own, from top to bottom: its ```python blocks share one namespace, each line of its
```bash blocks is an `unweave` command that must succeed, and a ```toml block is the file that its first line names.
What cannot run in a test (installing, minutes of demo, what needs the network) stands in ```sh blocks. Where a page
trains on hundreds of thousands of tokens, or leaves it to `dashboard` how many it reads, a tenth of them will do. Pages
about the Hub have one on localhost, which holds what they load (`seed_hub`), and "wiki.txt" stands for a text of the
reader's.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics as python_topics
from typing import Any, NamedTuple
from unittest import mock

import pytest

from unweave.cli import main
from unweave.dashboard import dashboard
from unweave.objectives import PENALTIES
from unweave.sae import ACTIVATIONS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HUB_PAGES = ("pretrained", "sharing")
HUB_SAES = {
    "jbloom/GPT2-Small-SAEs-Reformatted": ["blocks.8.hook_resid_pre"],
    "somebody/saes": ["blocks.1.hook_resid_post"],
}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


LARGE = re.compile(r"(\btokens=\d\d)0_000\b")


class Block(NamedTuple):
    language: str
    first_line: int
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(m[1], text.count("\n", 0, m.start(2)), m[2]) for m in FENCE.finditer(text)]


def run_command(line: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "unweave", f"{line!r} is no unweave command"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = main(arguments)
    assert status == 0, f"{line}\n{printed.getvalue()}"


def seed_hub(hub: Any, folder: Path) -> None:
    """Small stand-ins for what the pages load."""
    from unweave import SAE, TopK

    for repo, ids in HUB_SAES.items():
        files = {}
        for id in ids:
            where = SAE(224, 64, TopK(4), metadata={"hook_name": id, "model_name": "demo"}).save(folder / repo / id)
            files |= {f"{id}/{path.name}": path.read_bytes() for path in where.iterdir()}
        hub.add(repo, files)
        hub.repos["model", repo].tags["v1.0"] = hub.repos["model", repo].branches["main"]


@pytest.fixture
def _own_registers() -> Iterator[None]:
    """What a page adds to the activation functions and penalties is gone when the next test asks which there are."""
    with mock.patch.dict(ACTIVATIONS), mock.patch.dict(PENALTIES):
        yield


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("_own_registers")
@pytest.mark.parametrize("page", [p for p in PAGES if any(b.language in ("python", "bash") for b in blocks(p))],
                         ids=lambda p: p.stem)  # fmt: skip
def test_what_the_page_shows_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """pitfall_20 of what users ask for: tutorials that reproduce."""
    if page.stem in HUB_PAGES:
        seed_hub(request.getfixturevalue("hub"), tmp_path / "published")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(dashboard.__kwdefaults__, "tokens", 20_000)
    Path("wiki.txt").write_text("\n\n".join(python_topics.values())[:300_000], encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            # Padded with empty lines, so that a traceback points into the page.
            source = "\n" * block.first_line + LARGE.sub(r"\1_000", block.code)
            code = compile(source, str(page), "exec", dont_inherit=True)
            exec(code, namespace)
        elif block.language == "toml":
            Path(re.match(r"# ([\w.]+)", block.code)[1]).write_text(block.code, encoding="utf-8")
        elif block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                run_command(line.partition("  #")[0])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_block_says_what_it_is(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= {"python", "bash", "sh", "text", "toml", "json"}
