"""The order of the rows that RECCON released, on which the protocol reccon-released depends.

RECCON's script decides how incorrect positive rows count by the last similar positive row in the file of released
questions. The dialogues of that file do not stand in the order of the annotation files; within a dialogue both orders
are the same.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from kdecs.errors import PredictionError

NEGATIVE_GOLD = "Impossible ≠æ≠æ≠ answer"
"""What the released rows have as the gold answer of a pair that is no cause."""

# Facts of fold 1 (subtask 2, without context). Of the test split only its last dialogue is known here.
_VALIDATION = """
    va_922 va_345 va_607 va_410 va_882 va_86 tr_7847 va_726 va_710 va_371 tr_7729 va_227 tr_7889 va_544 va_32 va_835
    va_926 tr_7751 va_664 va_330 va_347 va_980 tr_7853 va_838 va_977 va_428 va_315 va_474 va_663 va_439 va_727 va_76
    tr_7823 va_848 va_201 va_64 va_856 tr_7980 va_504 va_101 va_212 tr_7961 va_491 va_184 va_829 tr_7727 va_472
"""
_LAST_OF_TEST = "te_291"
KNOWN_ORDER = (*_VALIDATION.split(), _LAST_OF_TEST)
"""Ids of dialogues in the released order; any other dialogue of the same split stands before them."""

_ROW_ID = re.compile(
    r"(?:dailydialog|iemocap)_(\w+?)_utt_\d+_(?:true_cause_utt_\d+_span_\d+|impossible_cause_utt_\d+)"
)
_MAX_FILE_BYTES = 1 << 30


def read_released_order(path: Path) -> tuple[str, ...]:
    """The dialogue ids of a file with RECCON's rows (its CSV or JSON), in the order of their first rows.

    Raises PredictionError, one line, if the file cannot be read or has no row id.
    """
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise PredictionError(
                f"{path}: more than {_MAX_FILE_BYTES:,} bytes, expected one of RECCON's row files"
            )
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise PredictionError(
            f"{path}: {error.strerror or error}, expected one of RECCON's row files"
        ) from None
    # The ids alone: RECCON has published its rows in several layouts, all of which hold these ids.
    order = tuple(dict.fromkeys(_ROW_ID.findall(text)))
    if not order:
        raise PredictionError(
            f"{path}: found no row id such as dailydialog_te_291_utt_1_impossible_cause_utt_1, expected one of "
            "RECCON's row files, such as dailydialog_qa_test_without_context.json"
        )
    return order


def last_similar_is_empty(
    last_of_dialogue: Mapping[str, bool], order: Sequence[str] | None
) -> tuple[bool, bool]:
    """Whether the last similar positive row was predicted "", and whether the order of the rows had to be guessed.

    `last_of_dialogue` says it for the last similar row of each dialogue that has one, in corpus order. Dialogues
    without a known place are taken in that order, which is a guess only where their rows differ.
    """
    place = {name: number for number, name in enumerate(KNOWN_ORDER if order is None else order)}
    if known := [name for name in last_of_dialogue if name in place]:
        return last_of_dialogue[max(known, key=place.__getitem__)], False
    found = list(last_of_dialogue.values())
    return bool(found) and found[-1], len(set(found)) > 1
