"""Let a module return what it returned before, without computing it again.

A model that is run a second time with one activation changed computes the same values as before until it reaches that
activation. Those layers can be skipped: their outputs are recorded in the first run and replayed in the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from unweave.models import Hook


def layers_before(module: nn.Module, hook: Hook) -> list[nn.Module]:
    """The layers that are over when the hook fires, as far as the module tree tells.

    Those are the earlier entries of each `ModuleList` on the hook's path, and the hooked module itself if its output
    is the hook. Whether they truly came before is for `Recording` to see.
    """
    before, parent = [], module
    for part in hook.path.split("."):
        if isinstance(parent, nn.ModuleList):
            before += list(parent)[: int(part)]
        parent = parent.get_submodule(part)
    return [*before, parent] if hook.side == "out" else before


class Recording:
    """The outputs of modules that ran exactly once, and before a point in time.

    Use as a context around a run, and call `stop` at that point.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._outputs: dict[nn.Module, list[Any]] = {module: [] for module in modules}
        self._in_time: set[nn.Module] = set()
        self._hooks = ExitStack()

    def stop(self) -> None:
        """What has run by now may be replayed."""
        self._in_time = {module for module, outputs in self._outputs.items() if outputs}

    def __enter__(self) -> Recording:
        for module in self._outputs:
            handle = module.register_forward_hook(lambda m, args, output: self._outputs[m].append(output))
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    @property
    def outputs(self) -> dict[nn.Module, Any]:
        """What can be replayed: a module that was called again later would not return one fixed value."""
        return {m: outputs[0] for m, outputs in self._outputs.items() if m in self._in_time and len(outputs) == 1}


@contextmanager
def replay(outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Within this context each of these modules returns its output without looking at its input; hooks still fire."""
    with ExitStack() as undo:
        for module, output in outputs.items():
            own = vars(module)  # an instance's own `forward`, which some wrappers set, has to come back
            if "forward" in own:
                undo.callback(own.__setitem__, "forward", own["forward"])
            else:
                undo.callback(own.pop, "forward", None)
            own["forward"] = lambda *args, _output=output, **kwargs: _output
        yield
