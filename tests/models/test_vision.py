"""Vision models: their layouts come from their configurations, their aliases are exact, and checkpoints load."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from unweave._errors import UnweaveError
from unweave.models import (
    TOKEN_KINDS,
    VisionLayout,
    capture,
    head_shape,
    load_model,
    process,
    processors,
    resolve_hooks,
    tl_name,
    vision_layout,
)
from unweave.models.aliases import aliases
from unweave.models.processors import DINOv3Processor

LAYERS, WIDTH = 3, 16
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 24}
SQUARE = {**SIZES, "image_size": 8, "patch_size": 4}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTConfig", "ViTModel", SQUARE),
    "vit_classifier": ("ViTConfig", "ViTForImageClassification", SQUARE),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel", SQUARE),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel", SQUARE),
    "siglip2": ("Siglip2VisionConfig", "Siglip2VisionModel", {**SIZES, "num_patches": 4, "patch_size": 4}),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**SQUARE, "intermediate_size": None}),
    "dinov2_with_registers": (
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersModel",
        {**SQUARE, "intermediate_size": None, "num_register_tokens": 3},
    ),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViTModel", {**SQUARE, "num_register_tokens": 2}),
}  # fmt: skip


def build(family: str, **changes: Any) -> nn.Module:
    """Every weight is moved from its initial value, lest a norm of ones or a bias of zeros hide a mistake."""
    import transformers

    config_class, model_class, sizes = FAMILIES[family]
    settings = {name: value for name, value in {**sizes, **changes}.items() if value is not None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(family: str, n: int = 2, size: tuple[int, int] = (8, 8)) -> dict[str, torch.Tensor]:
    """What a model of a family takes for `n` images."""
    generator = torch.Generator().manual_seed(1)
    if family != "siglip2":
        return {"pixel_values": torch.randn(n, 3, *size, generator=generator)}
    return {  # the second image has a grid of 1 × 3 patches, and one patch of padding
        "pixel_values": torch.randn(2, 4, 48, generator=generator),
        "pixel_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "spatial_shapes": torch.tensor([[2, 2], [1, 3]]),
    }


LAYOUTS = {
    "vit": (1, 0, "interpolated"), "vit_classifier": (1, 0, "interpolated"), "clip": (1, 0, "interpolated"),
    "siglip": (0, 0, "interpolated"), "siglip2": (0, 0, "list"), "dinov2": (1, 0, "any"),
    "dinov2_with_registers": (1, 3, "any"), "dinov3": (1, 2, "any"),
}  # fmt: skip


@pytest.fixture(scope="module")
def built() -> dict[str, nn.Module]:
    return {family: build(family) for family in FAMILIES}


def at(model: nn.Module, inputs: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
    hooks = [resolve_hooks(model, [name])[0] for name in names]
    seen = capture(model, hooks, **inputs)
    return [seen[str(hook)] for hook in hooks]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_the_configurations(built: dict[str, nn.Module], family: str) -> None:
    layout = vision_layout(built[family])
    assert layout is not None
    assert (layout.cls, layout.registers, layout.sizes) == LAYOUTS[family]
    assert layout.patch == (4, 4)
    assert layout.image == (None if family == "siglip2" else (8, 8))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layout_has_as_many_tokens_as_the_model_gives(built: dict[str, nn.Module], family: str) -> None:
    layout, inputs = vision_layout(built[family]), inputs_of(family)
    assert layout is not None
    [residual] = at(built[family], inputs, "resid_post.0")
    assert residual.shape == (2, len(layout.kinds(4)), WIDTH)


@pytest.mark.parametrize("family", ["vit", "dinov2", "dinov2_with_registers", "dinov3"])
def test_pitfall_245_each_kind_is_where_the_layout_says(built: dict[str, nn.Module], family: str) -> None:
    """Only patches depend on the image at the first block; registers are the model's own parameters."""
    model, layout = built[family], vision_layout(built[family])
    assert layout is not None
    first, second = (at(model, {"pixel_values": torch.randn(1, 3, 8, 8)}, "resid_pre.0")[0][0] for _ in range(2))
    kinds = layout.kinds(4)
    assert torch.equal((first != second).any(1), kinds == TOKEN_KINDS.index("patch"))
    if layout.registers:
        registers = next(p for name, p in model.named_parameters() if name.endswith("register_tokens"))
        assert torch.equal(first[kinds == TOKEN_KINDS.index("register")], registers[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_blank_image_is_one_that_the_model_takes(built: dict[str, nn.Module], family: str) -> None:
    layout = vision_layout(built[family])
    assert layout is not None
    [residual] = at(built[family], layout.blank(), "resid_post.1")
    assert residual.shape[-1] == WIDTH


def test_pitfall_245_the_same_count_can_be_two_layouts() -> None:
    """257 tokens: a CLS token and 16 × 16 patches, or 257 patches."""
    with_cls = VisionLayout((4, 4), (64, 64), cls=1).kinds(256)
    without = VisionLayout((4, 4), (4, 1028)).kinds(257)
    assert len(with_cls) == len(without) == 257
    assert (TOKEN_KINDS[with_cls[0]], TOKEN_KINDS[without[0]]) == ("cls", "patch")


@pytest.mark.parametrize(("image", "patch", "grid"), [(8, 4, (2, 2)), (12, 2, (6, 6)), ((8, 16), (4, 4), (2, 4))])
def test_pitfall_256_sizes_are_read_from_the_model(image: Any, patch: Any, grid: tuple[int, int]) -> None:
    model = build("vit", image_size=image, patch_size=patch)
    layout = vision_layout(model)
    assert layout is not None
    assert layout.image is not None
    assert layout.grid(*layout.image) == grid
    [residual] = at(model, {"pixel_values": torch.randn(1, 3, *layout.image)}, "resid_post.1")
    assert residual.shape[1] == 1 + grid[0] * grid[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_residuals_are_the_hidden_states(built: dict[str, nn.Module], family: str) -> None:
    model, inputs = built[family], inputs_of(family)
    states = model(**inputs, output_hidden_states=True).hidden_states
    names = [f"resid_pre.{n}" for n in range(LAYERS)]
    for ours, theirs in zip(at(model, inputs, *names), states, strict=False):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_adds_what_attention_and_mlp_put_out(built: dict[str, nn.Module], family: str) -> None:
    model, inputs = built[family], inputs_of(family)
    for n in range(LAYERS):
        names = (f"resid_pre.{n}", f"attn_out.{n}", f"blocks.{n}.hook_resid_mid", f"mlp_out.{n}", f"resid_post.{n}")
        pre, attn, middle, mlp, post = at(model, inputs, *names)
        assert torch.allclose(middle, pre + attn, atol=1e-5)
        assert torch.allclose(post, middle + mlp, atol=1e-5)
        assert min(attn.norm(), mlp.norm()) > 0.1
        assert not torch.allclose(attn, mlp, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_z_is_what_the_output_projection_reads(built: dict[str, nn.Module], family: str) -> None:
    model, inputs = built[family], inputs_of(family)
    [hook] = resolve_hooks(model, ["blocks.1.attn.hook_z"])
    projection = model.get_submodule(hook.path)
    [z, attn] = at(model, inputs, str(hook), "attn_out.1")
    scale = next((p for name, p in model.named_parameters() if name.endswith("1.layer_scale1.lambda1")), 1.0)
    assert torch.allclose(projection(z) * scale, attn, atol=1e-5)
    assert head_shape(model, hook) == (8, 2)
    assert tl_name(model, hook) == "blocks.1.attn.hook_z"


def test_a_model_of_text_and_of_two_towers_has_no_layout(gpt2: nn.Module) -> None:
    import transformers

    sizes = {k: v for k, v in FAMILIES["clip"][2].items() if k != "image_size" and k != "patch_size"}
    text = {**sizes, "vocab_size": 40, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1}
    both = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=FAMILIES["clip"][2]))
    assert vision_layout(gpt2) is None
    assert vision_layout(both) is None
    assert aliases(both) == {}  # which tower would be meant?


# Checkpoints


def save(model: nn.Module, folder: Path, processor: Any = None) -> Path:
    model.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_from_a_folder(built: dict[str, nn.Module], family: str, tmp_path: Path) -> None:
    loaded = load_model(save(built[family], tmp_path))
    assert type(loaded.module) is type(built[family])
    assert all(torch.equal(a, b) for a, b in zip(loaded.module.parameters(), built[family].parameters(), strict=True))
    assert loaded.vision == vision_layout(built[family])
    assert loaded.tokenizer is loaded.processor is None


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_of_two_towers_the_one_that_sees_is_loaded(family: str, tmp_path: Path) -> None:
    import transformers

    config_class, model_class, sizes = FAMILIES[family]
    text = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 40,
        "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    config = getattr(transformers, config_class.replace("Vision", ""))(text_config=text, vision_config=sizes)
    both = getattr(transformers, model_class.replace("Vision", ""))(config)
    loaded = load_model(save(both, tmp_path))
    assert type(loaded.module).__name__ == model_class
    for name, parameter in both.vision_model.named_parameters():
        assert torch.equal(loaded.module.get_parameter(name), parameter)


def test_without_pillow_what_to_install_is_all_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processors, "find_spec", lambda name: None)
    with pytest.raises(UnweaveError, match=r"^models of images need Pillow: pip install 'unweave\[vision\]'\.$"):
        load_model("demo-vit")


def test_the_processor_is_the_one_that_needs_no_torchvision(built: dict[str, nn.Module], tmp_path: Path) -> None:
    import transformers

    ours = transformers.CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = load_model(save(built["clip"], tmp_path, ours)).processor
    assert type(processor).__name__ == "CLIPImageProcessorPil"
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (19, 13, 3), dtype=np.uint8))
    by_hand = ours(images=[image], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(process(processor, image)["pixel_values"], by_hand)


def test_dinov3s_processor_gives_what_torchvisions_gives(built: dict[str, nn.Module], tmp_path: Path) -> None:
    """The numbers are those of transformers' DINOv3ViTImageProcessor with torchvision 0.28."""
    save(built["dinov3"], tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 2, "width": 2}}', encoding="utf-8"
    )
    processor = load_model(tmp_path).processor
    assert isinstance(processor, DINOv3Processor)
    pixels = (np.arange(4 * 6 * 3) * 7 % 256).astype(np.uint8).reshape(4, 6, 3)
    expected = [
        [[-0.5969, 0.1456], [-0.0244, 0.4049]],
        [[-0.5182, 0.4009], [-0.2531, 0.6660]],
        [[-0.1717, 0.7433], [0.0922, 1.0073]],
    ]
    found = process(processor, Image.fromarray(pixels))["pixel_values"]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)


def test_a_processor_that_is_unknown_is_refused() -> None:
    with pytest.raises(UnweaveError, match=r"a DINOv3 processor that resizes to .* by filter 3 is not known"):
        DINOv3Processor(resample=3)


def test_a_function_is_a_processor_too() -> None:
    image = Image.new("RGB", (3, 2))
    assert process(lambda x: torch.zeros(3, x.height, x.width), image)["pixel_values"].shape == (3, 2, 3)
    with pytest.raises(UnweaveError, match="is a function, so it takes no size"):
        process(lambda x: torch.zeros(3, 2, 3), image, size={"height": 1, "width": 1})
    with pytest.raises(UnweaveError, match="gives list, where a tensor is needed"):
        process(lambda x: [1], image)


# timm, whose own package needs torchvision: models with its names stand in for it


class Block(nn.Module):
    __module__ = "timm.models.vision_transformer"

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ls1, self.ls2 = nn.Identity(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class TimmViT(nn.Module):
    def __init__(self, n_prefix: int = 5, n_registers: int = 4) -> None:
        super().__init__()
        self.num_prefix_tokens, self.num_reg_tokens = n_prefix, n_registers
        self.patch_embed = nn.Module()
        self.patch_embed.patch_size, self.patch_embed.img_size = (4, 4), (8, 12)
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, n_prefix, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.prefix.expand(len(x), -1, -1), patches], 1))


@pytest.fixture
def timm(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module, data = types.ModuleType("timm"), types.ModuleType("timm.data")

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        if name != "vit_tiny" or not pretrained:
            raise RuntimeError(f"Unknown model ({name})")
        return TimmViT()

    module.create_model, module.data = create_model, data  # type: ignore[attr-defined]
    data.resolve_model_data_config = lambda model: {"input_size": (3, 8, 12)}  # type: ignore[attr-defined]
    data.create_transform = lambda input_size, is_training: lambda image: torch.zeros(input_size)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", module)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return module


@pytest.mark.usefixtures("timm")
def test_timm_models_are_loaded_by_name() -> None:
    loaded = load_model("timm:vit_tiny")
    assert loaded.vision == VisionLayout((4, 4), (8, 12), cls=1, registers=4, sizes="fixed")
    assert not any(p.requires_grad for p in loaded.module.parameters())
    assert loaded.processor is not None
    assert loaded.processor(None).shape == (3, 8, 12)
    pre, attn, mlp, post = at(
        loaded.module, {"x": torch.randn(1, 3, 8, 12)}, "resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1"
    )
    assert pre.shape == (1, 5 + 6, WIDTH)
    assert torch.allclose(pre + attn + mlp, post, atol=1e-5)
    with pytest.raises(UnweaveError, match=r"'timm:vit_huge' could not be loaded by timm: Unknown model \(vit_huge\)"):
        load_model("timm:vit_huge")


def test_without_timm_the_name_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UnweaveError, match="'timm:vit_tiny' needs timm, which could not be imported"):
        load_model("timm:vit_tiny")


def test_another_block_of_that_name_is_not_timms() -> None:
    class Block(nn.Linear):
        pass

    assert aliases(nn.Sequential(nn.Sequential(Block(2, 2)))) == {}
