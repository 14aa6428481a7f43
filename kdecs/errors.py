"""Typed errors for what a user, a file or a cluster can cause.

Every message is one line: the path or id, what was found, what was expected, and what to do.
Entries print it on stderr and exit with `exit_code`; only bugs of kdecs itself end in a traceback.
"""

import errno

EXIT_REFUSED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 143  # 128 + SIGTERM: what schedulers read as "preempted", not as "failed"


class KdecsError(Exception):
    """An error that the user can act on; its message is one line."""

    exit_code = EXIT_REFUSED


class ConfigError(KdecsError):
    """A config file or `--set` that does not parse, or a value out of range."""


class CorpusError(KdecsError):
    """A corpus file that is missing or breaks the schema."""


class ArtifactError(KdecsError):
    """An artifact directory that is missing, unfinished, damaged or of another kind."""


class LabelError(KdecsError):
    """Soft labels that do not cover the pairs they are needed for, or are not finite."""


class PredictionError(KdecsError):
    """A prediction file that breaks its format or does not fit the corpus."""


class ModelError(KdecsError):
    """A model or tokenizer that cannot be loaded or lacks what the method needs."""


class DeviceError(KdecsError):
    """A requested device that is not available."""


class TrainingError(KdecsError):
    """Training that cannot continue, for example after a loss that is not finite."""


class DependencyError(KdecsError):
    """A command needs an optional package that is not installed."""


class Stopped(KdecsError):
    """A stop by SIGTERM or SIGINT. The state is saved, and the same command resumes from it."""

    exit_code = EXIT_STOPPED


def explain_disk_full(error: Exception) -> str | None:
    """One line if a library's own error hides a full disk (safetensors, torch's checkpoint writer), else None."""
    # Neither library keeps the errno: safetensors has its own type of error, torch raises a RuntimeError.
    message = str(error)
    if "No space left on device" in message or "PytorchStreamWriter failed writing" in message:
        return "the disk is full: free some space and run the same command again"
    return None


def explain_os_error(error: OSError) -> str | None:
    """One line for an operating-system error that a user can act on, else None."""
    place = f" at {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"the disk is full{place}: free some space and run the same command again"
    if error.errno == errno.EDQUOT:
        return f"the disk quota is used up{place}: free some space and run the same command again"
    if error.errno == errno.EROFS:
        return f"the file system is read-only{place}: choose another output directory"
    if isinstance(error, PermissionError):
        return f"permission denied{place}: check the owner of the path"
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | FileExistsError):
        return f"{error.strerror}{place}"
    return None  # any other may be a bug of kdecs, whose traceback is needed
