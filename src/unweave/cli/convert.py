"""`unweave convert`: an SAE of one library in the format of another, with a proof that it is still the same SAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unweave._errors import UnweaveError
from unweave.cli.evaluate import there
from unweave.cli.hints import parse
from unweave.cli.output import shown

if TYPE_CHECKING:
    from rich.table import Table

    from unweave.hub import Conversion


@dataclass
class ConvertArgs:
    """Write an SAE in another library's format, and compare both on probe inputs."""

    source: Annotated[tyro.conf.Positional[Path], shown("SOURCE")]
    """Folder or file to read, of any known format."""
    destination: Annotated[tyro.conf.Positional[Path], shown("DESTINATION")]
    """Folder to write; it must not exist yet, or be empty."""
    to: Annotated[str, shown("FORMAT")]
    """Format to write: saelens, sparsify, dictionary_learning, circuit_tracer or saev."""
    from_format: Annotated[str | None, shown("NAME", "the files tell")] = None
    """Format to read."""
    norm_scaling_factor: Annotated[float | None, shown("X", "the files tell")] = None
    """Factor by which inputs were multiplied in training, where no file says it."""
    k: Annotated[int | None, shown("N", "the files tell")] = None
    """Active latents, where no file says it."""
    layer: Annotated[int | None, shown("N", "the only one")] = None
    """Layer, where the folder has several."""

    hint: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], shown("KEY=VALUE")] = ()
    """What the format's files do not say: dict_class, position, repo, scale, or mean (a list, or an npy file). Once for
    each."""

    def run(self) -> None:
        from rich.console import Console

        from unweave.hub import convert

        named = {"norm_scaling_factor": self.norm_scaling_factor, "k": self.k, "layer": self.layer}
        hints = parse(self.hint)
        for name, value in named.items():
            if value is not None and hints.setdefault(name, value) != value:
                raise UnweaveError(f"{name} is {value} and, as a hint, {hints[name]}.")
        result = convert(there(self.source), self.destination, to=self.to, from_format=self.from_format, **hints)
        Console().print(table(result))
        for note in result.notes:
            print(f"note: {note}")
        print(f"saved {self.destination}")


def table(result: Conversion) -> Table:
    """The comparison; differences of codes and outputs are the largest, in units of each probe's largest value."""
    from rich.table import Table

    made = Table(title=f"{result.probes} probe inputs", title_justify="left")
    for name in ("", f"before ({result.source})", f"after ({result.target})", "difference"):
        made.add_column(name, justify="right" if name else "left", no_wrap=not name)
    before, after = result.before, result.after
    made.add_row("active latents", f"{before.l0:.2f}", f"{after.l0:.2f}", f"{result.flipped:.1e} flipped")
    made.add_row("largest code", f"{before.largest_code:.6g}", f"{after.largest_code:.6g}", f"{result.codes:.1e}")
    made.add_row("norm of the output", f"{before.output_norm:.6g}", f"{after.output_norm:.6g}", f"{result.outputs:.1e}")
    made.add_row("reconstruction error", f"{before.error:.6g}", f"{after.error:.6g}", "")
    return made
