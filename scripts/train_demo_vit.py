"""Train the small vision transformer that ships with unweave, on the handwritten digits that come with scikit-learn.

    python scripts/train_demo_vit.py --out src/unweave/models/demo_vit

A ViT of 3 layers and width 96 on patches of 2 × 2 pixels, with a CLS token that classifies. The images on the held-out
side of unweave's split (at 0.2, of which the default 0.05 is a part) are never trained on. Each image is shifted by up
to a pixel, and weights begin at a standard deviation of 0.05: with less, nothing is learnt in the first epochs. The
run is a function of the seed and the number of threads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from unweave.activations.images import ImageConfig, digits
from unweave.activations.split import is_held_out
from unweave.models import process

HELD_OUT = 0.2
MEAN = STD = 0.5


def load_digits(processor: ViTImageProcessorPil) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels as the model takes them, labels, and whether each image is held out, here and by default."""
    images = digits()
    assert images.entry is not None
    entries = [images.entry(i) for i in range(len(images))]
    pictures: list[Any] = [entry.open() for entry in entries]
    pixels = torch.stack([process(processor, picture.convert("RGB"))["pixel_values"] for picture in pictures])
    held_out, default = (
        torch.tensor([is_held_out(entry.content, share) for entry in entries])
        for share in (HELD_OUT, ImageConfig().held_out)
    )
    return pixels, torch.tensor(images.labels), held_out, default


def shifted(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by -1, 0 or 1 pixels both ways, empty where nothing moves in."""
    padded = functional.pad(pixels, (1, 1, 1, 1), value=-MEAN / STD)
    size = pixels.shape[-1]
    offsets = torch.randint(3, (len(pixels), 2), generator=generator)
    rows = (offsets[:, :1] + torch.arange(size))[:, None, :, None]
    columns = (offsets[:, 1:] + torch.arange(size))[:, None, None, :]
    images, channels = torch.arange(len(pixels))[:, None, None, None], torch.arange(3)[None, :, None, None]
    return padded[images, channels, rows, columns]


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(pixels).logits.argmax(1) == labels).double().mean().item()


def save(model: ViTForImageClassification, processor: ViTImageProcessorPil, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(out)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    state = {name: value.detach().bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(state, out / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for config, weights and processor")
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--adam-lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    processor = ViTImageProcessorPil(
        do_resize=True, size={"height": 8, "width": 8}, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    pixels, labels, held_out, default = load_digits(processor)
    train, train_labels = pixels[~held_out], labels[~held_out]
    names = {i: str(i) for i in range(10)}
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            hidden_size=args.width,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            intermediate_size=4 * args.width,
            initializer_range=0.05,
            id2label=names,
            label2id={name: i for i, name in names.items()},
        )
    )
    # Every matrix of the layers by Muon; what embeds and what classifies, and all vectors, by AdamW.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lrs = [args.muon_lr, args.adam_lr]
    generator = torch.Generator().manual_seed(args.seed)
    per_epoch = math.ceil(len(train) / args.batch)
    steps, step, started = args.epochs * per_epoch, 0, time.perf_counter()
    for epoch in range(args.epochs):
        order = torch.randperm(len(train), generator=generator)
        for rows in order.split(args.batch):
            scale = min(1.0, (step + 1) / (2 * per_epoch)) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
            logits = model(shifted(train[rows], generator)).logits
            loss = functional.cross_entropy(logits, train_labels[rows], label_smoothing=0.05)
            loss.backward()
            for optimizer, lr in zip(optimizers, base_lrs, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = lr * scale
                optimizer.step()
                optimizer.zero_grad()
            step += 1
        if (epoch + 1) % 10 == 0:
            model.eval()
            right = accuracy(model, pixels[held_out], labels[held_out])
            model.train()
            print({"epoch": epoch + 1, "loss": round(loss.item(), 4), "held_out": round(right, 4)}, flush=True)

    save(model, processor, args.out)
    shipped = ViTForImageClassification.from_pretrained(args.out, dtype=torch.float32).eval()
    report = {
        "seconds": round(time.perf_counter() - started),
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "bytes": (args.out / "model.safetensors").stat().st_size,
        "sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
        "train_images": len(train),
        "held_out_images": int(held_out.sum()),
        "train_accuracy": accuracy(shipped, train, train_labels),
        "held_out_accuracy": accuracy(shipped, pixels[held_out], labels[held_out]),
        "default_held_out_images": int(default.sum()),
        "default_held_out_accuracy": accuracy(shipped, pixels[default], labels[default]),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
