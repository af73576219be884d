"""Load a model: a folder in Hugging Face layout, a name on the Hub, a shipped demo model, or a module as it is.

Weights are read as safetensors or by `torch.load` in its weights-only mode, and code that comes with a checkpoint is
never run. The configuration decides what is loaded, a checkpoint that lacks weights is refused instead of being
completed with random ones, and a tokenizer must fit the embedding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from unweave._errors import UnweaveError, nearest_beside
from unweave.models.checkpoints import SHIPPED, first_line, has_any, not_on_the_hub, source_of, transformers_quiet
from unweave.models.processors import Processor, load_processor, processor_files
from unweave.models.timm_models import PREFIX as TIMM
from unweave.models.timm_models import load_timm
from unweave.models.vision import VisionLayout, vision_layout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A network with the tokenizer or image processor that belongs to it.

    Attributes:
        module: The network, in evaluation mode.
        tokenizer: None if there is none.
        name: What was loaded: the folder or Hub name as given, `"demo"`, or for a module the name it was loaded by,
            else its class.
        processor: What turns an image into its input; None if there is none.
        vision: How it lays out the tokens of an image; None for a model of text.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    processor: Processor | None = None
    vision: VisionLayout | None = None

    @property
    def device(self) -> torch.device:
        """Where the inputs have to be."""
        return next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))


def load_model(
    model: str | Path | nn.Module,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    *,
    processor: Processor | None = None,
    layout: VisionLayout | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoadedModel:
    """Load a causal language model, an encoder or a vision transformer, ready to be hooked.

    A checkpoint whose configuration names a causal language model or an image classifier is loaded as that, one of
    CLIP or SigLIP with both towers as its vision tower, any other as its base model without a head. It comes in
    evaluation mode, its parameters without gradients.

    Args:
        model: `"demo"`, `"demo-vit"`, a folder, a name on the Hugging Face Hub, `"timm:NAME"` (with timm installed), or
            a module. A module is put into evaluation mode and is otherwise left as it is: gradients, dtype and, unless
            `device` is given, device.
        tokenizer: A tokenizer, or where to load it from; by default the model's own, if there is one.
        processor: What turns images into inputs, in place of the checkpoint's own: a processor of transformers, or a
            function from a PIL image to a tensor (channels, height, width).
        layout: How a vision model of no known family lays out its tokens.
        device: By default CUDA if there is any, else the CPU.
        dtype: Of the parameters.

    Raises:
        UnweaveError: The model, its weights, the tokenizer or the device is not there or cannot be used, or the
            tokenizer has tokens that the model's embedding has no row for.
    """
    if isinstance(model, nn.Module):
        module = model.eval()
        name = name_of(module)
        layout = layout or vision_layout(module)
        if device is not None:
            module.to(_usable(device))
    elif isinstance(model, str) and model.startswith(TIMM):
        place, name = _usable(device or _default_device()), model
        module, transform = load_timm(model)
        module = module.eval().to(dtype).requires_grad_(False).to(place)
        layout, processor = layout or vision_layout(module), processor or transform
    else:
        place = _usable(device or _default_device())
        name, source = str(model), source_of(model)
        module = _load_module(source, dtype).requires_grad_(False).to(place)
        layout = layout or vision_layout(module)
        if layout is not None and processor is None and processor_files(source, has_any):
            with transformers_quiet(source):
                processor = load_processor(source)
        if tokenizer is None and layout is None:
            tokenizer = _load_tokenizer(source)
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer is not None:
        _check_fit(tokenizer, module, name)
    return LoadedModel(module, tokenizer, name, processor, layout)


def name_of(module: nn.Module) -> str:
    """What a module was loaded by, else its class."""
    loaded = getattr(getattr(module, "config", None), "_name_or_path", None) or type(module).__name__
    return next((name for name, folder in SHIPPED.items() if loaded == str(folder)), loaded)


def load_tokenizer(tokenizer: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model by itself: of `"demo"`, a folder, or a name on the Hugging Face Hub.

    Raises:
        UnweaveError: There is none.
    """
    if (found := _load_tokenizer(source_of(tokenizer))) is None:
        near = nearest_beside(Path(tokenizer), SHIPPED, folders=True)
        raise UnweaveError(f"no tokenizer was found in {str(tokenizer)!r}{near or '.'}")
    return found


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary, in hexadecimal: the same on every machine, another for every other token or id."""
    return hash_of(tokenizer.get_vocab())


def hash_of(vocabulary: Mapping[str, int]) -> str:
    """The `fingerprint` of a tokenizer with these tokens."""
    by_name = [(token, vocabulary[token]) for token in sorted(vocabulary)]
    return hashlib.sha256(json.dumps(by_name).encode()).hexdigest()


def _load_module(source: str, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig

    if not has_any(source, "config.json"):
        if Path(source).is_dir():
            raise UnweaveError(f"the folder {source!r} is no model in Hugging Face layout: it has no config.json.")
        raise UnweaveError(f"there is no folder {source!r}, and {not_on_the_hub(source)}")
    with transformers_quiet(source):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    kind, config = _kind(config)
    with transformers_quiet(source):
        module, info = kind.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False,
            ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    missing = set(info["missing_keys"])
    if missing and all(key.startswith("pooler.") for key in missing):
        module.pooler = None  # its random weights would be no part of the model, and no activation depends on them
        missing.clear()
    if missing:
        raise UnweaveError(f"the checkpoint {source!r} lacks {len(missing)} of its weights, such as {min(missing)!r}.")
    if info["mismatched_keys"]:
        key, stored, needed = min(info["mismatched_keys"])
        raise UnweaveError(
            f"in the checkpoint {source!r}, {key!r} has shape {tuple(stored)}, but by its config.json {tuple(needed)}."
        )
    return module


def _kind(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """The class that a checkpoint is loaded as, and the part of its configuration that the class takes."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageClassification
    from transformers.models.auto import modeling_auto as auto

    if _is_causal(config):
        return AutoModelForCausalLM, config
    if not set(config.architectures or ()).isdisjoint(auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()):
        return AutoModelForImageClassification, config
    if config.model_type in ("clip", "siglip", "siglip2"):
        return AutoModel, config.vision_config
    return AutoModel, config


def _is_causal(config: PretrainedConfig) -> bool:
    """Whether the checkpoint is a causal LM: by its architecture, or, where it names none, by what its family is."""
    from transformers.models.auto import modeling_auto as auto

    if config.architectures:
        return not set(config.architectures).isdisjoint(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    # Encoders such as BERT can be run as causal LMs too, but that is not what they were trained as.
    family = config.model_type
    return family in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _load_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    from transformers import AutoTokenizer

    if not has_any(source, *_VOCABULARIES):
        return None  # transformers would make up an empty one
    with transformers_quiet(source):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def _check_fit(tokenizer: PreTrainedTokenizerBase, module: nn.Module, name: str) -> None:
    """Every id that text can turn into needs a row of the embedding.

    Special tokens that play no role in text are let through: Gemma 3's text models share the tokenizer of the
    multimodal ones, whose image token they have no row for.
    """
    embedding: Any = getattr(module, "get_input_embeddings", None)
    if embedding is None:
        return
    roles = {getattr(tokenizer, f"{role}_token_id") for role in _ROLES}
    unused = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special} - roles
    largest = max(set(tokenizer.get_vocab().values()) - unused)
    rows = embedding().weight.shape[0]
    if largest >= rows:
        raise UnweaveError(
            f"the tokenizer does not belong to the model {name!r}: it has the id {largest}, the embedding {rows} rows."
        )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UnweaveError(f"the device {str(device)!r} cannot be used: {first_line(error)}.") from error
