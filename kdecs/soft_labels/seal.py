"""A checksum of the manifest inside the manifest: what lists every file's sha256 can itself be checked.

`details.seal` is the sha256 of the manifest's canonical JSON without it. A directory is whole where the manifest is
sealed and every file is as it says.
"""

import hashlib
import json
from pathlib import Path

from tqdm import tqdm

from kdecs.artifact import Manifest, is_complete, read_manifest, verify_artifact
from kdecs.errors import ArtifactError

SEAL_KEY = "seal"


def seal(manifest: Manifest) -> Manifest:
    """The manifest with its seal."""
    return manifest.model_copy(update={"details": {**manifest.details, SEAL_KEY: _digest(manifest)}})


def is_sealed(manifest: Manifest) -> bool:
    """Whether the manifest is what its writer sealed; false where it has no seal."""
    return manifest.details.get(SEAL_KEY) == _digest(manifest)


def whole_labels(directory: Path, work_hash: str, *, show_progress: bool = False) -> Manifest | None:
    """The manifest of the finished labels of this very work, every byte read and as it was written; else None.

    None also where the manifest cannot be read: whoever writes the directory says what stands in its way.
    """
    try:
        if not is_complete(directory, "soft-labels", work_hash):
            return None
        manifest = read_manifest(directory, "soft-labels")
        total = sum(entry.bytes for entry in manifest.files)
        disabled = None if show_progress else True
        with tqdm(
            total=total, desc="check labels", unit="B", unit_scale=True, disable=disabled, delay=1
        ) as bar:
            is_whole = is_sealed(manifest) and not verify_artifact(directory, on_bytes=bar.update)
    except ArtifactError:
        return None
    return manifest if is_whole else None


def _digest(manifest: Manifest) -> str:
    values = manifest.model_dump(mode="json")
    values["details"] = {key: value for key, value in values["details"].items() if key != SEAL_KEY}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
