"""A chat model behind an OpenAI-compatible endpoint, asked about every target with one worked example.

This is the ChatGPT row of Table 4: one question and one turn per target. Any server that answers
`POST BASE_URL/chat/completions` will do. The client is Python's own: the `openai` package would bring ten others for
what is one request, and hides which failures it repeats.

A call is recorded as soon as it is answered (`record`), a failure never. So a run that was stopped, killed or left by
its server goes on where it ended, and no successful call is paid for twice. The key of the server stands in the headers
of its requests alone: no file, log or message shows it.
"""

import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from kdecs.artifact import file_lock
from kdecs.baselines.generative.answers import few_shot_prompt, gold_answer, labels_of
from kdecs.baselines.generative.record import AnswerRecord, Question, RecordedAnswer, call_hash
from kdecs.corpus.checking import NotJson, decode_json
from kdecs.corpus.schema import Dialogue
from kdecs.corpus.splits import text_digest
from kdecs.errors import ConfigError, CorpusError, EndpointError, PredictionError
from kdecs.process import ProgressBar, StopSignal

CHARACTERS_PER_TOKEN = 4
"""An estimate for English text: the tokenizer of a model behind an endpoint is not known."""
_MAX_REPLY_BYTES = 16 << 20
_MAX_DETAIL = 200  # characters of a server's own message
_MOST_FAILURES_IN_A_ROW = 5
_LONGEST_WAIT_S = 60.0
_EXAMPLE_TURNS = 8
_WORTH_REPEATING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_SAME_FOR_ALL = (401, 402, 403, 404, 405)
"""Statuses that every other call would get as well: the key, the account, the URL or the model is wrong."""


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

    def body(self, text: str) -> dict[str, Any]:
        """The JSON of a request: all that the answer depends on, besides the server."""
        values = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self.max_answer_tokens,
            **self.options,
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class FewShot:
    """What a corpus is asked: labels, worked example, targets (dialogue, turn), their texts and the calls."""

    labels: tuple[str, ...]
    example: tuple[Dialogue, int]
    targets: list[tuple[Dialogue, int]]
    texts: list[str]
    questions: list[Question]


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
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
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


def plan_few_shot(
    endpoint: Endpoint,
    dialogues: Sequence[Dialogue],
    training: Sequence[Dialogue],
    *,
    only_annotated: bool = False,
    example: str | None = None,
) -> FewShot:
    """The questions about the targets of a corpus. Raises CorpusError if the training file has no fitting example."""
    labels = labels_of(training)
    shown = find_example(training, example, without={text_digest(dialogue) for dialogue in dialogues})
    targets = [
        (dialogue, utterance.turn)
        for dialogue in dialogues
        for utterance in dialogue.utterances
        if not only_annotated or utterance.evidence is not None
    ]
    texts = [few_shot_prompt(dialogue, target, labels, shown) for dialogue, target in targets]
    questions = [
        Question(dialogue.id, target, call_hash(endpoint.body(text)))
        for (dialogue, target), text in zip(targets, texts, strict=True)
    ]
    return FewShot(labels, shown, targets, texts, questions)


def find_example(
    training: Sequence[Dialogue], wanted: str | None = None, *, without: Collection[bytes] = ()
) -> tuple[Dialogue, int]:
    """The worked example: `wanted` as "dialogue/turn", or the first target whose answer shows all that one may hold.

    That is a target within the first eight turns, with a cause in an earlier turn and one in its own. Dialogues whose
    text is among the digests of `without`, those of the corpus itself, show nothing. Raises CorpusError if there is
    none.
    """
    if wanted is not None:
        name, _, number = wanted.rpartition("/")
        for dialogue in training:
            if dialogue.id == name and number in map(str, range(1, len(dialogue.utterances) + 1)):
                return dialogue, int(number)
        raise CorpusError(f"--example {wanted}: expected DIALOGUE/TURN of the training file, such as tr_1/3")
    second_choice = None
    for dialogue in training:
        if text_digest(dialogue) in without:
            continue
        for turn in range(1, min(_EXAMPLE_TURNS, len(dialogue.utterances)) + 1):
            causes = [cause.turn for cause in gold_answer(dialogue, turn).causes]
            if causes and causes[0] < turn and causes[-1] == turn:
                return dialogue, turn
            if causes and second_choice is None:
                second_choice = dialogue, turn
    if second_choice is None:
        raise CorpusError(
            f"the training file has no target within the first {_EXAMPLE_TURNS} turns of a dialogue that has a cause, "
            "so it holds no example; name another file, or a target with --example"
        )
    return second_choice


def cost_of(
    endpoint: Endpoint, plan: FewShot, pending: Sequence[int], *, prices: tuple[float, float] | None
) -> Cost:
    """What the pending calls cost. `prices` are dollars per million prompt tokens and answer tokens."""
    prompt_tokens = sum(-(-len(plan.texts[n]) // CHARACTERS_PER_TOKEN) for n in pending)
    answer_tokens = len(pending) * endpoint.max_answer_tokens
    price = None
    if prices is not None:
        price = (prompt_tokens * prices[0] + answer_tokens * prices[1]) / 1e6
    return Cost(len(pending), len(plan.questions) - len(pending), prompt_tokens, answer_tokens, price)


def ask_all(endpoint: Endpoint, plan: FewShot, record: AnswerRecord, stop: StopSignal) -> None:
    """Ask what the record does not hold yet, several calls at a time, and record every answer as it comes.

    A call that keeps failing leaves the others alone. Raises EndpointError, at the end if some calls failed, or early
    if all others would fail, too; Stopped after a stop signal, once the calls in progress are answered. Raises
    PredictionError if another run is asking the same questions.
    """
    with file_lock(record.path.with_name(f".{record.path.name}.lock"), blocking=False) as is_ours:
        if not is_ours:
            raise PredictionError(
                f"{record.path}: another run records its answers here, and both would pay for the same calls; wait "
                "until it ends"
            )
        record.read()
        _ask_pending(endpoint, plan, record, stop)


def _ask_pending(endpoint: Endpoint, plan: FewShot, record: AnswerRecord, stop: StopSignal) -> None:
    pending = record.pending(plan.questions, endpoint.base_url)
    ends_all = threading.Event()
    pace = _Pace(endpoint.per_minute)
    failures: list[_Failure] = []
    num_in_a_row = 0

    def is_over() -> bool:
        return stop.requested or ends_all.is_set()

    def ask(number: int) -> None:
        reply = _ask_once_or_more(endpoint, plan.texts[number], pace, is_over)
        if reply is None:
            return
        question = plan.questions[number]
        record.add(
            [
                RecordedAnswer(
                    call=question.call,
                    source=endpoint.base_url,
                    dialogue_id=question.dialogue_id,
                    target=question.target,
                    text=reply.text,
                    prompt_tokens=reply.prompt_tokens,
                    answer_tokens=reply.answer_tokens,
                )
            ]
        )

    with (
        ProgressBar(
            len(plan.questions), initial=len(plan.questions) - len(pending), desc="ask", unit="target"
        ) as bar,
        ThreadPoolExecutor(endpoint.concurrency) as pool,
    ):
        for done in as_completed([pool.submit(ask, number) for number in pending]):
            error = done.exception()
            num_in_a_row = num_in_a_row + 1 if error else 0
            if isinstance(error, _Failure):
                failures.append(error)
                # A server that is down must not be asked thousands of times.
                if error.ends_all or num_in_a_row >= _MOST_FAILURES_IN_A_ROW:
                    ends_all.set()
            elif error is not None:
                ends_all.set()
                raise error
            bar.update(failed=str(len(failures)))
    num_left = len(record.pending(plan.questions, endpoint.base_url))
    kept = f"{len(plan.questions) - num_left:,} of {len(plan.questions):,} answers are in {record.path}"
    stop.raise_if_requested(f"stopped: {kept}; run the same command again to ask for the others")
    if failures:
        reason = next((failure for failure in failures if failure.ends_all), failures[-1])
        remedy = (
            "put this right and run the same command again"
            if reason.ends_all
            else "run the same command again to ask for the others, or add --replay to go on without them"
        )
        raise EndpointError(f"{endpoint.base_url}: {len(failures)} calls failed ({reason}); {kept}; {remedy}")


class _Failure(Exception):
    """A call that has no answer. `is_final`: another attempt would fail, too; `ends_all`: so would other calls."""

    def __init__(
        self, reason: str, *, is_final: bool = False, ends_all: bool = False, wait_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.is_final, self.ends_all, self.wait_s = is_final or ends_all, ends_all, wait_s


@dataclass(frozen=True)
class _Reply:
    text: str
    prompt_tokens: int | None
    answer_tokens: int | None


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
    endpoint: Endpoint, text: str, pace: _Pace, is_over: Callable[[], bool]
) -> _Reply | None:
    """A call with its repetitions; None if the run is over before it is answered. Raises _Failure if none is."""
    for attempt in range(1, endpoint.attempts + 1):
        _sleep(pace.wait_s(), is_over)
        if is_over():
            break
        try:
            return _post(endpoint, endpoint.body(text))
        except _Failure as failure:
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


def _post(endpoint: Endpoint, body: Mapping[str, Any]) -> _Reply:
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
        raise _Failure(
            f"HTTP status {status}{detail}",
            is_final=status not in _WORTH_REPEATING,
            ends_all=status in _SAME_FOR_ALL or 300 <= status < 400,
            wait_s=_seconds(error.headers.get("Retry-After")),
        ) from None
    except TimeoutError:
        raise _Failure(f"no answer within {endpoint.timeout_s:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = _without(endpoint.key, str(getattr(error, "reason", error)) or repr(error))
        raise _Failure(reason) from None
    if len(reply) > _MAX_REPLY_BYTES:
        raise _Failure(f"a reply of more than {_MAX_REPLY_BYTES:,} bytes")
    # http.client ends a reply that is cut short like a complete one if it is read by length.
    if length is not None and length.isdecimal() and len(reply) < int(length):
        raise _Failure(f"the connection ended after {len(reply)} of {length} bytes")
    return _parse_reply(reply)


def _parse_reply(data: bytes) -> _Reply:
    """The text of a chat completion. Raises _Failure for anything else: no server means to send it."""
    try:
        value = decode_json(data).value
        message = value["choices"][0]["message"]
        text = message.get("content")
        usage = value.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (NotJson, LookupError, TypeError, AttributeError):
        raise _Failure("a reply that is no chat completion") from None
    # A model that refuses to answer sends null. That is its answer: asked again it would refuse again.
    if text is not None and not isinstance(text, str):
        raise _Failure("a reply whose content is no text")
    prompt_tokens, answer_tokens = (n if type(n) is int and n >= 0 else None for n in counts)
    # A lone surrogate, which JSON can write, is no text that a file can hold.
    clean = (text or "").encode("utf-8", "replace").decode("utf-8")
    return _Reply(clean, prompt_tokens, answer_tokens)


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
