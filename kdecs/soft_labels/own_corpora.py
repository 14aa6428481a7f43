"""The corpus files that a label directory was made from, where they still lie on this machine as they were."""

import contextlib
import json
from pathlib import Path
from typing import Any

from kdecs.artifact import Manifest, content_checksum
from kdecs.config import CONFIG_NAME
from kdecs.errors import ArtifactError
from kdecs.soft_labels.format import SPLITS

_MAX_CONFIG_BYTES = 1 << 20


def own_corpora(directory: Path, manifest: Manifest) -> list[Path]:
    """The corpus files that `config.json` names and whose checksums are the manifest's inputs, by split.

    A stranger's directory may name any path: nothing but its checksum is taken from a file that is not the one.
    """
    values = _read_config(directory / CONFIG_NAME)
    corpus = values.get("corpus", values)
    found = []
    for split in SPLITS:
        name = corpus.get(split) if isinstance(corpus, dict) else None
        if isinstance(name, str) and _has_checksum(Path(name), manifest.inputs.get(f"corpus_{split}")):
            found.append(Path(name))
    return found


def _read_config(path: Path) -> dict[str, Any]:
    """A config's values, or none where there is no such thing."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MAX_CONFIG_BYTES:
            values = json.loads(path.read_bytes())
            return values if isinstance(values, dict) else {}
    return {}


def _has_checksum(path: Path, expected: str | None) -> bool:
    with contextlib.suppress(OSError, ValueError, ArtifactError):
        return expected is not None and path.is_file() and content_checksum(path) == expected
    return False
