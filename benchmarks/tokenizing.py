"""How much slower than the tokenizer by itself is making a token folder? And how fast are the others?

    .venv-oracles/bin/python benchmarks/tokenizing.py --write

Each contestant turns the same documents, standard library text in a `.jsonl` file, into token ids. *unweave* reads and
parses the file, splits off the held-out documents, tokenises, packs, writes, flushes and checks its folder, in one
process; the bare tokenizer gets the documents as a list of strings that lies ready and returns what it returns, by
`encode_batch_fast` on all of them, which is the fastest call there is. sae-lens takes part where it is installed.
`--write` puts the tables into `benchmarks/results/tokenizing.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import measure
from unweave import tokenize
from unweave.activations import standard_library_text
from unweave.models import DEMO
from unweave.models.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALLOWED = 1.3
CHARS = 4000
GPT2_TOKENS = 50257
Contestant = Callable[[object], object]


def documents(characters: int) -> Iterator[str]:
    """Text in documents of at most 4000 characters, as from the web."""
    for text in standard_library_text():
        for start in range(0, len(text), CHARS):
            yield text[start : start + CHARS]
            characters -= CHARS
            if characters <= 0:
                return


def gpt2_like(texts: list[str], folder: Path) -> PreTrainedTokenizerBase:
    """A byte-level BPE with GPT-2's pattern and vocabulary size, trained on the text itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=GPT2_TOKENS, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    model.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<|endoftext|>").save_pretrained(folder)
    return load_tokenizer(folder)


def contestants(
    tokenizer: PreTrainedTokenizerBase, name: str, texts: list[str], data: Path, scratch: Path, processes: int
) -> dict[str, Contestant]:
    """What is timed, by name."""
    backend: Any = tokenizer.backend_tokenizer

    def ours(n: int) -> Contestant:
        def run(_: object) -> None:
            shutil.rmtree(scratch / "ours", ignore_errors=True)
            tokenize(data, scratch / "ours", tokenizer=tokenizer, processes=n)

        return run

    found: dict[str, Contestant] = {
        "tokenizer alone, `encode_batch_fast`": lambda _: backend.encode_batch_fast(texts, add_special_tokens=False),
        "transformers, `tokenizer(texts)`": lambda _: tokenizer(texts, add_special_tokens=False, verbose=False),
        "unweave": ours(1),
    }
    if processes > 1:
        found[f"unweave, {processes} processes"] = ours(processes)
    if find_spec("sae_lens"):
        found["sae-lens"] = sae_lens_runner(name, data, scratch)
    return found


def sae_lens_runner(tokenizer: str, data: Path, scratch: Path) -> Contestant:
    """Its `PretokenizeRunner` at its defaults but one process, like the others, and a folder to save to."""
    import datasets
    from sae_lens import PretokenizeRunner, PretokenizeRunnerConfig

    datasets.disable_caching()
    datasets.disable_progress_bars()
    config = PretokenizeRunnerConfig(
        tokenizer_name=tokenizer, dataset_path="json", data_files=[str(data)], num_proc=1, context_size=128,
        save_path=str(scratch / "theirs"),
    )  # fmt: skip

    def run(_: object) -> None:
        shutil.rmtree(scratch / "theirs", ignore_errors=True)
        PretokenizeRunner(config).run()

    return run


def rounds_of(timed: dict[str, Contestant], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds (of all threads of this process) of each contestant, by round, after one to warm up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for i in range(rounds + 1):
        for name in list(timed) if i % 2 else reversed(timed):
            function, started = timed[name], time.process_time()
            seconds = measure.seconds(lambda function=function: function(None))  # type: ignore[misc]
            if i:
                times[name].append((seconds, time.process_time() - started))
    return times


def median_ratio(
    times: list[tuple[float, float]], alone: list[tuple[float, float]], which: int
) -> tuple[float, float, float]:
    """How many times as long as the bare tokenizer in the same round: median, least and most."""
    ratios = [mine[which] / bare[which] for mine, bare in zip(times, alone, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=["demo", "gpt2"], help="one of the two tokenizers; by default both")
    parser.add_argument("--processes", type=int, default=1, help="also time unweave with so many processes")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/tokenizing.md")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    threads = os.environ.setdefault("RAYON_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    texts = list(documents(args.megabytes * 1_000_000))
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch, data = Path(folder), Path(folder) / "text.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        gpt2 = scratch / "gpt2"
        made = {"demo": lambda: (load_tokenizer(DEMO), str(DEMO)), "gpt2": lambda: (gpt2_like(texts, gpt2), str(gpt2))}
        for tokenizer, name in (made[which]() for which in ([args.only] if args.only else made)):
            size = len(tokenizer)
            n = sum(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))
            times = rounds_of(contestants(tokenizer, name, texts, data, scratch, args.processes), args.rounds)
            alone = next(iter(times.values()))
            for contestant, each in times.items():
                wall, cpu = (statistics.median(column) for column in zip(*each, strict=True))
                middle, least, most = median_ratio(each, alone, 0)
                cells = [f"{wall:.2f}", f"{n / wall / 1e6:.2f}", f"{middle:.2f}×", f"{least:.2f} to {most:.2f}"]
                rows.append([f"{size:,}", contestant, *cells, f"{cpu:.2f}", f"{median_ratio(each, alone, 1)[0]:.2f}×"])
    packages = ["tokenizers", "transformers", *(["sae-lens"] if find_spec("sae_lens") else [])]
    text = "\n\n".join([
        *measure.machine(packages),
        f"{sum(map(len, texts)) / 1e6:.0f} million characters in {len(texts):,} documents, rows of 128 tokens; medians "
        f"of {args.rounds} interleaved runs. unweave and sae-lens read and write files; the first two do neither. "
        f"TOKENIZERS_PARALLELISM={os.environ['TOKENIZERS_PARALLELISM']}, {threads} threads of the tokenizers library "
        "for all of them; unweave is one process unless it says otherwise.",
        measure.table(
            ["vocabulary", "", "s", "million tokens/s", "of the tokenizer's s", "in single rounds", "CPU s",
             "of the tokenizer's CPU s"], rows,
        ),
        f"unweave may take {ALLOWED}× as long as the tokenizer alone: the median of what it took in each round, over "
        "what the tokenizer took in the same. The tokenizer is loaded before, except by sae-lens. "
        "CPU seconds are those of all threads of the process; they are what is left to compare where other programs "
        "keep the processor busy.",
    ])  # fmt: skip
    print(text)
    if args.write:
        measure.write("tokenizing.md", text)


if __name__ == "__main__":
    main()
