"""A page for people: dialogues with their emotions and causes, in one HTML file that loads nothing from anywhere.

`kdecs predict --html` writes it with predictions in it, and `kdecs serve` sends it empty, to be filled by requests.
All of it is `page.html`, whose script finds the predictions as JSON in the element `data`:

    {"dialogues": [{"id": …, "utterances": [{"speaker": …, "utterance": …}, …], "predictions": [as --offsets]}, …]}

A Content-Security-Policy lets the browser run that script and no other, whatever the texts hold.
"""

import base64
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import resources
from typing import Any

from kdecs.corpus.schema import Dialogue
from kdecs.student.predict.streaming import PairPrediction, offsets_of

_NO_DATA = '<script type="application/json" id="data">null</script>'


class PageWriter:
    """Writes a page with predictions, dialogue by dialogue, so that memory does not grow with their number."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        head, _, self._tail = (
            _template().replace("POLICY", content_security_policy(), 1).partition("null</script>")
        )
        self._write(f'{head}{{"dialogues": ['.encode())
        self._separator = ""

    def add(self, dialogue: Dialogue, found: Iterable[PairPrediction]) -> None:
        """Write one dialogue."""
        self._write(f"{self._separator}{_in_script(page_record(dialogue, found))}".encode())
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
    return _template().replace("POLICY", content_security_policy(asks=True), 1)


@functools.cache
def content_security_policy(*more: str, asks: bool = False) -> str:
    """What the page may do: run its own script and style, and, if it `asks`, send requests to its own server."""
    # By hashes, because a file has no server that could give each answer a nonce.
    text = _template()
    script, style = (
        content_hash(re.findall(rf"(?s)<{tag}>(.*?)</{tag}>", text)) for tag in ("script", "style")
    )
    parts = ["default-src 'none';", *(["connect-src 'self';"] if asks else [])]
    parts += ["img-src data:;", f"script-src '{script}';", f"style-src '{style}';"]
    return " ".join([*parts, "base-uri 'none'; form-action 'none'", *(f"; {part}" for part in more)])


@functools.cache
def _template() -> str:
    text = (resources.files("kdecs.student.predict") / "page.html").read_text(encoding="utf-8")
    assert text.count(_NO_DATA) == 1
    return text


def content_hash(found: list[str]) -> str:
    """How a Content-Security-Policy names the one script or style that was found."""
    [content] = found
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _in_script(value: object) -> str:
    """JSON that no text in it can end the script element of."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")
