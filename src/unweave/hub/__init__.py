"""Everybody's SAEs: found, read with the meaning they were trained with, written for other libraries, and shared."""

from unweave.hub.conversion import Conversion, convert
from unweave.hub.info import SAEInfo, sae_info
from unweave.hub.pretrained import from_pretrained
from unweave.hub.published import PublishedSAE, Release, ReleaseTable, releases
from unweave.hub.push import pull, push, push_to_hub
from unweave.hub.reader import Format, describe_sae, formats, read_sae, write_sae

__all__ = [
    "Conversion",
    "Format",
    "PublishedSAE",
    "Release",
    "ReleaseTable",
    "SAEInfo",
    "convert",
    "describe_sae",
    "formats",
    "from_pretrained",
    "pull",
    "push",
    "push_to_hub",
    "read_sae",
    "releases",
    "sae_info",
    "write_sae",
]
