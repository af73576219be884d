"""Pack the directory of published SAEs for shipping: `python scripts/pack_releases.py pretrained_releases.json`.

The source maps each release to its repository, model, format and SAEs. What is written holds the same facts, as compact
JSON in gzip without a date, so that equal facts give equal bytes. The hash that it prints stands in the tests.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

from unweave.hub.published import PACKED, checksum

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("source", type=Path)
directory = json.loads(parser.parse_args().source.read_text(encoding="utf-8"))
text = json.dumps(directory, separators=(",", ":"), ensure_ascii=False)
PACKED.write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
print(f"{PACKED}: {PACKED.stat().st_size:,} bytes, sha256 of the facts {checksum(directory)}")
