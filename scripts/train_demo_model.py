"""Train the small GPT-2 that ships with unweave, on text that every Python carries.

    python scripts/train_demo_model.py --out src/unweave/models/demo_lm

A GPT-2 of 4 layers and width 224 with a byte-level BPE of 4096 tokens. Muon moves the weight matrices and AdamW
the rest, which on this data converges several times faster than AdamW alone. The run is a function of the seed, the
Python version (its standard library is the data) and the number of threads. It writes a checkpoint every
`--save-every` steps and goes on from it when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

# Large temporaries must stay on the heap: with glibc's default, each logits tensor is mapped and faulted in anew.
if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from unweave.activations.split import is_held_out
from unweave.activations.stdlib_text import standard_library_text

EOT = "<|endoftext|>"


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOT, eos_token=EOT, unk_token=EOT, clean_up_tokenization_spaces=False
    )


def pack(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents in one long row, each one led by the end-of-text token."""
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts):
        ids.append(tokenizer.bos_token_id)
        ids.extend(encoding.ids)
    return torch.tensor(ids)


def loss_of(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross-entropy in nats; the logits are made a quarter of the batch at a time."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.transformer(rows[:, :-1], use_cache=False).last_hidden_state
        total = hidden.new_zeros((), dtype=torch.float32)
        for h, target in zip(hidden.chunk(4), rows[:, 1:].chunk(4), strict=True):
            total = total + torch.nn.functional.cross_entropy(
                model.lm_head(h).flatten(0, 1), target.flatten(), reduction="sum"
            )
    return total / rows[:, 1:].numel()


@torch.no_grad()
def evaluate(model: GPT2LMHeadModel, ids: torch.Tensor, context: int, max_rows: int = 10**9) -> float:
    rows = ids[: len(ids) // (context + 1) * (context + 1)].view(-1, context + 1)
    rows = rows[torch.linspace(0, len(rows) - 1, min(max_rows, len(rows))).long()]
    losses = [loss_of(model, chunk) * len(chunk) for chunk in rows.split(32)]
    return (torch.stack(losses).sum() / len(rows)).item()


def ngram_entropies(train: torch.Tensor, held_out: torch.Tensor, vocab: int) -> tuple[float, float]:
    """Held-out cross-entropy, in nats, of a unigram and of an interpolated bigram model of the training tokens."""
    unigram = (torch.bincount(train, minlength=vocab).double() + 1) / (len(train) + vocab)
    pairs = torch.bincount(train[:-1] * vocab + train[1:], minlength=vocab * vocab).view(vocab, vocab).double()
    # Witten-Bell smoothing: back off to the unigram in proportion to how many different words have followed.
    kinds = (pairs > 0).sum(1, keepdim=True)
    bigram = (pairs + kinds * unigram) / (pairs.sum(1, keepdim=True) + kinds).clamp(min=1)
    bigram = torch.where(kinds > 0, bigram, unigram)
    return (
        -unigram[held_out].log().mean().item(),
        -bigram[held_out[:-1], held_out[1:]].log().mean().item(),
    )


def learning_rate(step: int, steps: int, warmup: int = 100, decay: float = 0.5) -> float:
    """Warm-up, constant, then linear decay to zero over the last half."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out)
    model.config.dtype = torch.bfloat16
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    state = {k: v.detach().bfloat16().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, out / "model.safetensors.tmp", metadata={"format": "pt"})
    os.replace(out / "model.safetensors.tmp", out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for config.json, model.safetensors, tokenizer")
    parser.add_argument("--work", type=Path, default=Path("demo_lm_work"), help="folder for checkpoints and the log")
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--width", type=int, default=224)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--save-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    texts = list(standard_library_text(everything=True))
    train_texts = [t for t in texts if not is_held_out(t)]
    held_out_texts = [t for t in texts if is_held_out(t)]
    tokenizer = train_tokenizer(train_texts, args.vocab)
    train, held_out = pack(tokenizer, train_texts), pack(tokenizer, held_out_texts)
    tokenizer.model_max_length = args.context
    chars_per_token = sum(map(len, held_out_texts)) / len(held_out)
    print(
        f"{len(train):,} training tokens, {len(held_out):,} held out, {chars_per_token:.2f} characters a token",
        flush=True,
    )

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=args.vocab,
            n_positions=args.context,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=args.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            activation_function="gelu_pytorch_tanh",
            attn_implementation="eager",  # type: ignore[call-arg]  # the fused CPU attention is slower at this head size
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and ".h." in n)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.muon_lr, momentum=0.95, weight_decay=0.05),
        torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    base_lrs = [args.muon_lr, args.adam_lr]
    generator = torch.Generator().manual_seed(args.seed)

    first, checkpoint = 0, args.work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        first = state["step"]

    started, log = time.perf_counter(), (args.work / "log.jsonl").open("a")
    for step in range(first, args.steps):
        scale = learning_rate(step, args.steps)
        starts = torch.randint(len(train) - args.context - 1, (args.batch, 1), generator=generator)
        loss = loss_of(model, train[starts + torch.arange(args.context + 1)])
        loss.backward()
        for optimizer, lr in zip(optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            rate = (step + 1 - first) * args.batch * args.context / (time.perf_counter() - started)
            row = {"step": step, "loss": round(loss.item(), 4), "tokens_per_s": round(rate)}
            print(row, flush=True)
            print(json.dumps(row), file=log, flush=True)
        if (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            state = {
                "model": model.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
                "generator": generator.get_state(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".tmp"))
            os.replace(checkpoint.with_suffix(".tmp"), checkpoint)
            save(model, tokenizer, args.work / "latest")
            print({"step": step + 1, "held_out": round(evaluate(model, held_out, args.context, 128), 4)}, flush=True)

    save(model, tokenizer, args.out)
    shipped = GPT2LMHeadModel.from_pretrained(args.out, dtype=torch.float32).eval()
    unigram, bigram = ngram_entropies(train, held_out, args.vocab)
    held_out_loss = evaluate(shipped, held_out, args.context)
    report = {
        "python": sys.version.split()[0],
        "parameters": sum(p.numel() for p in shipped.parameters()),
        "training_tokens": args.steps * args.batch * args.context,
        "corpus_tokens": len(train),
        "held_out_tokens": len(held_out),
        "chars_per_token": chars_per_token,
        "unigram_nats": unigram,
        "bigram_nats": bigram,
        "train_nats": evaluate(shipped, train, args.context, 512),
        "held_out_nats": held_out_loss,
        "bits_per_char": held_out_loss / math.log(2) / chars_per_token,
    }
    for prompt in ("The statement ", "def __init__(self", "import os\n"):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], 1)
        torch.manual_seed(0)
        sample = shipped.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.7, max_new_tokens=60, pad_token_id=0
        )
        report.setdefault("samples", []).append(tokenizer.decode(sample[0, 1:]))
    (args.work / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
