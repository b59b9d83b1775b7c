"""A progress bar for many requests: requests done and tokens per second, on stderr."""
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


class Progress:
    """Counts requests and tokens; silent where stderr is not a terminal."""

    def __init__(self, requests: int):
        console = Console(stderr=True)
        self._bar = RichProgress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                                 TextColumn("{task.fields[rate]}"), console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("requests", total=requests, rate="")
        self._tokens, self._start = 0, time.monotonic()
        self._bar.start()

    def token(self, event) -> None:
        """One more token."""
        self._tokens += event.token is not None
        if self._tokens % 16 == 0:
            rate = self._tokens / max(time.monotonic() - self._start, 1e-9)
            self._bar.update(self._task, rate=f"{rate:.0f} tokens/s")

    def request(self) -> None:
        """One more request done."""
        self._bar.advance(self._task)

    def close(self) -> None:
        """Takes the bar off the screen."""
        self._bar.stop()
