"""A page for people: dialogues with their emotions and causes, in one HTML file that loads nothing from anywhere.

`kdecs predict --html` writes it with predictions in it, and `kdecs serve` sends it empty, to be filled by requests.
All of it is `page.html`, whose script finds the predictions as JSON in the element `data`:

    {"dialogues": [{"id": …, "utterances": [{"speaker": …, "utterance": …}, …], "predictions": [as --offsets]}, …]}
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from kdecs.corpus.schema import Dialogue
from kdecs.pages import content_security_policy, json_in_script, page_template
from kdecs.student.predict.streaming import PairPrediction, offsets_of


class PageWriter:
    """Writes a page with predictions, dialogue by dialogue, so that memory does not grow with their number."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        head, _, self._tail = _template().replace("POLICY", policy(), 1).partition("null</script>")
        self._write(f'{head}{{"dialogues": ['.encode())
        self._separator = ""

    def add(self, dialogue: Dialogue, found: Iterable[PairPrediction]) -> None:
        """Write one dialogue."""
        self._write(f"{self._separator}{json_in_script(page_record(dialogue, found))}".encode())
        self._separator = ",\n"

    def close(self) -> None:
        """Write the rest of the page."""
        self._write(f"]}}</script>{self._tail}".encode())


def page_record(dialogue: Dialogue, found: Iterable[PairPrediction]) -> dict[str, Any]:
    """What the page's script shows of one dialogue."""
    return {
        "id": dialogue.id,
        "utterances": [{"speaker": u.speaker, "utterance": u.text} for u in dialogue.utterances],
        "predictions": [{**asdict(item.prediction), **offsets_of(item)} for item in found],
    }


@functools.cache
def live_page() -> str:
    """The page without predictions, which asks the server that it comes from for them."""
    return _template().replace("POLICY", policy(asks=True), 1)


def policy(*more: str, asks: bool = False) -> str:
    """What the page may do (`kdecs.pages.content_security_policy`)."""
    return content_security_policy(_template(), *more, asks=asks)


def _template() -> str:
    return page_template("kdecs.student.predict", "page.html")
