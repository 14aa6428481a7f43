"""The corpora behind a label directory: which files were labelled, and their pairs in batches of bounded length."""

import contextlib
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdecs.artifact import Manifest, content_checksum
from kdecs.config import CONFIG_NAME, files_of
from kdecs.corpus.pairs import Pair, Universe, pairs_of
from kdecs.corpus.reading import iter_dialogues
from kdecs.corpus.schema import NO_TABLE, map_dialogue
from kdecs.errors import ArtifactError
from kdecs.soft_labels.format import SPLITS

BATCH_PAIRS = 8192
_MAX_CONFIG_BYTES = 1 << 20  # a directory from elsewhere could hold a config that fills the memory


def labelled_corpora(directory: Path, manifest: Manifest) -> list[Path]:
    """The corpus files that a directory's `config.json` names and that are still as they were labelled, by split.

    A directory from elsewhere may name any path, so a file is only hashed until its checksum agrees with the manifest's
    inputs. A config or file that cannot be read is ignored.
    """
    values: dict[str, Any] = {}
    path = directory / CONFIG_NAME
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= _MAX_CONFIG_BYTES:
            found = json.loads(path.read_bytes())
            values = found if isinstance(found, dict) else {}
    # Imports and combinations name their corpus files at the top level of their config, exports in `corpus`.
    names = values.get("corpus", values)
    corpora = []
    for split in SPLITS if isinstance(names, dict) else ():
        found = names.get(split)
        for number, name in enumerate(found if isinstance(found, list) else [found]):
            # As `input_checksums` names several files of a split.
            expected = manifest.inputs.get(f"corpus_{split}_{number}" if number else f"corpus_{split}")
            if not isinstance(name, str) or expected is None:
                continue
            corpus = Path(name)
            with contextlib.suppress(OSError, ValueError, ArtifactError):
                if corpus.is_file() and content_checksum(corpus) == expected:
                    corpora.append(corpus)
    return corpora


def pair_batches(
    files: Path | tuple[Path, ...],
    universe: Universe,
    candidates_after: int = 0,
    table: Mapping[str, str] = NO_TABLE,
    *,
    labelled: bool = True,
) -> Iterator[list[Pair]]:
    """The pairs of corpus files in their order, BATCH_PAIRS at a time, their emotions mapped by `table`.

    `labelled=False` accepts utterances without emotion and evidence, which have no pairs in fold1. Raises CorpusError
    for a fault.
    """
    dialogues = (
        map_dialogue(dialogue, table)
        for path in files_of(files)
        for dialogue in iter_dialogues(path, labelled=labelled, table=table)
    )
    pairs = itertools.chain.from_iterable(
        pairs_of(dialogue, universe, candidates_after) for dialogue in dialogues
    )
    while batch := list(itertools.islice(pairs, BATCH_PAIRS)):
        yield batch
