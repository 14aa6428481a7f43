"""The ChatGPT row of Table 4: a chat model is asked about every target, with one worked example.

A call is recorded as soon as it is answered (`record`), a failure never. So a run that was stopped, killed or left by
its server goes on where it ended, and no successful call is paid for twice.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kdecs.baselines.generative.answers import few_shot_prompt, gold_answer, labels_of
from kdecs.baselines.generative.record import AnswerRecord, Question, RecordedAnswer
from kdecs.corpus.schema import Dialogue
from kdecs.corpus.splits import text_digest
from kdecs.endpoint.client import Ask, Cost, Endpoint, estimate_tokens, main_reason, price_of, work_through
from kdecs.endpoint.record import call_hash
from kdecs.errors import CorpusError, EndpointError
from kdecs.process import ProgressBar, StopSignal

_EXAMPLE_TURNS = 8


@dataclass(frozen=True)
class FewShot:
    """What a corpus is asked: labels, worked example, targets (dialogue, turn), their texts and the calls."""

    labels: tuple[str, ...]
    example: tuple[Dialogue, int]
    targets: list[tuple[Dialogue, int]]
    texts: list[str]
    questions: list[Question]


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
    prompt_tokens = sum(estimate_tokens(plan.texts[n]) for n in pending)
    answer_tokens = len(pending) * endpoint.max_answer_tokens
    price = price_of(prompt_tokens, answer_tokens, prices)
    return Cost(len(pending), len(plan.questions) - len(pending), prompt_tokens, answer_tokens, price)


def ask_all(endpoint: Endpoint, plan: FewShot, record: AnswerRecord, stop: StopSignal) -> None:
    """Ask what the record does not hold yet, several calls at a time, and record every answer as it comes.

    A call that keeps failing leaves the others alone. Raises EndpointError, at the end if some calls failed, or early
    if all others would fail, too; Stopped after a stop signal, once the calls in progress are answered. Raises
    PredictionError if another run is asking the same questions.
    """
    with record.recording():
        pending = record.pending(plan.questions, endpoint.base_url)
        num_done = len(plan.questions) - len(pending)

        def ask_one(number: int, ask: Ask) -> None:
            if (reply := ask(endpoint.body(plan.texts[number]))) is None:
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

        with ProgressBar(len(plan.questions), initial=num_done, desc="ask", unit="target") as bar:
            failures = work_through(
                endpoint, pending, ask_one, stop, on_done=lambda number: bar.update(failed=str(number))
            )
        num_left = len(record.pending(plan.questions, endpoint.base_url))
    kept = f"{len(plan.questions) - num_left:,} of {len(plan.questions):,} answers are in {record.path}"
    stop.raise_if_requested(f"stopped: {kept}; run the same command again to ask for the others")
    if failures:
        reason = main_reason(failures)
        remedy = (
            "put this right and run the same command again"
            if reason.ends_all
            else "run the same command again to ask for the others, or add --replay to go on without them"
        )
        raise EndpointError(f"{endpoint.base_url}: {len(failures)} calls failed ({reason}); {kept}; {remedy}")
