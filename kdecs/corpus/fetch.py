"""Download RECCON's public annotation files at a pinned commit and check their sha256.

The three files hold 5 MB in all, so a download that breaks off starts again: a file has its final name only once it is
complete and verified, and nothing else is left behind.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdecs.artifact import atomic_path, sha256_of_file
from kdecs.errors import CorpusError

# Pinned, since the checksums below belong to this state of the files.
RECCON_COMMIT = "579ea8a726f6705f7a3a02f7535b8f5595ec35aa"
RECCON_URL = f"https://raw.githubusercontent.com/declare-lab/RECCON/{RECCON_COMMIT}/data/original_annotation"
_BLOCK_BYTES = 1 << 16
_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file by name and sha256 (hex)."""

    name: str
    sha256: str


RECCON_FILES = (
    RemoteFile("dailydialog_train.json", "b05bdc8363a57ecb6f8e7ab5f9e0eba227f0fe24cb9eb70d9e78f96e4a45457a"),
    RemoteFile("dailydialog_valid.json", "e2fdbec102c2463ee86ccc2088d50fdcfe2eba5c6129bf6071476908bf453b1e"),
    RemoteFile("dailydialog_test.json", "0356f0bd2eb8097ff983ff23d9cab5dced525406f3e633d4b24f925f4507c800"),
)


def fetch(
    file: RemoteFile,
    directory: Path,
    *,
    base_url: str = RECCON_URL,
    on_bytes: Callable[[int], object] = lambda num_bytes: None,
) -> bool:
    """Download one file into a directory; returns False if it is already there with the pinned content.

    Raises CorpusError, one line, if the server cannot be reached, the download breaks off, or the content (of the
    download or of a file that was there before) has another checksum.
    """
    path = directory / file.name
    if path.is_file():
        if (found := sha256_of_file(path)) != file.sha256:
            raise CorpusError(
                f"{path}: found the sha256 {found[:12]}…, expected {file.sha256[:12]}…; move the file away and "
                "fetch again"
            )
        return False
    url = f"{base_url.rstrip('/')}/{file.name}"
    try:
        with atomic_path(path) as temporary:
            with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, temporary.open("wb") as target:
                expected, received = response.headers.get("Content-Length"), 0
                while block := response.read(_BLOCK_BYTES):
                    target.write(block)
                    received += len(block)
                    on_bytes(len(block))
            # http.client ends a response that is cut short like a complete one if it is read in blocks.
            if expected is not None and received < int(expected):
                raise ConnectionError(f"the connection ended after {received} of {expected} bytes")
            if (found := sha256_of_file(temporary)) != file.sha256:
                raise CorpusError(
                    f"{url}: found the sha256 {found[:12]}…, expected {file.sha256[:12]}…: this is not RECCON's file"
                )
    except urllib.error.HTTPError as error:
        raise _unreachable(url, path, f"HTTP status {error.code}") from None
    except ValueError as error:  # of urllib, for a URL without a scheme
        raise CorpusError(f"{url}: {error}, expected a URL such as {RECCON_URL}") from None
    except (OSError, http.client.HTTPException) as error:
        raise _unreachable(url, path, str(getattr(error, "reason", error)) or repr(error)) from None
    return True


def _unreachable(url: str, path: Path, reason: str) -> CorpusError:
    return CorpusError(
        f"{url}: {' '.join(reason.split())}; if this machine has no internet access, download the file elsewhere, "
        f"put it into {path.parent} and run this command again, which then checks it"
    )
