"""`kdecs baseline prompt` and `kdecs baseline answer`. Slow imports stand inside the functions."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from kdecs.endpoint.options import (
    Attempts,
    Concurrency,
    KeyVariable,
    Options,
    PerMinute,
    Timeout,
    request_options,
)


def prompt(
    corpus: Annotated[
        Path, typer.Option(metavar="FILE", help="Dialogues to predict; labels are not needed.")
    ],
    train: Annotated[
        Path,
        typer.Option(metavar="FILE", help="Training split, for the emotion labels and the worked example."),
    ],
    model: Annotated[str, typer.Option(metavar="NAME", help="Model, as the server names it.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the predictions: JSON lines.")],
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Server, up to the path before /chat/completions, such as https://api.openai.com/v1.",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Record of the model's answers, which a second start goes on with. By default it stands beside the "
            "predictions, as OUTPUT.answers.jsonl.",
        ),
    ] = None,
    key_variable: KeyVariable = "OPENAI_API_KEY",
    targets: Annotated[
        Literal["all", "annotated"],
        typer.Option(
            help="all: every utterance; annotated: those with annotated causes, which fold1 scores."
        ),
    ] = "all",
    example: Annotated[
        str | None,
        typer.Option(
            metavar="DIALOGUE/TURN",
            help="Target of the training split to show as the worked example. By default it is the first one with a "
            "cause in its own turn and in an earlier one.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the number of calls, their tokens and price; ask nothing."),
    ] = False,
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Ask nothing; write the predictions from the recorded answers alone."),
    ] = False,
    input_price: Annotated[
        float | None, typer.Option(min=0, help="Price of a million prompt tokens in dollars, for the cost.")
    ] = None,
    output_price: Annotated[
        float | None, typer.Option(min=0, help="Price of a million answer tokens in dollars, for the cost.")
    ] = None,
    max_answer_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    option: Options = None,
    concurrency: Concurrency = 4,
    per_minute: PerMinute = 0,
    timeout: Timeout = 60,
    attempts: Attempts = 6,
) -> None:
    """Ask a chat model behind an OpenAI-compatible server about every target, with one worked example.

    Every answer is recorded at once. The same command goes on after any stop and pays for no call twice. A table can be
    made again from the record alone, with --replay. The server's key is read from an environment variable.

    Examples:

    kdecs baseline prompt --corpus test.json --train train.json --model gpt-3.5-turbo
    --base-url https://api.openai.com/v1 --output chatgpt.jsonl --dry-run --input-price 0.5 --output-price 1.5

    kdecs baseline prompt --corpus test.json --train train.json --model gpt-3.5-turbo --output chatgpt.jsonl --replay
    """
    if base_url is None and not replay:
        raise typer.BadParameter("--base-url: missing; give the URL of a server, or --replay to ask none")
    if (input_price is None) != (output_price is None):
        raise typer.BadParameter("--input-price and --output-price: give both, or none")
    options = request_options(option)
    from kdecs.baselines.generative.endpoint import ask_all, cost_of, plan_few_shot
    from kdecs.baselines.generative.record import AnswerRecord, read_answers
    from kdecs.corpus.reading import read_corpus
    from kdecs.endpoint.client import Endpoint, check_url
    from kdecs.evaluation.predictions import write_predictions
    from kdecs.output import refuse_inputs
    from kdecs.process import StopSignal, endpoint_key, say

    place = _record_place(answers, output)
    for written in (output, place):
        refuse_inputs(written, [corpus, train])
    url = None if base_url is None else check_url(base_url)
    dialogues = read_corpus(corpus, labelled=targets == "annotated").dialogues
    training = read_corpus(train).dialogues
    endpoint = Endpoint(
        base_url=url or "",
        model=model,
        key=None if replay or dry_run else endpoint_key(key_variable),
        max_answer_tokens=max_answer_tokens,
        options=options,
        timeout_s=timeout,
        attempts=attempts,
        per_minute=per_minute,
        concurrency=concurrency,
    )
    plan = plan_few_shot(
        endpoint, dialogues, training, only_annotated=targets == "annotated", example=example
    )
    record = AnswerRecord(place)
    if not replay:
        prices = None if input_price is None or output_price is None else (input_price, output_price)
        say(
            f"{url}: {cost_of(endpoint, plan, record.pending(plan.questions, endpoint.base_url), prices=prices)}"
        )
        if dry_run:
            return
        stop = StopSignal()
        stop.install()
        ask_all(endpoint, plan, record, stop)
    outcome = read_answers(plan.targets, plan.questions, plan.labels, record, url)
    write_predictions(output, outcome.predictions)
    say(
        f"{output}: {outcome}; {outcome.prompt_tokens:,} prompt tokens and {outcome.answer_tokens:,} answer tokens by "
        "the server's count"
    )


def answer(
    baseline: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of a trained generative baseline.")
    ],
    corpus: Annotated[
        Path, typer.Option(metavar="FILE", help="Dialogues to predict; labels are not needed.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the predictions: JSON lines.")],
    answers: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Record of the model's answers, which a second start goes on with. By default it stands beside the "
            "predictions, as OUTPUT.answers.jsonl.",
        ),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="DIR|NAME", help="The adapter's base, if it has moved.")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of weights and activations.")
    ] = "float32",
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to run.")] = "auto",
    batch_tokens: Annotated[
        int, typer.Option(min=16, help="Most tokens whose keys and values are kept at a time.")
    ] = 16_384,
) -> None:
    """Predict emotions, causes and spans with a fine-tuned language model, which answers in words.

    Every dialogue's answers are recorded at once, and the same command goes on after any stop. Under a launcher each
    rank takes a share of the dialogues; all ranks share the record.

    Example: kdecs baseline answer --baseline runs/generative/smollm2-135m --corpus test.json --output smollm2.jsonl
    """
    from kdecs.corpus.reading import read_corpus
    from kdecs.output import refuse_inputs

    place = _record_place(answers, output)
    for written in (output, place):
        refuse_inputs(written, [corpus, baseline])
    dialogues = read_corpus(corpus, labelled=False).dialogues
    from kdecs.baselines.generative.prediction import GenerativeBaseline, answer_corpus
    from kdecs.baselines.generative.record import AnswerRecord
    from kdecs.evaluation.predictions import write_predictions
    from kdecs.process import StopSignal, say
    from kdecs.runtime import start_runtime

    record = AnswerRecord(place)
    runtime = start_runtime(device=device)
    model = GenerativeBaseline.load(baseline, runtime=runtime, dtype=dtype, base=base)
    stop = StopSignal()
    stop.install()
    outcome = answer_corpus(model, dialogues, record, batch_tokens=batch_tokens, runtime=runtime, stop=stop)
    if outcome.num_missing:
        say(
            f"rank {runtime.rank}: its share is answered; {outcome.num_missing:,} targets are left to other ranks"
        )
        return
    write_predictions(output, outcome.predictions)
    say(f"{output}: {outcome}")


def _record_place(answers: Path | None, output: Path) -> Path:
    """Where the answers are recorded, which the predictions must not replace."""
    place = answers or output.with_name(f"{output.name.removesuffix('.jsonl')}.answers.jsonl")
    if place.resolve() == output.resolve():
        raise typer.BadParameter("--answers and --output name the same file; give each its own")
    return place
