"""Pictures of SAEs: what they show is right, nothing overlaps or is cut off, and files appear whole."""

import struct
import subprocess
import sys
import types

import pytest
import torch

from unweave import SAE, TopK, UnweaveError
from unweave.synthetic import figures
from unweave.synthetic.dictionary import FeatureDictionary, cosine_similarities
from unweave.synthetic.figures import save_figure
from unweave.synthetic.plots import Bar, plot_recovery, plot_sae_feature_similarity, plot_similarity_across_saes


def heat_maps(figure):
    return [axes.images[0] for axes in figure.axes if axes.images and axes.get_xlabel() != ""]


@pytest.fixture
def features():
    return FeatureDictionary(12, 16, seed=0)


@pytest.fixture
def sae(features):
    """The dictionary in another order; its encoder is another one."""
    sae = SAE(16, 12, TopK(3), generator=torch.Generator().manual_seed(1))
    sae.W_dec.data.copy_(features.feature_vectors.roll(5, 0))
    return sae


def test_similarity_shows_the_cosines(sae, features, assert_readable):
    figure = plot_sae_feature_similarity(sae, features, "a title", show_plot=False)
    encoder, decoder = heat_maps(figure)
    vectors = features.feature_vectors
    for image, rows in ((encoder, sae.W_enc.T), (decoder, sae.W_dec)):
        expected = cosine_similarities(rows.detach(), vectors)
        torch.testing.assert_close(torch.from_numpy(image.get_array().filled().copy()).float(), expected.float())
        assert (image.norm.vmin, image.norm.vmax, image.get_cmap().name) == (-1, 1, "RdBu_r")
    assert [axes.get_title() for axes in figure.axes[:2]] == ["encoder", "decoder"]
    assert figure.get_suptitle() == "a title"
    assert_readable(figure)


def test_similarity_in_another_order(sae, features):
    (image,) = heat_maps(
        plot_sae_feature_similarity(sae, features, reorder_features=True, decoder_only=True, show_plot=False)
    )
    torch.testing.assert_close(torch.from_numpy(image.get_array().filled().copy()).diagonal(), torch.ones(12))
    order = torch.tensor([3, 0])
    (image,) = heat_maps(
        plot_sae_feature_similarity(sae, features, reorder_features=order, decoder_only=True, show_plot=False)
    )
    expected = cosine_similarities(sae.W_dec.detach()[order], features.feature_vectors)
    torch.testing.assert_close(torch.from_numpy(image.get_array().filled().copy()).float(), expected.float())


def test_values_in_the_cells(sae, features, assert_readable):
    figure = plot_sae_feature_similarity(sae, features, show_values=True, decoder_only=True, dtick=1, show_plot=False)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len(texts) == 12 * 12
    assert texts.count("1.00") == 12
    assert_readable(figure)


@pytest.mark.parametrize("n", [1, 2, 300])
def test_similarity_of_any_size(n, assert_readable):
    features, sae = FeatureDictionary(n, 8, seed=0), SAE(8, 2 * n, TopK(1))
    assert_readable(plot_sae_feature_similarity(sae, features, show_plot=False))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_size_in_pixels(sae, features, tmp_path, scale):
    path = tmp_path / "deep" / "picture.png"
    plot_sae_feature_similarity(sae, features, width=640, height=320, save_path=path, show_plot=False, scale=scale)
    assert struct.unpack(">II", path.read_bytes()[16:24]) == (640 * scale, 320 * scale)
    assert list(path.parent.iterdir()) == [path]


def test_svg_and_equal_bytes(sae, features, tmp_path):
    for name in ("a.svg", "b.SVG", "a.png", "b.png"):
        plot_sae_feature_similarity(sae, features, save_path=tmp_path / name, show_plot=False)
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.SVG").read_bytes()
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failed_write_leaves_what_was_there(sae, features, tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"before")
    figure = plot_sae_feature_similarity(sae, features, show_plot=False)

    def fail(file, **options):
        file.write_bytes(b"half")
        raise OSError("no space")

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(OSError, match="no space"):
        save_figure(figure, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_no_global_state_is_touched(tmp_path):
    """pyplot knows nothing of the figures, and matplotlib's settings stay as they were."""
    code = f"""
import matplotlib.pyplot as plt
from unweave import SAE, TopK
from unweave.synthetic.dictionary import FeatureDictionary
from unweave.synthetic.plots import plot_sae_feature_similarity
before = dict(plt.rcParams)
plot_sae_feature_similarity(SAE(4, 3, TopK(1)), FeatureDictionary(3, 4), save_path={str(tmp_path / "p.svg")!r})
assert dict(plt.rcParams) == before
assert plt.get_fignums() == []
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_without_matplotlib_the_error_says_what_to_install(sae, features, monkeypatch):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    with pytest.raises(UnweaveError, match=r"pip install 'unweave\[plots\]'"):
        plot_sae_feature_similarity(sae, features)


def test_shown_in_a_notebook(sae, features, monkeypatch):
    shown = []
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    ipython.get_ipython = lambda: object()
    display.Image, display.display = (lambda data, width: (data[:4], width)), shown.append
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    plot_sae_feature_similarity(sae, features, show_plot=False)
    assert shown == []
    plot_sae_feature_similarity(sae, features, width=700)
    assert shown == [(b"\x89PNG", 700)]
    monkeypatch.setattr(ipython, "get_ipython", lambda: None)
    plot_sae_feature_similarity(sae, features)
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_path": "picture.jpg"}, r"\.png or \.svg.*picture\.jpg"),
        ({"save_path": "p.png", "scale": 0}, "scale.*0"),
        ({"width": 0}, "0 x 400"),
        ({"reorder_features": torch.tensor([0, 12])}, "from 0 to 11.* 0 to 12"),
        ({"reorder_features": torch.ones(2, 2).long()}, r"shape \(2, 2\)"),
        ({"reorder_features": torch.tensor([0.0])}, "indices"),
    ],
)
def test_bad_input(sae, features, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnweaveError, match=message):
        plot_sae_feature_similarity(sae, features, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_sae_of_another_width(features):
    with pytest.raises(UnweaveError, match=r"width 9 .* width 16"):
        plot_sae_feature_similarity(SAE(9, 4, TopK(1)), features)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_across_saes(features, sae, n, assert_readable):
    saes = {f"SAE {i}": sae if i == 0 else SAE(16, 6 + 4 * i, TopK(2)) for i in range(n)}
    figure = plot_similarity_across_saes(saes, features, "several")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == list(saes)
    torch.testing.assert_close(
        torch.from_numpy(panels[0].images[0].get_array().filled().copy()).diagonal(), torch.ones(12)
    )
    assert_readable(figure)


def test_across_saes_names_and_errors(features, sae):
    figure = plot_similarity_across_saes([sae], features, reorder_features=torch.arange(12))
    assert figure.axes[0].get_title() == "TopK(k=3), 12"
    with pytest.raises(UnweaveError, match="no SAEs"):
        plot_similarity_across_saes([], features)


def test_recovery_bars(assert_readable):
    names = ["TopK(k=8)", "BatchTopK(k=8) Matryoshka", "ReLU"]
    bars = [
        Bar("MCC", [0.99, 0.5, None], 1.0, 1.0), Bar("L0 (latents per sample)", [8.0, 30.25, 12345.6], 8.3),
        Bar("dead (latents)", [0, 2, 10_000], 0.0), Bar("slope", [1.02, -0.5, 0.9]),
        Bar("F1", [1.0, 1.0, 1.0], 1.0, 1.0),
    ]  # fmt: skip
    figure = plot_recovery(names, bars, "recovery")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [[t.get_text() for t in axes.texts] for axes in panels[:3]] == [
        ["0.990", "0.500", "–"], ["8.000", "30.2", "12,345.6"], ["0", "2", "10,000"],
    ]  # fmt: skip
    assert [bar.get_width() for bar in panels[3].patches] == [1.02, -0.5, 0.9]
    assert_readable(figure)


def test_recovery_errors():
    with pytest.raises(UnweaveError, match="nothing to compare"):
        plot_recovery([], [])
    with pytest.raises(UnweaveError, match="'MCC' has 1 values for 2 SAEs"):
        plot_recovery(["a", "b"], [Bar("MCC", [1.0])])
