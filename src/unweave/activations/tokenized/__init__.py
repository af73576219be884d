"""Tokens that lie ready: text tokenised once, packed into rows, and mapped into memory whenever they are needed."""

from unweave.activations.tokenized.folder import TokenFolder, open_token_folder
from unweave.activations.tokenized.writer import TokenWriter

__all__ = ["TokenFolder", "TokenWriter", "open_token_folder"]
