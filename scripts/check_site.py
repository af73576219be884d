"""Look at the built documentation in a browser: no page, and at desk width no code, may be wider than its place.

`make docs`, then `python scripts/check_site.py` (10 s; needs Chromium). All pages are opened in one window, each in a
frame of the width of a laptop and one of a telephone. A page must never scroll sideways; tables and code may, within
their own box, except that code has to fit on a laptop. It ends with status 1 where something does not.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

LAPTOP, TELEPHONE = 1280, 390
SECONDS = 120
_MEASURE = """
for (const page of PAGES) for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  Object.assign(frame.dataset, { page, width });
  frame.src = BASE + page;
  document.body.append(frame);
}
addEventListener("load", () => {  // which waits for the frames
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const root = frame.contentDocument.documentElement;
    const code = [...root.querySelectorAll("pre > code")].filter((box) => box.scrollWidth > box.clientWidth + 1);
    const longest = (box) => box.textContent.split("\\n").reduce((a, b) => (b.length > a.length ? b : a));
    return [frame.dataset.page, Number(frame.dataset.width), root.scrollWidth - root.clientWidth, code.map(longest)];
  });
  document.body.dataset.found = JSON.stringify(found);
});
"""


def measure(site: Path) -> list[tuple[str, int, int, list[str]]]:
    """Of each page and width: pixels that the page is too wide by, and the longest line of each code box that is."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        sys.exit("check_site needs Chromium.")
    pages = sorted(str(path.relative_to(site)) for path in site.rglob("*.html"))
    if not pages:
        sys.exit(f"there are no pages in {site}: run `make docs` first.")
    values = {"PAGES": pages, "WIDTHS": [LAPTOP, TELEPHONE], "BASE": f"{site.resolve().as_uri()}/"}
    script = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items()) + _MEASURE
    with tempfile.TemporaryDirectory() as folder:
        frames = Path(folder) / "frames.html"
        frames.write_text(f"<!doctype html><body><script>{script}</script>", encoding="utf-8")
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--allow-file-access-from-files", f"--user-data-dir={folder}/profile", "--window-size=1400,1000",
            "--dump-dom", frames.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    found = re.search(r'data-found="(.*?)"', done.stdout)
    if found is None:
        sys.exit(f"the browser did not get through the pages:\n{done.stderr[-2000:]}")
    return [(page, width, over, code) for page, width, over, code in json.loads(html.unescape(found[1]))]


def main() -> int:
    """Print what does not fit."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else "site")
    found, wrong = measure(site), 0
    for page, width, over, code in found:
        lines = code if width == LAPTOP else []
        wrong += bool(over > 0) + len(lines)
        if over > 0:
            print(f"{page} is {over} pixels wider than {width}")
        for line in lines:
            print(f"{page}: too long for {width} pixels: {line}")
    print(f"{len(found) // 2} pages at {LAPTOP} and {TELEPHONE} pixels: {wrong or 'nothing'} does not fit")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
