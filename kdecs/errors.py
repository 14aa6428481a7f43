"""Typed errors for what a user, a file or a cluster can cause.

Every message is one line: the path or id, what was found, what was expected, and what to do.
Entries print it on stderr and exit with `exit_code`; only bugs of kdecs itself end in a traceback.
"""

import errno
import re

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


class OutputError(KdecsError):
    """An output that cannot be written to, or that is an input of the same command."""


class LabelError(KdecsError):
    """Soft labels that do not cover the pairs they are needed for, or are not finite."""


class PredictionError(KdecsError):
    """A prediction file that breaks its format or does not fit the corpus."""


class ModelError(KdecsError):
    """A model or tokenizer that cannot be loaded or lacks what the method needs."""


class DialogueError(CorpusError, ModelError):
    """A valid dialogue that this model cannot read, such as a speaker's name that leaves no room for the texts."""


class DeviceError(KdecsError):
    """A requested device that is not available."""


class RankError(KdecsError):
    """The ranks of a job do not find each other, or one of them is lost."""


class TrainingError(KdecsError):
    """Training that cannot continue, for example after a loss that is not finite."""


class TrackingError(KdecsError):
    """MLflow does not answer somebody who waits for it."""


class EndpointError(KdecsError):
    """A model behind an endpoint that does not answer, or not as it should."""


class AnnotationError(KdecsError):
    """Labels of annotators that leave something open."""


class DependencyError(KdecsError):
    """A command needs an optional package that is not installed."""


class Stopped(KdecsError):
    """A stop by SIGTERM or SIGINT. The state is saved, and the same command resumes from it."""

    exit_code = EXIT_STOPPED


# C0 and C1 control characters, and those that reverse the direction of the text after them.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_MAX_REASON = 400  # characters: a reason may quote a file
_DISK_FULL = "the disk is full{}: free some space and run the same command again"
_FILE_TOO_LARGE = (
    "a file would be larger than this shell or file system allows{}: raise the limit (ulimit -f), or write to another "
    "disk, and run the same command again"
)
_OS_ERRORS = {
    errno.ENOSPC: _DISK_FULL,
    errno.EFBIG: _FILE_TOO_LARGE,
    errno.EDQUOT: "the disk quota is used up{}: free some space and run the same command again",
    errno.EROFS: "the file system is read-only{}: choose another output directory",
    errno.ENAMETOOLONG: "a name is too long for the file system{}: choose a shorter one",
    errno.ELOOP: "too many symbolic links{}: they lead in a circle; choose another path",
    errno.EMFILE: "too many open files{}: raise the limit (ulimit -n) and run the same command again",
    errno.EIO: "the disk or its server reports an input/output error{}: check it and run the same command again",
    errno.ESTALE: "the file server has lost a file{}: run the same command again",
    errno.ENXIO: "nothing can be opened{}: choose another path",
    errno.ENODEV: "there is no such device{}: choose another path",
}


def printable(text: str) -> str:
    """Text with each control character as its escape: what a file or a path holds must not steer the terminal."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, for one-line errors."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:_MAX_REASON]


def explain_library_error(error: Exception) -> str | None:
    """One line if a library's own error hides a full disk or a limit (safetensors, torch's writer), else None."""
    # Neither library keeps the errno: safetensors has its own type of error, torch raises a RuntimeError.
    message = str(error)
    if "File too large" in message:
        return _FILE_TOO_LARGE.format("")
    if "No space left on device" in message:
        return _DISK_FULL.format("")
    if "PytorchStreamWriter failed writing" in message:
        return (
            "the disk is full, or a file is larger than this shell allows: free some space or raise the limit "
            "(ulimit -f), and run the same command again"
        )
    return None


def explain_os_error(error: OSError) -> str | None:
    """One line for an operating-system error that a user can act on, else None."""
    place = f" at {error.filename}" if error.filename else ""
    if error.errno in _OS_ERRORS:
        return _OS_ERRORS[error.errno].format(place)
    if isinstance(error, PermissionError):
        return f"permission denied{place}: check the owner of the path"
    if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError | FileExistsError):
        return f"{error.strerror}{place}"
    return None  # any other may be a bug of kdecs, whose traceback is needed
