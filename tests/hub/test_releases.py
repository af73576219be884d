"""The directory of published SAEs: that it holds its source's facts, and that what one looks for is found."""

from __future__ import annotations

import subprocess
import sys

import pytest

from unweave._errors import UnweaveError
from unweave.hub import releases
from unweave.hub.published import PACKED, checksum, directory, find, unpack


def test_it_holds_the_facts_of_its_source() -> None:
    """pitfall_274: no release vanishes unnoticed."""
    facts = unpack()
    assert checksum(facts) == "873a0ece627c73433fc4b0c4c15674a7f1c8dfdeff4ee0661e3e8631101b9f89"
    assert (len(facts), sum(len(r["saes"]) for r in facts.values())) == (170, 13_857)
    assert PACKED.stat().st_size < 150_000


def test_a_changed_fact_has_another_checksum() -> None:
    facts = unpack()
    before = checksum(facts)
    facts["gpt2-small-res-jb"]["saes"][0]["l0"] = 11.0
    assert checksum(facts) != before


def test_every_entry_is_there_with_its_facts() -> None:
    for name, entry in unpack().items():
        release = directory()[name]
        assert (release.repo_id, release.model, release.format) == (entry["repo_id"], entry["model"], entry["format"])
        assert release.config_overrides == (entry.get("config_overrides") or {})
        for sae, facts in zip(release.saes, entry["saes"], strict=True):
            assert (sae.id, sae.path) == (facts["id"], str(facts["path"]))
            assert sae.norm_scaling_factor == facts.get("norm_scaling_factor")
            assert sae.neuronpedia == facts.get("neuronpedia")
            assert facts.get("l0") in (None, sae.l0)
            assert release[sae.id] is sae


def test_unpacking_waits_until_somebody_asks() -> None:
    """pitfall_365"""
    program = "import unweave.hub, unweave.hub.published as r; assert not r.directory.cache_info().currsize"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("release", "id", "expected"),
    [
        ("gpt2-small-res-jb", "blocks.8.hook_resid_pre", ("resid_pre", 8, None, 60.0)),
        ("gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_768", ("resid_pre", 8, "768", None)),
        ("gpt2-small-mlp-tm", "blocks.3.hook_mlp_out", ("mlp_out", 3, "24576", None)),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", ("embed", None, "4k", 6.0)),
        ("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical", ("resid_post", 12, "16k", 82.0)),
        ("gemma-scope-2b-pt-att", "layer_0/width_16k/average_l0_104", ("hook_z", 0, "16k", 104.0)),
        ("gemma-scope-2-1b-it-transcoders-all", "layer_0_width_16k_l0_big", ("transcoder", 0, "16k", 60.0)),
        ("llama_scope_lxm_8x", "l5m_8x", ("mlp_out", 5, "8x", 50.0)),
        ("gpt2-small-hook-z-kk", "blocks.1.hook_z", ("hook_z", 1, None, 23.0)),
        ("qwen-scope-3.5-2b-base-w32k-l50", "layer7", ("resid_post", 7, "32k", 50.0)),
        ("gpt-oss-20b-andyrdt", "resid_post_layer_3_trainer_0", ("resid_post", 3, None, None)),
    ],
)
def test_hook_width_and_l0_of_an_id(release: str, id: str, expected: tuple[object, ...]) -> None:
    found = directory()[release][id]
    assert (found.site, found.layer, found.width) == expected[:3]
    if expected[3] is not None:
        assert found.l0 == pytest.approx(expected[3], abs=0.6)


def test_a_step_or_a_date_is_no_width() -> None:
    """`trainer_5_step_9765` and `ctx128_0730` hold numbers too."""
    assert directory()["sae_bench_gemma-2-2b_topk_width-2pow12_date-1109"].widths == "4096"
    assert directory()["sae_bench_pythia70m_sweep_gated_ctx128_0730"].widths == "4k 16k"


def test_a_search() -> None:
    found = releases("gpt2 resid_pre")
    assert {r.model for r in found} == {"gpt2-small"}
    assert {"gpt2-small-res-jb", "gpt2-small-res_sle-ajt"} <= {r.name for r in found}
    assert "gpt2-small-mlp-tm" not in {r.name for r in found}
    assert len(releases()) == 170
    assert len(releases("GEMMA scope transcoder")) == 1 + 19


def test_the_table_shows_each_release_on_a_line() -> None:
    lines = repr(releases("pythia-70m att")).splitlines()
    assert len(lines) == 2
    assert lines[0].split() == ["release", "model", "hooks", "widths", "L0", "SAEs", "format", "repository"]
    assert lines[1].split()[:3] == ["pythia-70m-deduped-att-sm", "pythia-70m-deduped", "attn_out.0-5"]
    assert lines[1].split()[-2:] == ["saelens", "ctigges/pythia-70m-deduped__att-sm_processed"]


def test_nothing_found_names_the_nearest() -> None:
    with pytest.raises(UnweaveError, match=r"no release matches 'gtp2'; did you mean .*'gpt2'"):
        releases("gtp2")
    with pytest.raises(UnweaveError, match=r"no release 'gpt2-small-resjb'; did you mean 'gpt2-small-res-jb'"):
        find("gpt2-small-resjb", "blocks.8.hook_resid_pre")


def test_an_id_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(
        UnweaveError, match=r"no SAE 'blocks\.8\.hook_resid_pr'; did you mean 'blocks\.8\.hook_resid_pre'"
    ):
        find("gpt2-small-res-jb", "blocks.8.hook_resid_pr")
    with pytest.raises(UnweaveError, match=r"no SAE 'zzz'; there are 'l0r_8x', .* and 24 more\.$"):
        find("llama_scope_lxr_8x", "zzz")


def test_an_ambiguous_id_lists_the_candidates_and_the_canonical_release() -> None:
    with pytest.raises(
        UnweaveError, match=r"5 ids contain it, 'layer_12/width_16k/average_l0_176', .*_l0_82'\."
    ) as error:
        find("gemma-scope-2b-pt-res", "layer_12/width_16k")
    assert str(error.value).endswith("'gemma-scope-2b-pt-res-canonical' has 'layer_12/width_16k/canonical'.")
    with pytest.raises(UnweaveError, match=r"'gemma-scope-2b-pt-res-canonical' has 'layer_12/width_16k/canonical'\.$"):
        find("gemma-scope-2b-pt-res", "layer_12/width_16k/canonical")


def test_a_part_of_a_number_is_no_part_of_an_id() -> None:
    """`layer_1` is not `layer_12`."""
    with pytest.raises(UnweaveError) as error:
        find("gemma-scope-2b-pt-res-canonical", "layer_1")
    assert "layer_12" not in str(error.value).split("contain it")[1]


def test_an_id_can_be_left_out_where_there_is_one() -> None:
    assert find("gemma-2b-it-res-jb")[1].id == "blocks.12.hook_resid_post"
    with pytest.raises(UnweaveError, match=r"'gpt2-small-res-jb' has 13 SAEs; name one: 'blocks\.0\.hook_resid_pre'"):
        find("gpt2-small-res-jb")
