"""Reading anybody's SAE: which format a folder or file has, and the SAE in it, meant as it was trained.

A format is one small file that says where each weight is, what the activation function is, and what has to be folded.
Folds are exact or refused: an SAE that this package cannot compute as its authors did is never read as something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unweave._errors import UnweaveError, nearest
from unweave.hub.source import Source
from unweave.sae import SAE, Crosscoder, CrossLayerTranscoder, Transcoder
from unweave.sae.activation import describe
from unweave.sae.draft import Draft
from unweave.sae.files import KNOWN_KEYS


@dataclass(frozen=True)
class Format:
    """One layout of files.

    Attributes:
        name: As in `format=` and on the command line.
        files: What its files are called, for errors and the documentation.
        matches: Whether a folder or file has this format; the files' names and configs decide, no weights are read.
        read: The draft of its SAE.
        hints: Names of what a caller may have to say, since the files do not.
        write: Write an SAE to a folder in this format; it refuses what the format cannot express. None: read only.
    """

    name: str
    files: str
    matches: Callable[[Source], bool]
    read: Callable[[Source], Draft]
    hints: tuple[str, ...] = ()
    write: Callable[[SAE, Path], None] | None = None


EVERYWHERE = ("repo", "config_overrides")
"""Hints of every format: where the files are from, of which model, hook and layer are guessed; and keys that replace
those of the files' config."""


def formats() -> dict[str, Format]:
    """Every format, by name, in the order in which they are tried."""
    from unweave.hub.known import FORMATS

    return {made.name: made for made in FORMATS}


def format_named(name: str) -> Format:
    """A format.

    Raises:
        UnweaveError: If there is none of this name.
    """
    known = formats()
    if name not in known:
        hint = nearest(name, known) or f"; there are {', '.join(known)}."
        raise UnweaveError(f"there is no format {name!r}{hint}")
    return known[name]


def detect(source: Source) -> Format:
    """The format of a folder or file.

    Raises:
        UnweaveError: If it has none that is known.
    """
    for made in formats().values():
        if made.matches(source):
            return made
    if source.file is None:
        found = {path.parent for depth in ("*", "*/*") for path in source.folder.glob(f"{depth}/cfg.json")}
        if below := sorted(folder for folder in found if folder.parent not in found):  # no training form of one
            some = ", ".join(repr(str(folder)) for folder in below[:5]) + ", ..." * (len(below) > 5)
            raise UnweaveError(f"{source} is no SAE, but has folders that are; name one: {some}.")
    known = "; ".join(f"{made.name} ({made.files})" for made in formats().values())
    what = "has no file" if source.file is None else "is no file"
    raise UnweaveError(f"{source} {what} of a format that is known, or its config is missing. Known are: {known}.")


@contextmanager
def _understood(source: Source) -> Iterator[None]:
    """What a reader stumbles over in a config, a tensor or a hint that is not of the kind that the format has.

    Raises:
        UnweaveError: In place of Python's errors, which are its cause.
    """
    try:
        yield
    except UnweaveError:
        raise
    except KeyError as error:
        raise UnweaveError(f"{source} lacks the key {error}, which files of its format have.") from error
    except (TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise UnweaveError(f"{source} has a value of the wrong kind in it, or a hint is one: {error}.") from error


def _draft(path: str | Path, format: str | None, hints: dict[str, Any], *, shapes_only: bool) -> tuple[Format, Draft]:
    source = Source(path, {name: value for name, value in hints.items() if value is not None}, shapes_only=shapes_only)
    with _understood(source):
        made = detect(source) if format is None else format_named(format)
    allowed = [*EVERYWHERE, *made.hints]
    for name in source.hints:
        if name not in allowed:
            hint = nearest(name, allowed) or f"; what may be said is {', '.join(allowed)}."
            raise UnweaveError(f"files of the format {made.name} leave nothing open that is called {name!r}{hint}")
    with _understood(source):
        draft = made.read(source)
        overrides = source.overrides
    if not made.name.startswith("saelens") and (strange := sorted(overrides.keys() & KNOWN_KEYS)):
        raise UnweaveError(f"files of the format {made.name} have no {strange[0]!r} that could be overridden.")
    draft.sae.metadata |= {key: value for key, value in overrides.items() if key not in KNOWN_KEYS}
    if made.name != "saelens":  # ours
        draft.sae.metadata["source_format"] = made.name
    return made, draft


def read_sae(
    path: str | Path,
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    **hints: Any,
) -> SAE:
    """Read an SAE, transcoder, crosscoder or cross-layer transcoder that anybody saved.

    Args:
        path: Its folder, or its file where a folder holds several.
        format: Name of the format; None: the files tell.
        dtype: Cast the weights to this; by default they keep the file's. Thresholds are always float32.
        device: Where to put the weights.
        **hints: What some formats' files do not say, such as `k`, `norm_scaling_factor`, `mean` and `scale`; and
            `repo`, the name of the repository that the files are from, which may tell model, hook and layer; and
            `config_overrides`, keys that replace those of the files' config, as the directory of releases has them.

    Raises:
        UnweaveError: If there is no such file, no known format, files are missing, damaged or contradict each other, a
            file is a pickle with code in it, a hint is missing or unknown, or the SAE computes what ours cannot.
    """
    return _draft(path, format, hints, shapes_only=False)[1].build(dtype=dtype, device=device)


def describe_sae(path: str | Path, *, format: str | None = None, **hints: Any) -> dict[str, Any]:
    """What `read_sae` would read, without reading the weights.

    Returns:
        `format`, `kind` (the class), `d_in`, `d_out`, `d_sae`, `dtype`, `activation` (its name as `type`, and its
        fields), `apply_b_dec_to_input` and `metadata`.
    """
    made, draft = _draft(path, format, hints, shapes_only=True)
    sae = draft.sae
    kind = next((c.__name__ for c in (CrossLayerTranscoder, Crosscoder, Transcoder) if isinstance(sae, c)), "SAE")
    return {
        "format": made.name,
        "kind": kind,
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "d_sae": sae.d_sae,
        "dtype": str(draft.dtype).removeprefix("torch."),
        "activation": describe(sae.activation),
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "metadata": sae.metadata,
    }


def writer(name: str) -> Callable[[SAE, Path], None]:
    """What writes a format.

    Raises:
        UnweaveError: If the format is unknown or only read.
    """
    made = format_named(name)
    if made.write is None:
        writable = ", ".join(f.name for f in formats().values() if f.write is not None)
        raise UnweaveError(f"{made.name} is read, not written; written are {writable}.")
    return made.write


def write_sae(sae: SAE, folder: str | Path, format: str) -> Path:
    """Write an SAE in another library's format, and return the folder.

    Raises:
        UnweaveError: If the format is unknown or only read, or cannot express this SAE, with the reason.
    """
    folder = Path(folder)
    writer(format)(sae, folder)
    return folder
