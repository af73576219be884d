"""The command line: `unweave train` and its siblings. One file per command, thin over the library.

Exit status: 0 when it worked, 2 when the input was wrong (one sentence says what), 130 after Ctrl-C, 1 for a bug.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from unweave._errors import UnweaveError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    # On a busy machine OpenMP's threads would burn their time spinning while they wait for each other. Read when
    # torch is imported, which is after this.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import tyro

    from unweave.cli.cache import CacheArgs
    from unweave.cli.convert import ConvertArgs
    from unweave.cli.dashboard import DashboardArgs
    from unweave.cli.demo import DemoArgs
    from unweave.cli.evaluate import EvalArgs
    from unweave.cli.info import InfoArgs
    from unweave.cli.plan import PlanArgs
    from unweave.cli.push import PushArgs
    from unweave.cli.synth import SynthArgs
    from unweave.cli.tokenize import TokenizeArgs
    from unweave.cli.train import TrainArgs

    commands: dict[str, Callable[..., Any]] = {
        "demo": DemoArgs,
        "plan": PlanArgs,
        "train": TrainArgs,
        "eval": EvalArgs,
        "dashboard": DashboardArgs,
        "info": InfoArgs,
        "push": PushArgs,
        "tokenize": TokenizeArgs,
        "cache": CacheArgs,
        "synth": SynthArgs,
        "convert": ConvertArgs,
    }
    args = tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="unweave",
        description="Take a neural network's activations apart into the features they are made of.",
        args=list(arguments) if arguments is not None else None,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        args.run()
    except UnweaveError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt as interrupt:
        return _fail(str(interrupt) or "stopped.", 130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR):
            raise
        where = f" at {error.filename!r}" if error.filename else ""
        return _fail(f"{error.strerror}{where}; files that were being written have been removed.", 2)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"unweave: {message}", file=sys.stderr)
    return status
