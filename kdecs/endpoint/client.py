"""A chat model behind an OpenAI-compatible endpoint: one call, its repetitions, and many calls at a time.

Any server that answers `POST BASE_URL/chat/completions` will do. The client is Python's own. The packages `openai`
(3.57.0) and `tenacity` (9.2.1) were tried in its place, and made this module 40 lines longer for the same guarantees.
`openai` is written for one vendor's server: it sends OPENAI_ORG_ID, OPENAI_CUSTOM_HEADERS and a description of this
machine to whatever server it is given, follows redirects, reads and unpacks replies and errors of any length, cannot
send a lone surrogate, and reports every lost connection as "Connection error.". Undoing this takes more lines than the
package saves. The two would install four packages that nothing else here needs, and their import takes 0.48 s of
processor time and 26 MiB of memory, where this module with all that it imports takes 0.17 s.

What is asked, and where the answers are kept, is up to the caller (`kdecs.endpoint.record`). The key of the server
stands in the headers of its requests alone: no file, log or message shows it.
"""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from kdecs.corpus.checking import NotJson, decode_json
from kdecs.errors import ConfigError
from kdecs.process import StopSignal

CHARACTERS_PER_TOKEN = 4
"""An estimate for English text: the tokenizer of a model behind an endpoint is not known."""
_MAX_REPLY_BYTES = 16 << 20
_MAX_DETAIL = 200  # characters of a server's own message
_MOST_FAILURES_IN_A_ROW = 5
_LONGEST_WAIT_S = 60.0
_WORTH_REPEATING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_SAME_FOR_ALL = (401, 402, 403, 404, 405)
"""Statuses that every other call would get as well: the key, the account, the URL or the model is wrong."""
_Task = TypeVar("_Task")


@dataclass(frozen=True)
class Endpoint:
    """A server and the model on it. `options` are further keys of each request; null leaves a key out."""

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    max_answer_tokens: int = 256
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 60.0
    attempts: int = 6
    per_minute: float = 0.0
    concurrency: int = 4

    def body(self, text: str, *more: Mapping[str, str], **keys: Any) -> dict[str, Any]:
        """The JSON of a request: all that the answer depends on, besides the server.

        `text` is what the user says; `more` are the messages after it, and `keys` further keys of the request.
        """
        values = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}, *more],
            "temperature": 0,
            "max_tokens": self.max_answer_tokens,
            **keys,
            **self.options,
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Cost:
    """Calls that are still to be made, their tokens (estimated, answers at most), and the price in dollars."""

    num_calls: int
    num_recorded: int
    prompt_tokens: int
    answer_tokens: int
    price: float | None

    def __str__(self) -> str:
        price = "" if self.price is None else f", for at most ${self.price:.2f} at the given prices"
        return (
            f"{self.num_calls:,} calls to make ({self.num_recorded:,} are recorded): about {self.prompt_tokens:,} "
            f"prompt tokens (at {CHARACTERS_PER_TOKEN} characters each) and up to {self.answer_tokens:,} answer tokens"
            f"{price}"
        )


def check_url(base_url: str) -> str:
    """A base URL without its last slash. Raises ConfigError for what is none, or holds a user, password or query."""
    try:
        parts = urlsplit(base_url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets without an IPv6 address, or a port that is no number or above 65535
        is_url = False
    # A request line holds neither spaces nor control characters, and urlsplit leaves some of them out in silence.
    if not is_url or " " in base_url or not base_url.isprintable():
        raise ConfigError(
            "--base-url: expected a URL such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        # The URL stands in the record, and may be printed.
        raise ConfigError(
            "--base-url: holds a user, password or query, which would be recorded; leave it out and put the key into "
            "the environment variable that --key-variable names"
        )
    return base_url.rstrip("/")


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text) // CHARACTERS_PER_TOKEN)


def price_of(prompt_tokens: int, answer_tokens: int, prices: tuple[float, float] | None) -> float | None:
    """What tokens cost in dollars. `prices` are dollars per million prompt tokens and answer tokens."""
    return None if prices is None else (prompt_tokens * prices[0] + answer_tokens * prices[1]) / 1e6


class Failure(Exception):
    """A call that has no answer. `is_final`: another attempt would fail, too; `ends_all`: so would other calls."""

    def __init__(
        self,
        reason: str,
        *,
        is_final: bool = False,
        ends_all: bool = False,
        wait_s: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(reason)
        self.is_final, self.ends_all = is_final or ends_all, ends_all
        self.wait_s, self.status = wait_s, status


@dataclass(frozen=True)
class Reply:
    """The text of an answer, and its tokens by the server's count if it gives one."""

    text: str
    prompt_tokens: int | None
    answer_tokens: int | None


Ask = Callable[[Mapping[str, Any]], Reply | None]
"""Makes the call with this body, and repeats it; None if the run is over before it is answered. Raises Failure."""


def work_through(
    endpoint: Endpoint,
    tasks: Iterable[_Task],
    work: Callable[[_Task, Ask], object],
    stop: StopSignal,
    *,
    on_done: Callable[[int], object],
) -> list[Failure]:
    """Do the work of all tasks, several at a time, and return the failures of those that failed.

    A task that fails leaves the others alone, unless its failure would be theirs, too, or five tasks in a row have
    failed. `on_done` is called after each task with the number of failures so far. A stop signal lets the calls in
    progress end and begins no other.
    """
    ends_all = threading.Event()
    pace = _Pace(endpoint.per_minute)
    failures: list[Failure] = []
    num_in_a_row = 0

    def is_over() -> bool:
        return stop.requested or ends_all.is_set()

    def ask(body: Mapping[str, Any]) -> Reply | None:
        return _ask_once_or_more(endpoint, body, pace, is_over)

    def do(task: _Task) -> None:
        if not is_over():
            work(task, ask)

    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        for done in as_completed([pool.submit(do, task) for task in tasks]):
            error = done.exception()
            num_in_a_row = num_in_a_row + 1 if error else 0
            if isinstance(error, Failure):
                failures.append(error)
                # A server that is down must not be asked thousands of times.
                if error.ends_all or num_in_a_row >= _MOST_FAILURES_IN_A_ROW:
                    ends_all.set()
            elif error is not None:
                ends_all.set()
                raise error
            on_done(len(failures))
    return failures


def main_reason(failures: Iterable[Failure]) -> Failure:
    """The failure that says most about a run: one that ends all calls, else the last one."""
    failures = list(failures)
    return next((failure for failure in failures if failure.ends_all), failures[-1])


class _Pace:
    """Spreads requests evenly, so that no more than `per_minute` begin in a minute (0: any number)."""

    def __init__(self, per_minute: float) -> None:
        self._gap_s = 60.0 / per_minute if per_minute else 0.0
        self._next = time.monotonic()
        self._lock = threading.Lock()

    def wait_s(self) -> float:
        """Take the next place, and return how long to wait for it."""
        with self._lock:
            now = time.monotonic()
            place = max(now, self._next)
            self._next = place + self._gap_s
            return place - now


def _ask_once_or_more(
    endpoint: Endpoint, body: Mapping[str, Any], pace: _Pace, is_over: Callable[[], bool]
) -> Reply | None:
    """A call with its repetitions; None if the run is over before it is answered. Raises Failure if none is."""
    for attempt in range(1, endpoint.attempts + 1):
        _sleep(pace.wait_s(), is_over)
        if is_over():
            break
        try:
            return _post(endpoint, body)
        except Failure as failure:
            if failure.is_final or attempt == endpoint.attempts:
                raise
            # Twice as long each time, and never all at once: several calls are turned away together. A server that says
            # how long to wait knows better.
            longest = min(_LONGEST_WAIT_S, 2.0**attempt)
            _sleep(
                random.uniform(longest / 2, longest) if failure.wait_s is None else failure.wait_s, is_over
            )
    return None


def _sleep(seconds: float, is_over: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not is_over():
        time.sleep(min(left, 0.1))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """urllib would repeat a request at the new place with all of its headers, the key among them."""

    def redirect_request(self, *_: Any) -> None:
        """Follow no redirect: it is reported like any other status."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def _post(endpoint: Endpoint, body: Mapping[str, Any]) -> Reply:
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "kdecs"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{endpoint.base_url}/chat/completions", data, headers, method="POST")
    try:
        with _OPENER.open(request, timeout=endpoint.timeout_s) as response:
            reply = response.read(_MAX_REPLY_BYTES + 1)
            length = response.headers.get("Content-Length")
    except urllib.error.HTTPError as error:
        status = error.code
        detail = _without(endpoint.key, _detail(error))
        raise Failure(
            f"HTTP status {status}{detail}",
            is_final=status not in _WORTH_REPEATING,
            ends_all=status in _SAME_FOR_ALL or 300 <= status < 400,
            wait_s=_seconds(error.headers.get("Retry-After")),
            status=status,
        ) from None
    except TimeoutError:
        raise Failure(f"no answer within {endpoint.timeout_s:g} s") from None
    except http.client.IncompleteRead:
        raise Failure("the connection ended in the middle of a reply") from None
    except (OSError, ValueError) as error:  # a connection that ends before the reply is an OSError, too
        reason = _without(endpoint.key, str(getattr(error, "reason", error)) or repr(error))
        raise Failure(reason) from None
    except http.client.HTTPException as error:  # its text is a line of the reply, whatever that holds
        line = _without(endpoint.key, str(error))[:_MAX_DETAIL]
        raise Failure(f"a reply that is not HTTP: {line!r}") from None
    if len(reply) > _MAX_REPLY_BYTES:
        raise Failure(f"a reply of more than {_MAX_REPLY_BYTES:,} bytes")
    # http.client ends a reply that is cut short like a complete one if it is read by length.
    if length is not None and length.isdecimal() and len(reply) < int(length):
        raise Failure(f"the connection ended after {len(reply)} of {length} bytes")
    return _parse_reply(reply)


def _parse_reply(data: bytes) -> Reply:
    """The text of a chat completion. Raises Failure for anything else: no server means to send it."""
    try:
        value = decode_json(data).value
        message = value["choices"][0]["message"]
        text = message.get("content")
        usage = value.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (NotJson, LookupError, TypeError, AttributeError):
        raise Failure("a reply that is no chat completion") from None
    # A model that refuses to answer sends null. That is its answer: asked again it would refuse again.
    if text is not None and not isinstance(text, str):
        raise Failure("a reply whose content is no text")
    prompt_tokens, answer_tokens = (n if type(n) is int and n >= 0 else None for n in counts)
    # A lone surrogate, which JSON can write, is no text that a file can hold.
    clean = (text or "").encode("utf-8", "replace").decode("utf-8")
    return Reply(clean, prompt_tokens, answer_tokens)


def _detail(error: urllib.error.HTTPError) -> str:
    """The server's own words about a status, if it has any."""
    try:
        value = decode_json(error.read(_MAX_REPLY_BYTES)).value
        message = value["error"]["message"] if isinstance(value.get("error"), dict) else value.get("message")
    except (NotJson, OSError, http.client.HTTPException, LookupError, AttributeError):
        return ""
    return (
        f": {' '.join(message.split())[:_MAX_DETAIL]}" if isinstance(message, str) and message.strip() else ""
    )


def _without(key: str | None, text: str) -> str:
    return text.replace(key, "[key]") if key else text


def _seconds(value: str | None) -> float | None:
    """The seconds of a Retry-After header; a date, which few servers send, counts as none."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return min(seconds, _LONGEST_WAIT_S) if seconds >= 0 else None
