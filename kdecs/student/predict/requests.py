"""A request to a served student: its bounds, and how its work learns that nobody waits for it. No torch.

`kdecs serve` and MLflow's scoring server (kdecs.student.pyfunc) share these.
"""

import threading
from contextvars import ContextVar
from typing import Any

from kdecs.corpus.reading import parse_dialogue
from kdecs.corpus.schema import Dialogue
from kdecs.errors import CorpusError
from kdecs.student.predict.streaming import num_candidates

# Of one request. RECCON's largest dialogue has 561 pairs, and two CPU cores predict about 15 pairs per second.
MAX_DIALOGUES = 1_000
MAX_PAIRS = 25_000
MAX_CHARACTERS = 1_000_000  # of texts and speakers

request_ended: ContextVar[threading.Event | None] = ContextVar("request_ended", default=None)
"""Set by a server: the event tells that nobody waits for the answer of this request any more."""


def bounded_dialogues(
    rows: list[Any], max_distance: int | None, *, word: str = "row", first: int = 0
) -> list[Dialogue]:
    """The dialogues of a request. Raises CorpusError if one breaks the schema, or if together they are too large.

    Messages call the rows by `word` and number them from `first`.
    """
    if len(rows) > MAX_DIALOGUES:
        raise CorpusError(
            f"request: found {len(rows):,} dialogues, expected at most {MAX_DIALOGUES:,}; send the rest in others"
        )
    dialogues, num_pairs, num_characters = [], 0, 0
    for number, row in enumerate(rows, start=first):
        place = f"{word} {number}"
        dialogue = parse_dialogue(row, place)
        dialogues.append(dialogue)
        num_pairs += num_candidates(len(dialogue.utterances), max_distance)
        num_characters += sum(len(u.text) + len(u.speaker) for u in dialogue.utterances)
        # After each dialogue, so that what is too large stops before the rest of it is parsed.
        if num_pairs > MAX_PAIRS:
            raise CorpusError(
                f"request: found {num_pairs:,} pairs up to {place}, expected at most {MAX_PAIRS:,}; send fewer "
                "dialogues at a time, or set max_distance"
            )
        if num_characters > MAX_CHARACTERS:
            raise CorpusError(
                f"request: found {num_characters:,} characters up to {place}, expected at most "
                f"{MAX_CHARACTERS:,}; send fewer dialogues at a time, or shorter texts"
            )
    return dialogues
