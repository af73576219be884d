"""What setting a residual stream of the shipped model to zero costs, on held-out text: numbers of its card.

python scripts/ablate_demo_model.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from unweave.activations import DataConfig, TokenRows
from unweave.models import load_model, resolve_hooks, splice

ROWS = 256


@torch.no_grad()
def loss(module: nn.Module, ids: Tensor) -> float:
    """Mean next-token cross-entropy in nats."""
    total = 0.0
    for rows in ids.split(64):
        logits = module(input_ids=rows).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / ids[:, 1:].numel()


def main() -> None:
    model = load_model("demo")
    ids = TokenRows("stdlib", model.tokenizer, DataConfig(), held_out=True).next_rows(ROWS).ids
    clean = loss(model.module, ids)
    print(f"{ROWS} held-out rows of {ids.shape[1]} tokens; nothing ablated: {clean:.2f} nats per token\n")
    print("| hook | cost of zero, nats per token |\n|---|---|")
    for hook in resolve_hooks(model.module, ["resid_pre.0", "resid_post.*"]):
        with splice(model.module, {hook: torch.zeros_like}):
            print(f"| `{hook}` | {loss(model.module, ids) - clean:.2f} |")


if __name__ == "__main__":
    main()
