"""Is this the model, tokenizer and hook that an SAE was trained on? What its metadata know is compared, and said.

An SAE fits any activations of its width, so nothing else would tell that they are of another place or model.
"""

from __future__ import annotations

import warnings

from unweave._errors import UnweaveError
from unweave.evaluation.sample import places_of
from unweave.models import Hook, LoadedModel
from unweave.models.load import fingerprint
from unweave.sae import SAE

_PROCESSING = ("center_writing_weights", "fold_value_biases")
"""What TransformerLens may do to a model's weights when it loads it, and which changes activations."""


def differences(sae: SAE, model: LoadedModel, reads: list[Hook]) -> list[str]:
    """Notes on what is not as in training; each is a warning as well, but for a hook, which somebody has named.

    Args:
        sae: The SAE.
        model: What it is evaluated on.
        reads: Where.

    Raises:
        UnweaveError: If the model is the same by its name, and the tokenizer is another one.
    """
    other_model = _other_model(sae, model)
    notes = [n for n in (other_model, _other_tokenizer(sae, model, other_model), _processed(sae)) if n is not None]
    for note in notes:
        warnings.warn(f"{note}.", stacklevel=3)
    other_hook = _other_hook(sae, model, reads)
    return notes if other_hook is None else [*notes, other_hook]


def _other_model(sae: SAE, model: LoadedModel) -> str | None:
    theirs = sae.metadata.get("model_name")
    if theirs is None or not _has_name(model) or _bare(theirs) == _bare(model.name):
        return None
    return f"the SAE was trained on the model {theirs!r} and evaluated on {model.name!r}"


def _other_tokenizer(sae: SAE, model: LoadedModel, other_model: str | None) -> str | None:
    theirs = sae.metadata.get("tokenizer_fingerprint")
    if theirs is None or model.tokenizer is None or theirs == fingerprint(model.tokenizer):
        return None
    what = f"the tokenizer of {model.name!r} has another vocabulary than the one that the SAE was trained with"
    if other_model is None and _has_name(model) and sae.metadata.get("model_name") is not None:
        raise UnweaveError(f"{what}, so its tokens are not those of the model: leave tokenizer= out.")
    return what


def _other_hook(sae: SAE, model: LoadedModel, reads: list[Hook]) -> str | None:
    try:
        theirs, _ = places_of(sae, model, None, None)
    except UnweaveError:  # it says no hook, or one that this model does not have
        return None
    if list(map(str, theirs)) == list(map(str, reads)):
        return None
    trained, used = (", ".join(map(str, hooks)) for hooks in (theirs, reads))
    return f"the SAE was trained on activations at {trained!r} and reads those at {used!r}"


def _processed(sae: SAE) -> str | None:
    options = sae.metadata.get("model_from_pretrained_kwargs") or {}
    if not (done := [name for name in _PROCESSING if options.get(name)]):
        return None
    return f"the SAE was trained on a model whose weights were processed ({', '.join(done)}), and this one's were not"


def _has_name(model: LoadedModel) -> bool:
    """Whether the model has a name, and not only a class."""
    return model.name != type(model.module).__name__


def _bare(name: str) -> str:
    """`openai-community/gpt2`, `gpt2` and TransformerLens' `gpt2-small` are one model."""
    return name.rstrip("/").rpartition("/")[2].lower().removesuffix("-small")
