"""Which tokenizer made some token ids, and whether another one may read them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave._errors import UnweaveError
from unweave._hub import asked_once
from unweave.models.load import fingerprint, hash_of, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAELENS_FILE = "sae_lens.json"
FINGERPRINT_KEY = "unweave_tokenizer_fingerprint"
"""What we add to SAELens' metadata."""


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str | None = None) -> dict[str, Any]:
    """What is recorded of a tokenizer: its name, the hash of its vocabulary, and one more than its largest id."""
    vocabulary = tokenizer.get_vocab()
    size = 1 + max(vocabulary.values(), default=-1)
    return {
        "name": name or str(tokenizer.name_or_path), "fingerprint": hash_of(vocabulary), "vocab_size": size,
    }  # fmt: skip


def check_vocabulary(where: str, made_with: dict[str, Any] | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose vocabulary is another than the one recorded.

    Args:
        where: What holds the token ids.
        made_with: What `describe_tokenizer` said. The "fingerprint" may be missing, as in SAELens' files: then the
            names are compared, and where they differ, the tokenizer of that name is loaded. None: nothing is recorded.
        tokenizer: The tokenizer of the model that is to read them.

    Raises:
        UnweaveError: They differ.
    """
    ours = str(tokenizer.name_or_path)
    theirs = made_with.get("fingerprint") if made_with else None
    if made_with is None or (theirs is None and made_with["name"] == ours):
        return
    if theirs is None:
        try:
            theirs = fingerprint(load_tokenizer(made_with["name"]))
        except UnweaveError:
            warnings.warn(
                f"the token ids of {where} were made by the tokenizer {made_with['name']!r}, which is not there to be "
                f"compared with {ours!r}.",
                stacklevel=2,
            )
            return
    if theirs != fingerprint(tokenizer):
        raise UnweaveError(
            f"the token ids of {where} were made by the tokenizer {made_with['name']!r}, and that of the model, "
            f"{ours!r}, has another vocabulary: tokenise the text with the model's tokenizer."
        )


def tokenizer_of_folder(folder: Path) -> dict[str, Any] | None:
    """What the `sae_lens.json` of a folder of pretokenised text says of its tokenizer; None if there is none.

    Raises:
        UnweaveError: It is damaged.
    """
    path = next((path for path in (folder / SAELENS_FILE, folder.parent / SAELENS_FILE) if path.is_file()), None)
    return None if path is None else _made_with(path)


def tokenizer_of_hub(name: str) -> dict[str, Any] | None:
    """The same for a dataset of the Hugging Face hub."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        with asked_once():
            return _made_with(Path(hf_hub_download(name, SAELENS_FILE, repo_type="dataset")))
    except (OSError, HfHubHTTPError, HFValidationError):  # LocalEntryNotFoundError is an OSError
        return None


def _made_with(path: Path) -> dict[str, Any] | None:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
        name = metadata.get("tokenizer_name")
    except (ValueError, AttributeError) as error:
        raise UnweaveError(f"{path} is damaged: {error}.") from error
    if name is None:
        return None
    known = metadata.get(FINGERPRINT_KEY)
    return {"name": str(name)} | ({} if known is None else {"fingerprint": known})
