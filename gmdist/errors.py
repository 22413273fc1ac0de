"""The errors that are meant for users: one line that says what, where, and what would be right; and exit codes."""

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED = 0, 1, 2, 130


class GmdistError(Exception):
    """A failure that a user can mend. Its message is one line; no traceback is shown for it."""


class ConfigError(GmdistError):
    """Wrong usage or config. Names the key, the value, and what would be valid. Exit code 2."""


def check_int64(key: str, value: int) -> None:
    """ConfigError for an integer that does not fit into 64 bits."""
    if not -(2**63) <= value < 2**63:
        raise ConfigError(f"{key}: {value}; must fit into 64 bits")


class DataError(GmdistError):
    """A data set that is missing, unsound, or not the one that a run was started with. Exit code 1."""


class CheckpointError(GmdistError):
    """A checkpoint that cannot be written, or that does not fit what is to be loaded. Exit code 1."""


class StorageError(GmdistError):
    """A file that cannot be read or written: no space, no permission, no such bucket. Exit code 1."""


class SaveError(CheckpointError, StorageError):
    """A checkpoint that the storage did not take. Exit code 1."""


class DivergedError(GmdistError):
    """Gradients that stay not finite, or a model that gives what is not. Exit code 1."""


class MemoryExceededError(GmdistError):
    """A step that does not fit into the memory. Exit code 1."""


class ClusterLostError(GmdistError):
    """A cluster that does not answer any more, in the middle of a run. Exit code 1."""


class RunFailedError(GmdistError):
    """A run whose workers failed more often than cluster.max_failures allows. Exit code 1."""


class FolderLostError(GmdistError):
    """A folder that another command has taken, as this one did not get to renew its lease. Exit code 1."""
