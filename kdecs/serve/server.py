"""A student over HTTP with FastAPI: `kdecs serve`.

    POST /v1/predict   one dialogue or a list; the answer has the predictions of `kdecs predict --offsets`
    GET  /health       {"status": "ok"} while the server lives
    GET  /             a page for people (kdecs.student.predict.page)
    GET  /docs         the schema of all this, for people; /openapi.json for programs

Every refusal is {"error": one line}. `kdecs.serve.guard` stands before the application.

Requests that arrive while the student works wait for one thread, which takes dialogues of all of them in turn: pairs
of several requests share a batch, and a list of many dialogues does not hold up a single one for long. Requests with a
dialogue of more than a thousand pairs have another thread.
"""

import asyncio
import copy
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from fastapi import Body, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, SkipValidation
from starlette.exceptions import HTTPException

from kdecs import __version__
from kdecs.corpus.checking import (
    MAX_CHARACTERS,
    MAX_ID_CHARACTERS,
    MAX_UTTERANCES,
    NotJson,
    decode_json,
    shorten,
)
from kdecs.corpus.schema import Dialogue
from kdecs.errors import CorpusError, KdecsError, printable
from kdecs.serve.reference import reference_page
from kdecs.student.predict.page import live_page
from kdecs.student.predict.page import policy as page_policy
from kdecs.student.predict.predictor import Student
from kdecs.student.predict.requests import MAX_DIALOGUES, bounded_dialogues, request_ended
from kdecs.student.predict.streaming import (
    DEFAULT_BATCH_TOKENS,
    PAIRS_PER_GROUP,
    PairPrediction,
    num_candidates,
    offsets_of,
)

logger = logging.getLogger(__name__)

OPEN_PATHS = ("/", "/health")
"""The page holds no secret, and asks for the token; whether the server lives may be asked without it."""
DEFAULT_TIMEOUT_S = 60.0
# Long enough for requests that are sent at the same time, short beside the work for one of them.
_GATHER_S = 0.005

Found = list[tuple[Dialogue, list[PairPrediction]]]


# --- What is sent and answered -----------------------------------------------------------------------------------


class UtteranceIn(BaseModel):
    """One utterance. Further keys, such as those of RECCON's annotation, may be there."""

    model_config = ConfigDict(title="Utterance")

    speaker: str = Field(min_length=1, max_length=MAX_CHARACTERS)
    utterance: str = Field(min_length=1, max_length=MAX_CHARACTERS, description="The text.")
    turn: int | None = Field(None, ge=1, description="Its number from 1, if it is given.")
    emotion: str | None = Field(None, description="Needed only by students that are given the emotions.")


class DialogueIn(BaseModel):
    """One dialogue, as a line of a corpus in JSON lines."""

    model_config = ConfigDict(title="Dialogue")

    utterances: list[UtteranceIn] = Field(min_length=1, max_length=MAX_UTTERANCES)
    id: str | None = Field(None, max_length=MAX_ID_CHARACTERS, description="Comes back with the answer.")


class PairOut(BaseModel):
    """The prediction for one pair of a target and a candidate at or before it."""

    model_config = ConfigDict(title="Pair")

    dialogue_id: str
    target: int = Field(description="The turn whose emotion is explained.")
    candidate: int = Field(description="The turn that may hold the cause.")
    emotion: str | None = Field(description="Of the target.")
    is_cause: bool
    span: str = Field(description="The words in the candidate that are the cause, or an empty text.")
    span_start: int | None = Field(
        description="Where the span begins, in characters of the candidate's text."
    )
    span_end: int | None = Field(description="The first character after the span.")
    score: float = Field(ge=0, le=1, description="How much the candidate looks like a cause.")


class DialogueOut(BaseModel):
    """The predictions for one dialogue."""

    model_config = ConfigDict(title="Predictions")

    id: str
    predictions: list[PairOut]


class Refused(BaseModel):
    """Why a request was not answered."""

    error: str


class Options(BaseModel):
    """What may stand behind the question mark."""

    model_config = ConfigDict(extra="forbid")

    max_distance: int | None = Field(
        None, ge=0, description="Predict only candidates at most this many turns before the target."
    )


# --- The work ----------------------------------------------------------------------------------------------------


class _Unwanted(Exception):
    """Nobody waits any more for what is being predicted."""


@dataclass(eq=False)
class _Job:
    """The dialogues of one request, and what has been found for those that are done."""

    todo: deque[Dialogue]
    max_distance: int | None
    ended: threading.Event
    found: Found = field(default_factory=list)
    result: "Future[Found]" = field(default_factory=Future)

    def fail(self, error: Exception) -> None:
        self.todo.clear()
        self.result.set_exception(error)


class Batcher:
    """One thread that predicts the dialogues of all waiting requests, several requests to a batch."""

    def __init__(self, student: Student, *, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> None:
        self._student = student
        self._batch_tokens = batch_tokens
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name="predict")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Drop what nobody has got yet and wait for the thread's end."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()

    def submit(
        self, dialogues: list[Dialogue], max_distance: int | None, ended: threading.Event
    ) -> "Future[Found]":
        """The future predictions of one request, in order. Its work stops once `ended` is set."""
        job = _Job(deque(dialogues), max_distance, ended)
        job.result.set_running_or_notify_cancel()  # or a server that gives it up would cancel it under the thread
        if not dialogues:
            job.result.set_result([])
            return job.result
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job.result

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._is_stopping)
                if self._is_stopping:
                    for job in self._jobs:
                        job.fail(_Unwanted())
                    return
            # Outside the lock, which requests need in order to come in meanwhile.
            time.sleep(_GATHER_S)
            group = self._next_group()
            if group:
                self._predict(group)
            with self._changed:
                # Whoever has been served stands behind the others now.
                served = {job for job, _ in group}
                waiting = [job for job in self._jobs if job not in served and not job.result.done()]
                waiting += [job for job in self._jobs if job in served and not job.result.done()]
                self._jobs = deque(waiting)

    def _next_group(self) -> list[tuple[_Job, Dialogue]]:
        """Dialogues of about a thousand pairs: in turn one of each request whose distance is that of the first one."""
        with self._changed:
            jobs = list(self._jobs)
        for job in jobs:
            if job.ended.is_set():
                job.fail(_Unwanted())
        wanted = [job for job in jobs if not job.result.done()]
        group: list[tuple[_Job, Dialogue]] = []
        num_pairs = 0
        turns = deque(job for job in wanted if job.max_distance == wanted[0].max_distance)
        while turns:
            job = turns.popleft()
            num_more = num_candidates(len(job.todo[0].utterances), job.max_distance)
            # A long dialogue is predicted alone, so that shorter ones do not wait for it.
            if group and num_pairs + num_more > PAIRS_PER_GROUP:
                continue
            # Without the lock: only this thread takes dialogues off a job.
            group.append((job, job.todo.popleft()))
            num_pairs += num_more
            if job.todo:
                turns.append(job)
        return group

    def _predict(self, group: list[tuple[_Job, Dialogue]]) -> None:
        jobs = list(dict.fromkeys(job for job, _ in group))

        def stop_if_unwanted(num_pairs: int) -> None:
            del num_pairs
            if self._is_stopping or all(job.ended.is_set() for job in jobs):
                raise _Unwanted

        try:
            found = list(
                self._student.stream(
                    [dialogue for _, dialogue in group],
                    max_distance=jobs[0].max_distance,
                    batch_tokens=self._batch_tokens,
                    on_batch=stop_if_unwanted,
                    on_warning=lambda line: logger.warning("%s", printable(line)),
                )
            )
        except BaseException as error:
            # A panic of a tokenizer's Rust code is no Exception, and this thread must live.
            if len(jobs) == 1 or isinstance(error, _Unwanted):
                for job in jobs:
                    job.fail(error if isinstance(error, Exception) else RuntimeError(repr(error)))
                return
            for one in jobs:  # whose request it is that fails
                self._predict([(job, dialogue) for job, dialogue in group if job is one])
            return
        for (job, _), item in zip(group, found, strict=True):
            job.found.append(item)
        for job in jobs:
            if not job.todo:
                job.result.set_result(job.found)


class Batchers:
    """Two batchers of one student: requests with a long dialogue have their own, so that others do not wait for it."""

    def __init__(self, student: Student, *, batch_tokens: int = DEFAULT_BATCH_TOKENS) -> None:
        self._usual, self._long = (Batcher(student, batch_tokens=batch_tokens) for _ in range(2))

    def __enter__(self) -> "Batchers":
        self._usual.start()
        self._long.start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._usual.stop()
        self._long.stop()

    def submit(
        self, dialogues: list[Dialogue], max_distance: int | None, ended: threading.Event
    ) -> "Future[Found]":
        """The future predictions of one request, in order. Its work stops once `ended` is set."""
        most = max((num_candidates(len(one.utterances), max_distance) for one in dialogues), default=0)
        batcher = self._long if most > PAIRS_PER_GROUP else self._usual
        return batcher.submit(dialogues, max_distance, ended)


# --- The application ---------------------------------------------------------------------------------------------


class _StrictRoute(APIRoute):
    """A body is read by the corpus' own decoder, which accepts any bytes and finds repeated keys."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:  # type: ignore[override]
        answer = super().get_route_handler()

        class Strict(Request):
            async def json(self) -> Any:
                try:
                    decoded = await asyncio.to_thread(decode_json, await self.body())
                except NotJson as error:
                    raise HTTPException(
                        400,
                        f"request: found {error.found}, expected {error.expected}: a dialogue or a list of them",
                    ) from None
                if decoded.repeated:
                    key = shorten(decoded.repeated[0].repeated()[0])
                    raise HTTPException(
                        400, f"request: found the key {key} more than once in an object, expected once"
                    )
                return decoded.value

        async def strictly(request: Request) -> Response:
            return await answer(Strict(request.scope, request.receive))

        return strictly


def make_app(batchers: Batchers, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> FastAPI:
    """The application, without the guard that belongs before it."""
    refused: dict[int | str, dict[str, Any]] = {
        400: {"model": Refused, "description": "The body is no JSON"},
        401: {"model": Refused, "description": "The token is missing or another one"},
        403: {"model": Refused, "description": "The Host header is not one of this server"},
        413: {"model": Refused, "description": "The body is too large"},
        415: {"model": Refused, "description": "The body is not declared as application/json"},
        422: {"model": Refused, "description": "A dialogue breaks the schema, or the student cannot read it"},
        503: {
            "model": Refused,
            "description": "Too many requests are waiting: Retry-After says when to come back",
        },
        504: {"model": Refused, "description": f"Not answered within {timeout_s:g} s"},
    }
    app = FastAPI(
        title="kdecs",
        summary="Who feels what in a dialogue, and why",
        version=__version__,
        docs_url=None,  # FastAPI's own pages load scripts from the network; `kdecs.serve.reference` does not
        redoc_url=None,
    )
    app.router.route_class = _StrictRoute

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        line = str(error.detail)
        if error.status_code == 404:
            line = f"there is no {shorten(request.url.path)}; see GET /docs"
        elif error.status_code == 405:
            line = f"{shorten(request.url.path)} does not take {request.method}; see GET /docs"
        return JSONResponse({"error": line}, error.status_code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def refuse_options(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = first["loc"][-1]
        line = (
            "request: found no body, expected a dialogue or a list of them"
            if first["loc"][0] == "body"
            else f"request, {shorten(place)[1:-1]}: found {shorten(first['input'])}, "
            + (
                "expected max_distance alone"
                if first["type"] == "extra_forbidden"
                else "expected an integer from 0"
            )
        )
        return JSONResponse({"error": line}, 422)

    @app.exception_handler(KdecsError)
    async def refuse_dialogue(request: Request, error: KdecsError) -> Response:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(Exception)
    async def own_up(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": "the server has failed at this request; its log says why"}, 500)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        policy = page_policy("frame-ancestors 'none'", asks=True)
        return HTMLResponse(live_page(), headers={"Content-Security-Policy": policy})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def reference(request: Request) -> Response:
        # A copy, because FastAPI keeps the schema for /openapi.json.
        text, policy = reference_page(copy.deepcopy(app.openapi()), str(request.base_url))
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @app.get("/health", summary="Whether the server lives")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.post(
        "/v1/predict",
        summary="Predict who feels what in dialogues, and which utterances are the causes",
        description="A dialogue is answered with one object, a list with a list of the same length and order.",
        response_model=DialogueOut | list[DialogueOut],
        responses=refused,
    )
    async def predict(
        # Described, but not checked, by these models: the corpus' own checks name the dialogue, turn and field.
        body: Annotated[
            SkipValidation[DialogueIn | Annotated[list[DialogueIn], Field(max_length=MAX_DIALOGUES)]], Body()
        ],
        options: Annotated[Options, Query()],
    ) -> Response:
        if isinstance(body, bytes):
            raise HTTPException(415, "request: expected the header Content-Type: application/json")
        rows: list[Any] = body if isinstance(body, list) else [body]
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                place = f"item {number}" if isinstance(body, list) else "request"
                raise CorpusError(
                    f"{place}: found {shorten(row)}, expected a dialogue: an object with a list `utterances`"
                )
        dialogues = await asyncio.to_thread(
            bounded_dialogues, rows, options.max_distance, word="item", first=1
        )
        job = batchers.submit(dialogues, options.max_distance, request_ended.get() or threading.Event())
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(job), timeout_s)
        except TimeoutError:
            raise HTTPException(
                504,
                f"request: not answered within {timeout_s:g} s; send fewer pairs at a time, set max_distance, or start "
                "the server with a longer --timeout",
            ) from None
        except _Unwanted:  # nobody reads this
            raise HTTPException(503, "request: the server stops, or its client has left") from None
        return Response(
            await asyncio.to_thread(_encoded, found, is_list=isinstance(body, list)),
            media_type="application/json",
        )

    return app


def _encoded(found: Found, *, is_list: bool) -> bytes:
    answers = [
        {
            "id": dialogue.id,
            "predictions": [{**asdict(item.prediction), **offsets_of(item)} for item in items],
        }
        for dialogue, items in found
    ]
    return json.dumps(answers if is_list else answers[0], ensure_ascii=False).encode()
