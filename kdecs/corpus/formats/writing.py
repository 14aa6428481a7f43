"""Write dialogues in another format (`kdecs corpus convert`), and say what it cannot hold.

Values that a schema does not know stay where the target has a place for them: all three targets are JSON, so the free
keys of utterances are kept.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from kdecs.corpus.checking import EVIDENCE_KEY, OUTSIDE, SPAN_KEY, WHOLE_UTTERANCE, is_unicode
from kdecs.corpus.formats.semeval import LABELS, PAIRS_KEY, conversation_id
from kdecs.corpus.schema import EMOTION_VARIANTS, NEUTRAL, Dialogue
from kdecs.errors import CorpusError

Target = Literal["reccon", "jsonl", "semeval"]
_FRAMES: dict[Target, tuple[str, str, str]] = {
    "reccon": ("{\n", ",\n", "\n}\n"),
    "jsonl": ("", "\n", "\n"),
    "semeval": ("[\n", ",\n", "\n]\n"),
}
_OWN_KEYS = {"turn", "speaker", "utterance", "emotion", EVIDENCE_KEY, SPAN_KEY}


class DialogueWriter:
    """Turns dialogues into the text of one format; `losses` says afterwards what it could not hold, with counts."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._lost: Counter[str] = Counter()

    @property
    def losses(self) -> list[str]:
        """One sentence for each kind of value that the written file lacks or changes."""
        return [f"{what}: {count:,}" for what, count in sorted(self._lost.items())]

    def text(self, dialogues: Iterable[tuple[Dialogue, Any]]) -> Iterator[str]:
        """The pieces of the file. Each dialogue comes with its raw utterances, which hold the free keys.

        Raises CorpusError for a free key that JSON cannot hold.
        """
        first, between, last = _FRAMES[self._target]
        yield first
        is_first = True
        for dialogue, raw in dialogues:
            written = (
                self._semeval(dialogue, raw) if self._target == "semeval" else self._reccon(dialogue, raw)
            )
            yield ("" if is_first else between) + written
            is_first = False
        yield last

    def _reccon(self, dialogue: Dialogue, raw: Any) -> str:
        utterances = []
        for said, values in zip(dialogue.utterances, raw, strict=True):
            written = dict(values)
            # A label of the source's own, such as joy, would be refused here; a misspelt one is replaced as before.
            if said.emotion is not None and written["emotion"] not in EMOTION_VARIANTS:
                written["emotion"] = said.emotion
            if SPAN_KEY in written:
                causes = list(self._reccon_causes(dialogue, written[EVIDENCE_KEY], written[SPAN_KEY]))
                written |= {
                    EVIDENCE_KEY: [turn for turn, _ in causes],
                    SPAN_KEY: [span for _, span in causes],
                }
            utterances.append(written)
        if self._target == "jsonl":
            return _json({"id": dialogue.id, "utterances": utterances}, dialogue)
        return f"{json.dumps(dialogue.id)}: {_json([utterances], dialogue)}"

    def _reccon_causes(
        self, dialogue: Dialogue, turns: list[Any], spans: list[Any]
    ) -> Iterator[tuple[Any, Any]]:
        for turn, span in zip(turns, spans, strict=True):
            text = span
            if span is WHOLE_UTTERANCE:
                self._lost["causes without a span, which this format needs, get their whole utterance"] += 1
                text = dialogue.utterances[turn - 1].text
            if text == OUTSIDE and turn != OUTSIDE:
                self._lost[
                    'causes with the span "b", which here stands for a cause outside the dialogue, are left out'
                ] += 1
            else:
                yield turn, text

    def _semeval(self, dialogue: Dialogue, raw: Any) -> str:
        """A conversation, with the key of the pairs if its causes are annotated."""
        conversation, pairs = [], []
        for said, values in zip(dialogue.utterances, raw, strict=True):
            written: dict[str, Any] = {"utterance_ID": said.turn, "text": said.text, "speaker": said.speaker}
            label = said.emotion
            if label is not None:
                label = LABELS.get(label, label)
                if label != said.emotion and (said.emotion, label) != ("happiness", "joy"):
                    self._lost[f"the emotion {said.emotion} is written as {label}"] += 1
                written["emotion"] = label
            conversation.append(written | {k: v for k, v in values.items() if k not in _OWN_KEYS})
            for cause in said.evidence or ():
                if cause.turn is None:
                    self._lost["causes outside their dialogue are left out"] += 1
                elif label is None:
                    self._lost["causes of utterances without an emotion are left out"] += 1
                else:
                    pairs.append(
                        [
                            f"{said.turn}_{label}",
                            f"{cause.turn}_{cause.span}" if cause.span else str(cause.turn),
                        ]
                    )
            if label not in (None, NEUTRAL) and said.evidence is None and _has_evidence(dialogue):
                self._lost[
                    "emotional utterances whose causes are not annotated appear as utterances without causes"
                ] += 1
        identifier = conversation_id(dialogue)
        if isinstance(identifier, str):
            self._lost["ids of dialogues stay texts, where the task has numbers"] += 1
        record: dict[str, Any] = {"conversation_ID": identifier, "conversation": conversation}
        # Neutral utterances alone have no evidence key in RECCON either.
        if _has_evidence(dialogue) or all(u.emotion == NEUTRAL for u in dialogue.utterances):
            record[PAIRS_KEY] = pairs
        return _json(record, dialogue)


def _has_evidence(dialogue: Dialogue) -> bool:
    return any(utterance.evidence is not None for utterance in dialogue.utterances)


def _json(value: Any, dialogue: Dialogue) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise CorpusError(
            f"dialogue {dialogue.id}: found a number in a key beside the schema's that JSON cannot hold, expected one "
            "of at most 18 digits; remove the key"
        ) from None
    return text if is_unicode(text) else json.dumps(value)
