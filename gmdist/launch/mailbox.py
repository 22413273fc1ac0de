"""What the driver and its workers tell each other, through an actor between them.

The actor's process imports this file and what it sends: without torch it is there in a second.
"""

from dataclasses import dataclass, field, replace

from gmdist import errors
from gmdist.train.hooks import Progress


@dataclass
class Failure:
    """Why a worker failed."""

    kind: str  # the error's class: one of gmdist.errors for one that a user can mend
    message: str
    trace: str

    @classmethod
    def of(cls, error: BaseException, trace: str) -> "Failure":
        """An error with its traceback: of a user's all of the message, of another the first line."""
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if isinstance(error, errors.GmdistError):
            return cls(next(name for name in kinds if hasattr(errors, name)), str(error), trace)
        return cls(kinds[0], (str(error).splitlines() or [""])[0], trace)

    def for_user(self) -> errors.GmdistError | None:
        """The error again, if it is one that a user can mend."""
        kind = getattr(errors, self.kind, None)
        return None if kind is None else kind(self.message)


class WorkersFailedError(Exception):
    """The workers of one start have failed."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


@dataclass
class News:
    """What workers have said since the last look."""

    progress: Progress | None = None
    messages: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


@dataclass(frozen=True)
class Wishes:
    """What the driver wants of its workers."""

    stop: bool = False
    end: bool = False  # at once, and without a checkpoint
    num_saves: int = 0  # asked for until now


class Mailbox:
    """An actor between the driver and its workers: progress one way, the request to stop the other."""

    def __init__(self) -> None:
        self._news = News()
        self._wishes = Wishes()

    def exchange(self, progress: Progress | None, messages: list[str]) -> Wishes:
        """A worker's news; answers what the driver wants of it."""
        self._news.progress = progress or self._news.progress
        self._news.messages += messages
        return self._wishes

    def fail(self, failure: Failure) -> None:
        """A worker's last words."""
        self._news.failures.append(failure)

    def collect(self) -> News:
        """The driver takes what has come."""
        news, self._news = self._news, News()
        return news

    def wishes(self) -> Wishes:
        """What the driver has asked for."""
        return self._wishes

    def request_stop(self) -> None:
        """Ask the workers to save and return."""
        self._wishes = replace(self._wishes, stop=True)

    def request_end(self) -> None:
        """Have the workers end, and leave the run's folder as it is."""
        self._wishes = replace(self._wishes, end=True)

    def request_save(self) -> None:
        """Ask the workers to save and go on."""
        self._wishes = replace(self._wishes, num_saves=self._wishes.num_saves + 1)
