"""Models from folders, the Hub and modules, and the sentences about what cannot be loaded."""

from __future__ import annotations

import json
import logging
import logging.handlers
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from unweave._errors import UnweaveError
from unweave.models import capture, checkpoints, fingerprint, load_model, resolve_hooks
from unweave.models.load import LoadedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB = 40


def make_tokenizer(size: int = VOCAB, *, prefix: str = "word") -> PreTrainedTokenizerBase:
    """A tokenizer of whole words: `<s>`, then `word1`, `word2`, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0} | {f"{prefix}{index}": index for index in range(1, size)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<s>")


@pytest.fixture
def folder(gpt2: nn.Module, tmp_path: Path) -> Path:
    """A GPT-2 with its tokenizer."""
    gpt2.save_pretrained(tmp_path / "small model")
    make_tokenizer().save_pretrained(tmp_path / "small model")
    return tmp_path / "small model"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No Hub, an empty cache, and a working folder of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder(folder: Path, gpt2: nn.Module, ids: torch.Tensor, kind: type) -> None:
    loaded = load_model(kind(folder), device="cpu")
    assert isinstance(loaded, LoadedModel)
    assert type(loaded.module) is type(gpt2)
    assert loaded.name == str(folder)
    assert loaded.device == torch.device("cpu")
    assert not any(child.training for child in loaded.module.modules())
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert torch.equal(loaded.module(input_ids=ids).logits, gpt2(input_ids=ids).logits)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("word3 word7")["input_ids"] == [3, 7]


def test_the_default_device_is_the_fastest(folder: Path) -> None:
    assert load_model(folder).device.type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_dtype_is_as_asked_whatever_is_stored(folder: Path, gpt2: nn.Module) -> None:
    gpt2.bfloat16().save_pretrained(folder)
    assert {p.dtype for p in load_model(folder).module.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(folder, dtype=torch.float16).module.parameters()} == {torch.float16}


def test_demo_is_the_shipped_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(checkpoints.__file__).parent / "demo_lm" == checkpoints.SHIPPED["demo"]
    monkeypatch.setitem(checkpoints.SHIPPED, "demo", folder)
    loaded = load_model("demo")
    assert loaded.name == "demo"
    assert loaded.tokenizer is not None


def test_pytorch_weights_are_read_without_running_code(folder: Path, gpt2: nn.Module, ids: torch.Tensor) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(gpt2.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(load_model(folder, device="cpu").module(input_ids=ids).logits, gpt2(input_ids=ids).logits)

    class Mischief:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (folder / "run",)  # type: ignore[return-value]

    torch.save({**gpt2.state_dict(), "x": Mischief()}, folder / "pytorch_model.bin")
    with pytest.raises(UnweaveError, match="could not be loaded"):
        load_model(folder)
    assert not (folder / "run").exists()


def test_an_encoder_is_loaded_as_its_base_model(tmp_path: Path, ids: torch.Tensor) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    masked = BertForMaskedLM(config).eval()
    masked.save_pretrained(tmp_path)
    for architectures in (["BertForMaskedLM"], None):
        edit_config(tmp_path, architectures=architectures)
        loaded = load_model(tmp_path, device="cpu")
        assert type(loaded.module).__name__ == "BertModel"
        assert loaded.module.pooler is None  # a masked LM has none to load
        assert loaded.tokenizer is None
        assert torch.equal(loaded.module(input_ids=ids).last_hidden_state, masked.bert(input_ids=ids).last_hidden_state)
        [hook] = resolve_hooks(loaded.module, ["resid_post.1"])
        assert str(hook) == "encoder.layer.1"


def test_a_family_of_causal_models_needs_no_architecture_in_its_config(folder: Path) -> None:
    edit_config(folder, architectures=None)
    assert type(load_model(folder).module).__name__ == "GPT2LMHeadModel"
    edit_config(folder, architectures=["GPT2Model"])
    assert type(load_model(folder).module).__name__ == "GPT2Model"


def test_pitfall_250_a_module_is_taken_as_it_is(gpt2: nn.Module) -> None:
    gpt2.train().bfloat16()
    loaded = load_model(gpt2)
    assert loaded.module is gpt2
    assert not gpt2.training
    assert loaded.tokenizer is None
    assert loaded.name == "GPT2LMHeadModel"
    assert {(p.dtype, p.requires_grad, p.device.type) for p in gpt2.parameters()} == {(torch.bfloat16, True, "cpu")}
    assert load_model(nn.Linear(2, 2), device="meta").device == torch.device("meta")
    assert load_model(nn.Identity()).device == torch.device("cpu")


def test_pitfall_208_the_name_says_what_was_loaded(folder: Path) -> None:
    loaded = load_model(folder)
    assert load_model(loaded.name).name == loaded.name
    assert load_model(loaded.module).name == str(folder)


def test_a_tokenizer_of_ones_own(folder: Path, gpt2: nn.Module, tmp_path: Path) -> None:
    ours = make_tokenizer(30)
    assert load_model(folder, ours).tokenizer is ours
    ours.save_pretrained(tmp_path / "tokenizer")
    loaded = load_model(gpt2, tmp_path / "tokenizer")
    assert loaded.tokenizer is not None
    assert fingerprint(loaded.tokenizer) == fingerprint(ours)
    with pytest.raises(UnweaveError, match="no tokenizer was found in"):
        load_model(gpt2, tmp_path)


def test_pitfall_207_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    with pytest.raises(UnweaveError, match=r"tokenizer does not belong to .* it has the id 40, the embedding 40 rows"):
        load_model(folder, make_tokenizer(VOCAB + 1))
    make_tokenizer(VOCAB + 5).save_pretrained(folder)
    with pytest.raises(UnweaveError, match="has the id 44"):
        load_model(folder)


def test_special_tokens_without_a_row(folder: Path) -> None:
    multimodal = make_tokenizer()
    multimodal.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert len(multimodal) == VOCAB + 1
    assert load_model(folder, multimodal).tokenizer is multimodal
    for name, value in (("pad_token", "<pad>"), ("bos_token", "<bos>")):  # these do get into batches
        padding = make_tokenizer()
        padding.add_special_tokens({name: value})
        with pytest.raises(UnweaveError, match="has the id 40"):
            load_model(folder, padding)
    wordy = make_tokenizer()
    wordy.add_tokens(["extra"])
    with pytest.raises(UnweaveError, match="has the id 40"):
        load_model(folder, wordy)


def test_pitfall_207_214_the_fingerprint_is_of_the_vocabulary_and_portable(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(3)
    # Written down once: another machine, process or version has to find the same.
    assert fingerprint(tokenizer) == "125f6ba2efecfdea0b1cf3af4f7c8afbb232455856871e894d9152bb807c8b04"
    tokenizer.save_pretrained(tmp_path)
    reloaded = load_model(nn.Identity(), tmp_path).tokenizer
    assert reloaded is not None
    assert fingerprint(reloaded) == fingerprint(tokenizer)
    others = [make_tokenizer(4), make_tokenizer(3, prefix="wort"), make_tokenizer(3, prefix="wörd")]
    assert len({fingerprint(other) for other in [tokenizer, *others]}) == 4


def test_a_path_that_is_not_there(folder: Path, offline: None) -> None:
    with pytest.raises(UnweaveError, match=r"'.*small modle' does not exist; did you mean '.*small model'"):
        load_model(folder.parent / "small modle")
    with pytest.raises(UnweaveError, match=r"'nowhere/at/all' does not exist\.$"):
        load_model("./nowhere/at/all")
    with pytest.raises(UnweaveError, match="is a file, where the folder of a model is needed"):
        load_model(folder / "config.json")
    with pytest.raises(UnweaveError, match=r"no model in Hugging Face layout: it has no config\.json"):
        load_model(folder.parent)


def test_a_hub_name_that_cannot_be_reached(folder: Path, offline: None) -> None:
    folder.rename(folder.parent / "gpt2-mine")
    with pytest.raises(UnweaveError, match=r"there is no folder 'gpt2-mime', .* Hub.* did you mean 'gpt2-mine'"):
        load_model("gpt2-mime")
    with pytest.raises(UnweaveError, match=r"no folder 'someone/something', .* cannot be reached at .* empty\.$"):
        load_model("someone/something")
    with pytest.raises(UnweaveError, match="no tokenizer was found in 'someone/something'"):
        load_model(nn.Identity(), "someone/something")
    assert load_model("gpt2-mine").name == "gpt2-mine"


def test_a_hub_name_that_is_in_the_cache(folder: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = folder.parent / "hub" / "models--someone--something"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    folder.rename(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder.parent / "hub"))
    loaded = load_model("someone/something")
    assert loaded.name == "someone/something"
    assert loaded.tokenizer is not None


def test_a_broken_checkpoint(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UnweaveError, match=r"small model' could not be loaded: .*incomplete"):
        load_model(folder)
    weights.unlink()
    with pytest.raises(UnweaveError, match=r"could not be loaded: .*no file named model\.safetensors"):
        load_model(folder)
    edit_config(folder, model_type="unheard_of")
    with pytest.raises(UnweaveError, match=r"could not be loaded: .*unheard_of"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UnweaveError, match=r"could not be loaded: .*JSON"):
        load_model(folder)


def test_weights_that_do_not_fit_the_config(folder: Path) -> None:
    edit_config(folder, n_layer=4)
    with pytest.raises(UnweaveError, match=r"lacks 12 of its weights, such as 'transformer\.h\.3\.attn\.c_attn\.bias'"):
        load_model(folder)
    edit_config(folder, n_layer=3, n_positions=64)
    with pytest.raises(UnweaveError, match=r"'transformer\.wpe\.weight' has shape \(32, 16\), .* \(64, 16\)"):
        load_model(folder)


def test_code_that_comes_with_a_checkpoint_is_not_run(folder: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(folder / 'run')!r}, 'w')\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    with pytest.raises(UnweaveError, match="could not be loaded"):
        load_model(folder)
    assert not (folder / "run").exists()


def test_a_device_that_is_not_there(folder: Path) -> None:
    for device in ("cuda:99", "gpu"):
        with pytest.raises(UnweaveError, match=rf"the device '{device}' cannot be used: "):
            load_model(folder, device=device)


def test_loading_is_silent_and_leaves_no_setting_changed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as transformers_logging

    edit_config(folder, architectures=["GPT2Model"], bos_token_id=99)  # both worth a warning to transformers
    transformers_logging.set_verbosity_info()
    listener = logging.handlers.BufferingHandler(capacity=1000)
    transformers_logging.add_handler(listener)
    capfd.readouterr()
    settings = (
        transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(),
        logging.getLogger().level, warnings.filters[:],
    )  # fmt: skip
    try:
        load_model(folder)
        (folder / "model.safetensors").unlink()
        with pytest.raises(UnweaveError):
            load_model(folder)
        assert settings == (
            transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled(),
            logging.getLogger().level, warnings.filters[:],
        )  # fmt: skip
        assert transformers_logging.set_tqdm_hook(None) is None
    finally:
        transformers_logging.set_verbosity_warning()
        transformers_logging.remove_handler(listener)
    assert [record.getMessage() for record in listener.buffer] == []
    assert capfd.readouterr() == ("", "")


def test_a_loaded_model_is_ready_to_be_hooked(folder: Path, ids: torch.Tensor) -> None:
    loaded = load_model(folder, device="cpu")
    hooks = resolve_hooks(loaded.module, ["resid_post.*"])
    assert [tensor.shape for tensor in capture(loaded.module, hooks, input_ids=ids).values()] == [(2, 7, 16)] * 3


def test_importing_models_does_not_import_transformers() -> None:
    script = "import sys, unweave.models; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
