"""What people decided, from the files that `kdecs annotate review import` takes.

The page saves one JSON object:

    {"project": "sha256 of dialogues.jsonl", "annotator": "ann", "labels": [lines as in kdecs.annotate.labels]}

Exports of Label Studio (`kdecs.annotate.review.label_studio`) and labelled corpora are taken as well.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kdecs.annotate.labels import Decisions, ReviewedCause, ReviewedTurn, checked_turn
from kdecs.annotate.project import Project
from kdecs.annotate.review.label_studio import decisions_of_export, is_export
from kdecs.corpus.checking import NotJson, decode_json
from kdecs.corpus.pairs import causes_of
from kdecs.corpus.reading import read_corpus
from kdecs.corpus.schema import NEUTRAL, NO_TABLE
from kdecs.errors import CorpusError, PredictionError

NO_USERS: Mapping[str, str] = MappingProxyType({})
_KEYS = {"project", "annotator", "labels"}


def read_review(
    path: Path,
    project: Project,
    annotator: str | None,
    at: str,
    table: Mapping[str, str] = NO_TABLE,
    users: Mapping[str, str] = NO_USERS,
) -> list[Decisions]:
    """The decisions in a file, by annotator: one that the page saved, an export of Label Studio, or a labelled corpus.

    A corpus has neither a name, which `annotator` gives, nor times, which `at` gives. `table` maps those of its labels
    that the project does not have, and `users` gives the annotators of an export by number or e-mail address. Raises
    PredictionError or CorpusError, one line, for a file that does not fit the project.
    """
    config = project.config
    value = _json(path)
    if is_export(value, path):
        return decisions_of_export(value, path, project, annotator, users)
    if users:
        raise PredictionError(
            f"{path}: is no export of Label Studio, whose users alone --annotator USER=NAME names; use --annotator NAME"
        )
    if not (isinstance(value, dict) and value.keys() == _KEYS):
        if annotator is None:
            raise PredictionError(
                f"{path}: is no file that the page saved, and no export of Label Studio; to import a labelled corpus, "
                "say whose labels it holds with --annotator NAME"
            )
        return [Decisions(annotator, _of_corpus(path, project, at, table))]
    if value["project"] != project.texts_sha256:
        raise PredictionError(
            f"{path}: is a review of other dialogues; import it into the project that it was exported from"
        )
    name = annotator or value["annotator"]
    if not isinstance(name, str) or not isinstance(value["labels"], list):
        raise PredictionError(f"{path}: expected the name of an annotator and a list of labels")
    labels = value["labels"]
    lines = [
        checked_turn(item, f"{path}, label {number}", project.dialogues, config.labels, config.causes_after)
        for number, item in enumerate(labels, start=1)
    ]
    return [Decisions(name, lines)]


def _json(path: Path) -> Any:
    """The value in a file of JSON, or None for a file of another kind."""
    try:
        return decode_json(path.read_bytes()).value
    except OSError as error:
        raise PredictionError(f"{path}: {error.strerror}, expected a review or a labelled corpus") from None
    except NotJson:
        return None


def _of_corpus(path: Path, project: Project, at: str, table: Mapping[str, str]) -> list[ReviewedTurn]:
    config = project.config
    lines = []
    for dialogue in read_corpus(path, table={**table, **config.label_table}, log=False).dialogues:
        known = project.dialogues.get(dialogue.id)
        if known is None:
            continue
        if known.context_hashes != dialogue.context_hashes:
            raise CorpusError(f"{path}: the dialogue {dialogue.id} has other texts than in this project")
        for utterance in dialogue.utterances:
            emotion = str(utterance.emotion)
            if emotion not in config.labels:
                emotion = table.get(emotion, emotion)
            if emotion not in config.labels:
                raise PredictionError(
                    f"{path}, dialogue {dialogue.id}, turn {utterance.turn}: the emotion {emotion}, expected one of "
                    f'{", ".join(config.labels)}; a table such as {{"{emotion}": "{config.labels[0]}"}} maps it: '
                    "--table FILE"
                )
            longest: dict[int, str] = {}
            for _, turn, span in causes_of(utterance, config.causes_after):
                if len(span) > len(longest.get(turn, "")):
                    longest[turn] = span
            is_decided = emotion == NEUTRAL or utterance.evidence is not None
            causes = [ReviewedCause(turn=turn, span=longest[turn]) for turn in sorted(longest)]
            line = ReviewedTurn(
                dialogue_id=dialogue.id,
                turn=utterance.turn,
                emotion=emotion,
                causes=([] if emotion == NEUTRAL else causes) if is_decided else None,
                at=at,
            )
            place = f"{path}, dialogue {dialogue.id}"
            checked_turn(line.model_dump(), place, project.dialogues, config.labels, config.causes_after)
            lines.append(line)
    if not lines:
        raise CorpusError(f"{path}: holds no dialogue of this project")
    return lines
