"""From an SAE, a model and text to a file."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from unweave import UnweaveError
from unweave.activations import DataConfig, MaskConfig, TokenBatch, TokenRows
from unweave.dashboard import dashboard
from unweave.evaluation import evaluate
from unweave.models import LoadedModel
from unweave.sae import ACTIVATIONS, SAE, TopK

D, CONFIG = 16, DataConfig(context=32)


def data_of(path: Path) -> dict[str, Any]:
    found = re.search(r'id="data">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def header_of(path: Path) -> dict[str, str]:
    header = data_of(path)["header"]
    return dict(header["facts"] + header["more"])


@pytest.fixture
def rows(texts: list[str], model: LoadedModel) -> TokenBatch:
    return TokenRows(texts, model.tokenizer, CONFIG, held_out=False).next_rows(100_000)


def test_a_page_of_everything(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    path = dashboard(
        sae, model=model, data=texts, path=tmp_path / "deep" / "features.html", tokens=5000, n_features=20,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert path == tmp_path / "deep" / "features.html"
    assert [file.name for file in path.parent.iterdir()] == ["features.html"]
    assert calls == [(64, 157), (128, 157), (157, 157)]
    data = data_of(path)
    assert len(data["latents"]) == 20
    assert data["header"]["subject"] == "tiny · transformer.h.0"
    for latent in data["latents"]:
        assert latent["count"] > 0
        assert len(latent["promoted"]) == len(latent["suppressed"]) == 10
        assert latent["groups"][0]["contexts"]


def test_the_same_seed_gives_the_same_page(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    def page(seed: int) -> bytes:
        path = dashboard(sae, model=model, data=texts, path=tmp_path / "f.html", tokens=2000, n_features=5, seed=seed)
        return path.read_bytes()

    assert page(0) == page(0) != page(1)


def test_pitfall_328_size(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    """At most 6 kB a latent, all told; the strings are shared."""
    path = dashboard(sae, model=model, data=texts, path=tmp_path / "f.html", tokens=50_000, n_features=40)
    data = data_of(path)
    assert len(json.dumps(data, separators=(",", ":"))) / len(data["latents"]) <= 6000


def test_pitfall_329_every_token_is_encoded_once(
    sae: SAE, model: LoadedModel, rows: TokenBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    original = SAE.encode_sparse

    def counting(self: SAE, x: torch.Tensor):
        codes = original(self, x)
        encoded.append(codes.n_rows)
        return codes

    monkeypatch.setattr(SAE, "encode_sparse", counting)
    runs: list[int] = []
    handle = model.module.transformer.h[0].register_forward_hook(lambda module, args, out: runs.append(1))
    dashboard(sae, model=model, data=[rows], path=tmp_path / "f.html", tokens=10**6, n_features=48)
    handle.remove()
    assert sum(encoded) == rows.ids.numel()
    assert len(runs) == len(encoded) == -(-len(rows) // 64)


def test_pitfall_345_the_header_counts_what_the_masks_left_out(
    sae: SAE, model: LoadedModel, rows: TokenBatch, tmp_path: Path
) -> None:
    masks = MaskConfig(positions="1:", norm_multiple=1.2)
    path = dashboard(sae, model=model, data=rows, path=tmp_path / "f.html", tokens=10**6, masks=masks)
    report = evaluate(sae, model=model, data=rows, masks=masks, batch_prompts=64)
    header, tokens = header_of(path), report.provenance["tokens"]
    by_id = int((rows.ids == 0).sum())
    by_position = int((rows.ids[:, 0] != 0).sum())
    by_norm = rows.ids.numel() - by_id - by_position - int(header["tokens"].replace(",", ""))
    assert header["tokens read"] == f"{rows.ids.numel():,}"
    assert header["tokens counted"] == header["tokens"]
    assert header["masked"].startswith(
        f"{by_id:,} by special or excluded ids; {by_position:,} by positions; {by_norm:,} by norm above 1.2 × median"
    )
    assert by_norm > 0
    assert tokens["by_id"] == by_id
    firings = sum(latent["count"] for latent in data_of(path)["latents"])
    assert firings == pytest.approx(float(header["L0"]) * int(header["tokens"].replace(",", "")), rel=0.02)


def test_numbers_of_a_report(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    report = evaluate(sae, model=model, data=texts, tokens=2000)
    path = dashboard(sae, model=model, data=texts, path=tmp_path / "f.html", tokens=2000, report=report)
    header = header_of(path)
    assert header["L0"] == f"{report['l0']:.1f}"
    assert header["explained variance"] == f"{report['explained_variance']:.3f}"
    assert ("loss recovered" in header) == (report["ce_loss_score"] is not None)


def test_masked_tokens_are_shown_at_no_peak(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    data = data_of(dashboard(sae, model=model, data=texts, path=tmp_path / "f.html", tokens=5000))
    contexts = [c for latent in data["latents"] for group in latent["groups"] for c in group["contexts"]]
    bos = data["strings"].index("<s>")
    assert any(bos in context["tokens"] for context in contexts)
    assert all(context["tokens"][context["peak"]] != bos for context in contexts)


def test_rows_are_spread_over_the_documents(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    long_first = ["a b c d e f g h " * 500, *texts]
    path = dashboard(sae, model=model, data=long_first, path=tmp_path / "f.html", tokens=1000)
    documents = int(header_of(path)["rows"].rpartition("from ")[2].split()[0])
    assert documents > 10


def test_token_rows_are_not_moved(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    rows, untouched = (TokenRows(texts, model.tokenizer, CONFIG, held_out=True) for _ in range(2))
    path = dashboard(sae, model=model, data=rows, path=tmp_path / "f.html", tokens=300)
    assert header_of(path)["data"] == "held-out documents of the list of documents"
    assert torch.equal(rows.next_rows(3).ids, untouched.next_rows(3).ids)


def test_padding_is_neither_counted_nor_shown(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    config = DataConfig(context=32, pack=False)
    short = [f"the cat no. {i}, {text.encode().hex()[:4]}" for i, text in enumerate(texts)]
    masks = MaskConfig(special_tokens=False)
    path = dashboard(
        sae, model=model, data=short, path=tmp_path / "f.html", tokens=2000, data_config=config, masks=masks
    )
    counts = header_of(path)
    assert counts["tokens read"] == counts["tokens counted"]
    assert int(counts["tokens read"].replace(",", "")) < 21 * len(texts)
    for latent in data_of(path)["latents"]:
        for group in latent["groups"]:
            assert all(len(context["tokens"]) <= 21 for context in group["contexts"])


def test_pitfall_344_an_sae_in_bf16(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    path = dashboard(sae.to(torch.bfloat16), model=model, data=texts, path=tmp_path / "f.html", tokens=1000)
    assert data_of(path)["latents"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pitfall_337_every_activation_function_has_a_page(
    name: str, model: LoadedModel, rows: TokenBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no copy of the weights is made for it."""
    cls = ACTIVATIONS[name]
    torch.manual_seed(0)
    other = SAE(D, 48, cls(**{"k": 4} if "k" in {f.name for f in dataclasses.fields(cls)} else {}))
    if other.activation.calibrated:
        other.threshold.fill_(0.1)  # type: ignore[union-attr]
    other.metadata["hf_hook_name"] = "transformer.h.0"
    places = {parameter.data_ptr() for parameter in other.parameters()}
    seen, encode = set[int](), SAE.encode_sparse

    def looking(self: SAE, x: torch.Tensor) -> Any:
        seen.update(parameter.data_ptr() for parameter in self.parameters())
        return encode(self, x)

    monkeypatch.setattr(SAE, "encode_sparse", looking)
    path = dashboard(other.requires_grad_(False), model=model, data=[rows], path=tmp_path / "f.html", tokens=1000)
    assert data_of(path)["latents"]
    assert seen == places


def test_pitfall_342_nothing_fires(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    silent = copy.deepcopy(sae)
    silent.b_enc.data.fill_(-1e6)
    assert data_of(dashboard(silent, model=model, data=texts, path=tmp_path / "f.html", tokens=1000))["latents"] == []


def test_any_module_and_no_tokenizer(sae: SAE, tmp_path: Path) -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.mix = nn.Embedding(30, D), nn.Linear(D, D)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.mix(self.table(input_ids))

    module = Tiny().train()
    own = LoadedModel(module, None, "own")
    del sae.metadata["hf_hook_name"]  # this module has none of its hooks
    path = dashboard(sae, model=own, data=torch.randint(30, (50, 32)), hook="mix", path=tmp_path / "f.html")
    data = data_of(path)
    assert "promoted" not in data["latents"][0]
    assert all(string.startswith("#") for string in data["strings"])
    assert module.training
    assert module.mix.training


def test_the_name_of_the_model_tells_no_path(sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "secret" / "my-model"
    folder.mkdir(parents=True)
    here = LoadedModel(model.module, model.tokenizer, str(folder))
    path = dashboard(sae, model=here, data=texts, path=tmp_path / "f.html", tokens=1000)
    assert data_of(path)["header"]["subject"] == "my-model · transformer.h.0"
    assert "secret" not in path.read_text(encoding="utf-8")


def notes_of(path: Path) -> list[str]:
    return [text for name, text in data_of(path)["header"]["more"] if name == "note"]


def test_another_model_and_hook_are_said_here_and_on_the_page(
    sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    at, out = {"tokens": 1000, "n_features": 2, "data": texts}, tmp_path / "f.html"
    assert notes_of(dashboard(sae, model=model, path=out, **at)) == []
    sae.metadata |= {"model_name": "gpt2"}
    with pytest.warns(UserWarning, match="the SAE was trained") as caught:
        path = dashboard(sae, model=model, path=out, hook="transformer.h.1", **at)
    said = [
        "the SAE was trained on the model 'gpt2' and is used on 'tiny'",
        "the SAE was trained on activations at 'transformer.h.0' and reads those at 'transformer.h.1'",
    ]
    assert notes_of(path) == said
    assert [str(w.message) for w in caught] == [f"{note}." for note in said]
    assert {w.filename for w in caught} == {__file__}


def test_another_tokenizer_of_the_model_is_refused(
    sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path
) -> None:
    sae.metadata |= {"model_name": "tiny", "tokenizer_fingerprint": "another"}
    with pytest.raises(UnweaveError, match="the tokenizer of 'tiny' has another vocabulary"):
        dashboard(sae, model=model, data=texts, path=tmp_path / "f.html")


class TestBadInput:
    @pytest.mark.parametrize("name", ["tokens", "n_features"])
    def test_nothing_wanted(self, sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path, name: str) -> None:
        with pytest.raises(UnweaveError, match="at least 1"):
            dashboard(sae, model=model, data=texts, path=tmp_path / "f.html", **{name: 0})

    def test_no_hook(self, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
        with pytest.raises(UnweaveError, match="name no hook"):
            dashboard(SAE(D, 8, TopK(2)), model=model, data=texts, path=tmp_path / "f.html")

    def test_two_hooks(self, sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
        with pytest.raises(UnweaveError, match="matches 2"):
            dashboard(sae, model=model, data=texts, hook="transformer.h.*", path=tmp_path / "f.html")

    def test_wrong_width(self, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
        with pytest.raises(UnweaveError, match=r"width 8, but 'transformer\.h\.0' of 'tiny' gives 16"):
            dashboard(SAE(8, 16, TopK(2)), model=model, data=texts, hook="transformer.h.0", path=tmp_path / "f.html",
                      data_config=CONFIG)
        assert not list(tmp_path.iterdir())

    def test_nan(self, sae: SAE, model: LoadedModel, texts: list[str], tmp_path: Path) -> None:
        broken = copy.deepcopy(model.module)
        broken.transformer.h[0].mlp.c_proj.bias.data[3] = torch.nan
        with pytest.raises(UnweaveError, match=r"'transformer\.h\.0' are NaN or infinite in pass 1"):
            dashboard(sae, model=LoadedModel(broken, model.tokenizer, "broken"), data=texts, path=tmp_path / "f.html")
        assert not list(tmp_path.iterdir())

    def test_tokens_of_another_model(self, sae: SAE, model: LoadedModel, tmp_path: Path) -> None:
        with pytest.raises(UnweaveError, match="another tokenizer"):
            dashboard(sae, model=model, data=torch.full((4, 32), 9999), path=tmp_path / "f.html")
