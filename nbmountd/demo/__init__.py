"""`nbmountd demo`: the main job shown from end to end on a remote of its own, with every claim checked.

It needs the packages of the `demo` extra. The product imports nothing from here.
"""

from __future__ import annotations

from pathlib import Path


def run_demo(*, keep: bool = False, stop: bool = False, directory: Path | None = None) -> int:
    """Runs the demo in `directory` (default: `.demo` here) and returns its exit status: 0 only if every check held.

    `keep` leaves server and mount running in the end; `stop` only ends what an earlier run left. What an earlier run
    left, however it ended, is cleaned first in any case. Ctrl-C cleans up and gives 130.
    """
    from nbmountd.demo.stage import Stage, StageError

    try:
        with Stage(directory or Path(".demo")) as stage:
            if stop:
                return stage.say_stopped()
            from nbmountd.demo.show import Show

            return Show(stage).run(keep=keep)
    except StageError as error:
        from rich.console import Console

        Console(stderr=True).print(f"[red]{error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
