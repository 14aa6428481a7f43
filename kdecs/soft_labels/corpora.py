"""The pairs of corpus files as labels need them: in bounded batches, one dialogue in memory where lines are read."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kdecs.artifact import Manifest, content_checksum
from kdecs.config import CONFIG_NAME
from kdecs.corpus.pairs import Pair, Universe, pairs_of
from kdecs.corpus.reading import iter_dialogues
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


PAIRS_A_BATCH = 8192


def pairs_of_file(path: Path, universe: Universe) -> Iterator[Pair]:
    """The pairs of a labelled corpus file in its order. Raises CorpusError at the first fault."""
    for dialogue in iter_dialogues(path):
        yield from pairs_of(dialogue, universe)


def batches_of(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Pairs in lists of a bounded length."""
    pairs = iter(pairs)
    while batch := list(itertools.islice(pairs, PAIRS_A_BATCH)):
        yield batch
