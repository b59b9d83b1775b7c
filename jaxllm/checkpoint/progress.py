"""A progress bar with bytes per second, as the `progress` argument of `convert` wants it."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(title: str, console: "rich.console.Console | None" = None) -> Iterator[Callable[[int, int], None]]:  # noqa: F821
    """A function (done, total) that moves a bar on `console` (default: standard error) while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
