"""Where a checkpoint is (a shipped model, a folder, or a name on the Hub), and asking transformers about it.

What transformers says about an unusable checkpoint becomes one sentence. Its bars and warnings, and those of others
that it causes, are off meanwhile. These are settings of the whole process, and models are loaded by several threads at
once: the first one that asks turns them off, and the last one to be done puts them back.
"""

from __future__ import annotations

import logging
import pickle
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from threading import Lock

from safetensors import SafetensorError

from unweave._errors import UnweaveError, nearest, nearest_beside
from unweave._hub import asked_once, downloaded, unreachable

DEMO = Path(__file__).parent / "demo_lm"
"""Folder of the model that `load_model("demo")` loads."""
DEMO_VIT = Path(__file__).parent / "demo_vit"
"""Folder of the model that `load_model("demo-vit")` loads."""
SHIPPED = {"demo": DEMO, "demo-vit": DEMO_VIT}

_WELL_KNOWN = (
    "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "EleutherAI/pythia-70m-deduped", "google/gemma-2-2b",
    "google/gemma-3-1b-pt", "meta-llama/Llama-3.1-8B", "openai/clip-vit-base-patch32", "facebook/dinov2-base",
)  # fmt: skip
"""Models that many SAEs belong to, for the hint at what a misspelt name could have meant."""

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

_callers, _settings = 0, ExitStack()
"""How many are within `transformers_quiet`, and what puts the settings back when the last of them leaves."""
_lock = Lock()
"""Of both."""


def source_of(model: str | Path) -> str:
    """The folder or the name on the Hub that `model` stands for, in the form that transformers takes."""
    folder = SHIPPED.get(str(model)) or Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    if isinstance(model, str) and model not in SHIPPED and not folder.exists() and _HUB_NAME.fullmatch(model):
        return model
    if folder.exists():
        raise UnweaveError(f"{str(folder)!r} is a file, where the folder of a model is needed.")
    near = nearest_beside(folder, SHIPPED, folders=True)
    raise UnweaveError(f"the folder {str(folder)!r} does not exist{near or '.'}")


def not_on_the_hub(source: str) -> str:
    """What to say of a name that is no folder, and that neither the Hub nor its cache has a model of."""
    away, cached = unreachable(), downloaded()
    beside = (other.name for other in Path().iterdir() if other.is_dir() and not other.name.startswith("."))
    near = nearest(source, [*SHIPPED, *cached, *beside]) or nearest(source, _WELL_KNOWN, n=1, cutoff=0.7) or "."
    if away is None:
        return f"the Hugging Face Hub has no model of this name that may be read without another token{near}"
    has = f"has {', '.join(map(repr, cached))}" if cached else "is empty"
    return f"the Hugging Face Hub cannot be reached {away}, whose cache {has}{near}"


def has_any(source: str, *files: str) -> bool:
    """Whether a folder, or else the Hub or its cache, has one of `files`; False too where the Hub is out of reach."""
    from transformers.utils.hub import has_file

    with transformers_quiet(source):
        return any(has_file(source, file) for file in files)


def first_line(error: BaseException) -> str:
    """What an error says, without the end of a sentence."""
    return str(error).strip().partition("\n")[0].rstrip(".:")


@contextmanager
def transformers_quiet(source: str) -> Iterator[None]:
    """Transformers without its bars and warnings; what it says about an unusable checkpoint becomes one sentence."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        with _quiet(), nullcontext() if Path(source).is_dir() else asked_once():
            yield
    except UnweaveError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, pickle.UnpicklingError) as error:
        if type(error.__cause__) is RepositoryNotFoundError:  # a gated one's is of a class below
            raise UnweaveError(f"there is no folder {source!r}, and {not_on_the_hub(source)}") from error
        raise UnweaveError(f"{source!r} could not be loaded: {first_line(error)}.") from error


@contextmanager
def _quiet() -> Iterator[None]:
    global _callers
    with _lock:
        if not _callers:
            _turn_off(_settings)
        _callers += 1
    try:
        yield
    finally:
        with _lock:
            _callers -= 1
            if not _callers:
                _settings.close()


def _turn_off(until: ExitStack) -> None:
    """Turn off transformers' bars and all warnings, and note what puts them back."""
    from transformers.utils import logging as transformers_logging

    until.callback(transformers_logging.set_verbosity, transformers_logging.get_verbosity())
    transformers_logging.set_verbosity(logging.CRITICAL)
    bars = transformers_logging.set_tqdm_hook(lambda bar, args, kwargs: bar(*args, **{**kwargs, "disable": True}))
    until.callback(transformers_logging.set_tqdm_hook, bars)
    until.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
