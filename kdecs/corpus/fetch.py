"""Download RECCON's public annotation files: pinned checksums, resumed where a download was cut off.

A file is complete once it has its final name; what was fetched of it so far stands beside as ".NAME.part".
"""

import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdecs.artifact import sha256_of_file
from kdecs.errors import CorpusError

RECCON_COMMIT = "579ea8a726f6705f7a3a02f7535b8f5595ec35aa"
RECCON_URL = f"https://raw.githubusercontent.com/declare-lab/RECCON/{RECCON_COMMIT}/data/original_annotation"
_BLOCK_BYTES = 1 << 16
_TIMEOUT_S = 30
_NUM_ATTEMPTS = 3


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

Progress = Callable[[int], object]


def fetch(
    file: RemoteFile,
    directory: Path,
    *,
    base_url: str = RECCON_URL,
    on_bytes: Progress = lambda num_bytes: None,
    pause_s: float = 0.5,
) -> bool:
    """Bring one file into a directory; returns False where it is there already, whole.

    A cut download goes on from its ".part" file, now or in a later call. Raises CorpusError, one line, where
    the place cannot be reached, or where the content has another checksum (nothing is kept then).
    """
    path = directory / file.name
    if path.is_file():
        found = sha256_of_file(path)
        if found == file.sha256:
            return False
        raise CorpusError(
            f"{path}: sha256 {found[:12]}…, expected {file.sha256[:12]}…: move the file away and fetch again"
        )
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f".{file.name}.part"
    url = f"{base_url.rstrip('/')}/{file.name}"
    was_resumed = part.is_file() and part.stat().st_size > 0
    _download(url, part, on_bytes, pause_s)
    if sha256_of_file(part) != file.sha256 and was_resumed:
        part.unlink()
        _download(url, part, on_bytes, pause_s)
    found = sha256_of_file(part)
    if found != file.sha256:
        part.unlink()
        raise CorpusError(f"{url}: sha256 {found[:12]}…, expected {file.sha256[:12]}…: not RECCON's file")
    part.replace(path)
    return True


def _download(url: str, part: Path, on_bytes: Progress, pause_s: float) -> None:
    """Append to `part` until the server says that all is there; a broken connection is tried again."""
    for attempt in range(1, _NUM_ATTEMPTS + 1):
        try:
            _download_rest(url, part, on_bytes)
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == _NUM_ATTEMPTS:
                raise _unreachable(url, part, f"HTTP status {error.code}") from None
        except ValueError as error:
            raise CorpusError(f"{url}: {error}, expected a URL such as {RECCON_URL}") from None
        except (OSError, http.client.HTTPException) as error:
            if attempt == _NUM_ATTEMPTS:
                raise _unreachable(url, part, str(getattr(error, "reason", error)) or repr(error)) from None
        else:
            return
        time.sleep(pause_s * attempt)


def _download_rest(url: str, part: Path, on_bytes: Progress) -> None:
    start = part.stat().st_size if part.is_file() else 0
    headers = {"Range": f"bytes={start}-"} if start else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
            return  # nothing beyond what is here
        raise
    with response:
        # A server that ignores the range sends the whole file again.
        resumes = response.status == http.client.PARTIAL_CONTENT
        expected = response.headers.get("Content-Length")
        received = 0
        with part.open("ab" if resumes else "wb") as file:
            while block := response.read(_BLOCK_BYTES):
                file.write(block)
                received += len(block)
                on_bytes(len(block))
    if expected is not None and received < int(expected):
        raise ConnectionError(f"the connection ended after {received} of {expected} bytes")


def _unreachable(url: str, part: Path, reason: str) -> CorpusError:
    kept = f" ({part.stat().st_size} bytes are kept, the same command goes on)" if part.is_file() else ""
    return CorpusError(
        f"{url}: {' '.join(reason.split())}{kept}; without internet here, download the file elsewhere, put it "
        f"into {part.parent} and run this command again: it checks what is there"
    )
