"""Is this the model, tokenizer and hook that an SAE was trained on? What its metadata know is compared, and said.

An SAE fits any activations of its width, so nothing else would tell that they are of another place or model.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from unweave._errors import UnweaveError
from unweave.models.hooks import Hook
from unweave.models.load import LoadedModel, fingerprint, name_of
from unweave.models.names import resolve_hooks

_PROCESSING = ("center_writing_weights", "fold_value_biases")
"""What TransformerLens may do to a model's weights when it loads it, and which changes activations."""


def differences(
    metadata: Mapping[str, Any],
    model: LoadedModel | nn.Module | Mapping[str, Any],
    reads: Sequence[Hook | str],
    *,
    warn_of_hook: bool = True,
    stacklevel: int = 3,
) -> list[str]:
    """Notes on what is not as in training; each is a warning as well.

    Args:
        metadata: Of the SAE.
        model: What it is attached to. Of a bare module the tokenizer is not known; of activations that are cached it is
            what their own metadata say (`model_name`, `tokenizer_fingerprint`).
        reads: Where it reads.
        warn_of_hook: Whether another hook is a warning, too; not where a report says it anyway.
        stacklevel: Whose line the warnings name, as for `warnings.warn`; 3: that of who called the caller.

    Raises:
        UnweaveError: If the model is the same by its name, and the tokenizer is another one.
    """
    place = _place(model)
    other_model = _other_model(metadata, place)
    found = (other_model, _other_tokenizer(metadata, place, other_model), _processed(metadata, place))
    notes, other_hook = [note for note in found if note is not None], _other_hook(metadata, place, reads)
    for note in notes if other_hook is None or not warn_of_hook else [*notes, other_hook]:
        warnings.warn(f"{note}.", stacklevel=stacklevel)
    return notes if other_hook is None else [*notes, other_hook]


class _Place(NamedTuple):
    """What is known of a model: its name (if it has one, and not only a class), its tokenizer's fingerprint."""

    name: str | None
    tokenizer: str | None
    module: nn.Module | None


def _place(model: LoadedModel | nn.Module | Mapping[str, Any]) -> _Place:
    if isinstance(model, Mapping):
        return _Place(model.get("model_name"), model.get("tokenizer_fingerprint"), module=None)
    if not isinstance(model, LoadedModel):
        model = LoadedModel(model, None, name_of(model))
    name = None if model.name == type(model.module).__name__ else without_path(model.name)
    return _Place(name, None if model.tokenizer is None else fingerprint(model.tokenizer), model.module)


def trained_at(metadata: Mapping[str, Any]) -> str | None:
    """The name of the one hook that an SAE's metadata say it belongs to, with its head; None if they say none."""
    known, head = metadata.get("hf_hook_name") or metadata.get("hook_name"), metadata.get("hook_head_index")
    return known if known is None or head is None or "#" in known else f"{known}#{head}"


def without_path(name: str) -> str:
    """The last part of a path that exists; the folders that it lies in are nobody else's business."""
    return Path(name).name if Path(name).exists() else name


def _other_model(metadata: Mapping[str, Any], place: _Place) -> str | None:
    theirs = metadata.get("model_name")
    if theirs is None or place.name is None or _bare(theirs) == _bare(place.name):
        return None
    return f"the SAE was trained on the model {without_path(theirs)!r} and is used on {place.name!r}"


def _other_tokenizer(metadata: Mapping[str, Any], place: _Place, other_model: str | None) -> str | None:
    theirs = metadata.get("tokenizer_fingerprint")
    if theirs is None or place.tokenizer is None or theirs == place.tokenizer:
        return None
    of = "the model" if place.name is None else repr(place.name)
    what = f"the tokenizer of {of} has another vocabulary than the one that the SAE was trained with"
    if other_model is None and place.name is not None and metadata.get("model_name") is not None:
        raise UnweaveError(f"{what}, so its tokens are not those of the model: leave tokenizer= out.")
    return what


def _other_hook(metadata: Mapping[str, Any], place: _Place, reads: Sequence[Hook | str]) -> str | None:
    one, own = trained_at(metadata), [str(hook) for hook in reads]
    names = theirs = list(metadata.get("hf_hook_names") or ([] if one is None else [one]))
    is_path = metadata.get("hf_hook_name") is not None or names != [one]
    if names == own:
        return None
    if place.module is not None:
        try:
            theirs = [str(hook) for name in names for hook in resolve_hooks(place.module, [name])]
        except UnweaveError:  # a path that the model has not, or another library's name for one that is unknown to us
            theirs = names if is_path else []
    elif not is_path:
        theirs = []
    if not theirs or theirs == own:
        return None
    trained, used = (", ".join(hooks) for hooks in (theirs, own))
    return f"the SAE was trained on activations at {trained!r} and reads those at {used!r}"


def _processed(metadata: Mapping[str, Any], place: _Place) -> str | None:
    options = metadata.get("model_from_pretrained_kwargs") or {}
    done = [name for name in _PROCESSING if options.get(name)]
    if not done or not type(place.module).__module__.startswith("transformers."):  # others may have processed theirs
        return None
    return f"the SAE was trained on a model whose weights were processed ({', '.join(done)}), and this one's were not"


def _bare(name: str) -> str:
    """`openai-community/gpt2`, `gpt2` and TransformerLens' `gpt2-small` are one model."""
    return name.rstrip("/").rpartition("/")[2].lower().removesuffix("-small")
