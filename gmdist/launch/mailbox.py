"""What the driver and its workers tell each other, through an actor between them.

The actor's process imports this file and what it sends: without torch it is there in a second.
"""

from dataclasses import dataclass, field

from gmdist.train.hooks import Progress


@dataclass
class Failure:
    """Why a worker failed."""

    kind: str  # the error's class
    message: str
    trace: str


@dataclass
class News:
    """What workers have said since the last look."""

    progress: Progress | None = None
    messages: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


class Mailbox:
    """An actor between the driver and its workers: progress one way, the request to stop the other."""

    def __init__(self) -> None:
        self._news = News()
        self._stop = False

    def exchange(self, progress: Progress | None, messages: list[str]) -> bool:
        """A worker's news; answers whether it should stop."""
        self._news.progress = progress or self._news.progress
        self._news.messages += messages
        return self._stop

    def fail(self, failure: Failure) -> None:
        """A worker's last words."""
        self._news.failures.append(failure)

    def collect(self) -> News:
        """The driver takes what has come."""
        news, self._news = self._news, News()
        return news

    def stop_requested(self) -> bool:
        """Whether the driver has asked for it."""
        return self._stop

    def request_stop(self) -> None:
        """Ask the workers to save and return."""
        self._stop = True
