"""The commands `kdecs evaluate` and `kdecs compare`. Slow imports stand inside the functions."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kdecs.corpus.schema import Corpus
    from kdecs.evaluation.metrics import Scores
    from kdecs.evaluation.predictions import PairKey, Prediction
    from kdecs.evaluation.semeval import SemevalScores
    from kdecs.evaluation.significance import Metrics


CorpusFile = Annotated[Path, typer.Option("--corpus", metavar="FILE", help="Labelled corpus file.")]
PredictionFiles = Annotated[
    list[Path],
    typer.Option(
        "--predictions",
        metavar="FILE",
        help="Prediction file: JSON lines, one per pair; give several (one per seed) for mean and interval.",
    ),
]
Protocols = Annotated[
    Literal["reccon", "reccon-released", "squad", "semeval"],
    typer.Option(
        help="How a predicted span counts; semeval: as in SemEval-2024 Task 3, whose submissions it takes, too."
    ),
]
ReleasedRows = Annotated[
    Path | None,
    typer.Option(
        "--released-rows",
        metavar="FILE",
        help="Protocol reccon-released: RECCON's own row file of this split, whose order of dialogues decides.",
    ),
]
Universes = Annotated[
    Literal["fold1", "all", "gold-emotions"],
    typer.Option(
        help="fold1: targets that have annotated causes; all: every target; gold-emotions: every target, with its gold "
        "emotion given, so that neutral ones have no cause."
    ),
]
Samples = Annotated[
    int, typer.Option(min=100, help="Number of samples of the bootstrap and of the permutation test.")
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of these samples.")]
Details = Annotated[
    bool,
    typer.Option(
        "--details", help="Add F1 and confusions of emotions, and scores by distance, emotion and length."
    ),
]
Intervals = Annotated[
    bool, typer.Option("--intervals", help="Add 95% intervals by a bootstrap over dialogues.")
]
Coarse = Annotated[
    bool,
    typer.Option("--coarse", help="Map the fine emotions of both sides to coarse ones before comparing."),
]
Table = Annotated[
    Path | None,
    typer.Option(
        "--table",
        metavar="FILE",
        help="Like --coarse, with a JSON object {fine: coarse} over the built-in table.",
    ),
]
After = Annotated[
    int, typer.Option(min=0, help="Score candidates up to this many turns past their target, too.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, unrounded.")]


def evaluate(
    corpus: CorpusFile,
    predictions: PredictionFiles,
    protocol: Protocols = "reccon",
    released_rows: ReleasedRows = None,
    universe: Universes = "fold1",
    after: After = 0,
    details: Details = False,
    intervals: Intervals = False,
    samples: Samples = 2000,
    seed: Seed = 0,
    coarse: Coarse = False,
    table: Table = None,
    as_json: Json = False,
) -> None:
    """Score the predictions of any system against a corpus, next to the scores of trivial rules.

    Examples: kdecs evaluate --corpus test.json --predictions mine.jsonl --details --intervals

    kdecs evaluate --corpus test.json --predictions seed1.jsonl --predictions seed2.jsonl --json

    kdecs evaluate --corpus Subtask_1_gold.json --predictions Subtask_1_pred.json --protocol semeval
    """
    from kdecs.corpus.reading import log_notes, read_corpus
    from kdecs.evaluation.metrics import STRICT_KEYS, breakdowns
    from kdecs.evaluation.metrics import evaluate as score
    from kdecs.output import STANDARD_STREAM, refuse_inputs

    refuse_inputs(STANDARD_STREAM, [corpus, *predictions, table, released_rows])
    emotion_table = _emotion_table(coarse, table)
    order = _released_order(protocol, released_rows)
    # Notes are logged at the end: a fault of the predictions should be the only line then.
    gold = read_corpus(corpus, log=False, table=emotion_table)
    if protocol == "semeval":
        _refuse_universe(universe)
        runs = [_semeval_scores(gold, file, emotion_table) for file in predictions]
        log_notes(gold)
        _show_semeval(predictions, runs, details, intervals, (samples, seed), as_json)
        return
    found = []
    for file in predictions:
        given = _read_lines(file, gold, emotion_table)
        scores = score(
            gold,
            given,
            universe=universe,
            protocol=protocol,
            emotion_table=emotion_table,
            released_order=order,
            candidates_after=after,
        )
        run: dict[str, Any] = scores.as_dict()
        run["above_rule"] = _above_rule(
            scores.sums_by_dialogue,
            scores.rule_sums(),
            [key for key in STRICT_KEYS if key in scores.known],
            samples,
            seed,
        )
        if intervals:
            from kdecs.evaluation.significance import bootstrap_intervals

            all_intervals = bootstrap_intervals(scores.sums_by_dialogue, num_samples=samples, seed=seed)
            run["intervals"] = {key: all_intervals[key] for key in scores.known}
        if details:
            if scores.has_emotions:
                run["emotions"] = scores.emotions.as_dict()
            run["breakdowns"] = breakdowns(scores)
        found.append((scores, run))
    log_notes(gold)
    _log_guessed_order([(file, scores) for file, (scores, _) in zip(predictions, found, strict=True)])
    if len(found) == 1:
        _show(*found[0], as_json)
    else:
        _show_seeds(predictions, found, as_json)


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Prediction file of system A.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Prediction file of system B.")],
    corpus: CorpusFile,
    protocol: Protocols = "reccon",
    released_rows: ReleasedRows = None,
    universe: Universes = "fold1",
    after: After = 0,
    samples: Samples = 2000,
    seed: Seed = 0,
    coarse: Coarse = False,
    table: Table = None,
    as_json: Json = False,
) -> None:
    """Compare two prediction files on one corpus: A minus B with a 95% interval and p, paired by dialogue.

    Example: kdecs compare kd.jsonl joint.jsonl --corpus test.json
    """
    from kdecs.corpus.reading import log_notes, read_corpus
    from kdecs.evaluation.metrics import SCORE_KEYS, STRICT_KEYS
    from kdecs.evaluation.metrics import evaluate as score
    from kdecs.evaluation.significance import compare_systems
    from kdecs.output import STANDARD_STREAM, refuse_inputs

    refuse_inputs(STANDARD_STREAM, [a, b, corpus, table, released_rows])
    emotion_table = _emotion_table(coarse, table)
    order = _released_order(protocol, released_rows)
    gold = read_corpus(corpus, log=False, table=emotion_table)
    if protocol == "semeval":
        _refuse_universe(universe)
        of_a, of_b = (_semeval_scores(gold, file, emotion_table) for file in (a, b))
        log_notes(gold)
        _compare_semeval((a, b), of_a, of_b, samples, seed, as_json)
        return
    scores: list[Scores] = [
        score(
            gold,
            _read_lines(file, gold, emotion_table),
            universe=universe,
            protocol=protocol,
            emotion_table=emotion_table,
            released_order=order,
            candidates_after=after,
        )
        for file in (a, b)
    ]
    compared = compare_systems(
        scores[0].sums_by_dialogue,
        scores[1].sums_by_dialogue,
        # A system without emotions lacks their scores, and a difference to nothing would be made up.
        keys=[key for key in scores[0].known if key in scores[1].known],
        num_samples=samples,
        seed=seed,
    )
    above_rule = [
        _above_rule(
            of.sums_by_dialogue,
            of.rule_sums(),
            [key for key in STRICT_KEYS if key in of.known],
            samples,
            seed,
        )
        for of in scores
    ]
    log_notes(gold)
    _log_guessed_order(list(zip((a, b), scores, strict=True)))
    if as_json:
        found: dict[str, Any] = dict.fromkeys(SCORE_KEYS)
        found |= {key: asdict(value) for key, value in compared.items()}
        found |= {
            key: scores[0].as_dict()[key] for key in ("universe", "protocol", "num_positive", "num_negative")
        }
        found |= {"missing_a": scores[0].missing, "missing_b": scores[1].missing}
        found["baselines"] = scores[0].baselines
        found["above_rule"] = dict(zip(("a", "b"), above_rule, strict=True))
        print(json.dumps(found, indent=2))
    else:
        from kdecs.evaluation.display import print_comparison

        print_comparison(a, b, scores[0], scores[1], compared, above_rule)


def _above_rule(
    sums: "NDArray[np.float64]",
    rule_sums: "NDArray[np.float64]",
    keys: list[str],
    samples: int,
    seed: int,
    metrics: "Metrics | None" = None,
) -> dict[str, dict[str, float]]:
    """How far each score is above the rule j >= i-1, as JSON has it."""
    from kdecs.evaluation.metrics import metrics_of
    from kdecs.evaluation.significance import distance_from_rule

    found = distance_from_rule(
        sums, rule_sums, keys, num_samples=samples, seed=seed, metrics=metrics or metrics_of
    )
    return {key: asdict(distance) for key, distance in found.items()}


def _show(scores: "Scores", run: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(run, indent=2))
    else:
        from kdecs.evaluation.display import print_scores

        print_scores(scores, run)


def _show_seeds(files: list[Path], found: "list[tuple[Scores, dict[str, Any]]]", as_json: bool) -> None:
    """Print mean, standard deviation and interval over runs; JSON also holds every run."""
    from kdecs.evaluation.metrics import SCORE_KEYS
    from kdecs.evaluation.significance import summarise_seeds

    runs_of = {key: [scores.known[key] for scores, _ in found if key in scores.known] for key in SCORE_KEYS}
    # A score that a run lacks has no mean over the runs.
    summary = {key: summarise_seeds(runs) for key, runs in runs_of.items() if len(runs) == len(found)}
    if as_json:
        runs = [{"predictions": str(file), **run} for file, (_, run) in zip(files, found, strict=True)]
        seeds = {key: asdict(summary[key]) if key in summary else None for key in SCORE_KEYS}
        print(json.dumps({"over_seeds": seeds, "runs": runs}, indent=2))
    else:
        from kdecs.evaluation.display import print_seeds

        print_seeds(files, [scores for scores, _ in found], summary)


def _read_lines(file: Path, gold: "Corpus", emotion_table: dict[str, str]) -> "Mapping[PairKey, Prediction]":
    from kdecs.errors import PredictionError
    from kdecs.evaluation.predictions import read_predictions
    from kdecs.evaluation.semeval import is_submission

    if is_submission(file):
        raise PredictionError(
            f"{file}: found a submission of SemEval-2024 Task 3, expected JSON lines, one per pair; score it with "
            "--protocol semeval"
        )
    return read_predictions(file, gold, emotion_table)


def _refuse_universe(universe: str) -> None:
    if universe != "fold1":
        raise typer.BadParameter(
            "the protocol semeval scores all causes, predicted and gold, and has no universe",
            param_hint="--universe",
        )


def _semeval_scores(gold: "Corpus", file: Path, emotion_table: dict[str, str]) -> "SemevalScores":
    from kdecs.corpus.schema import map_corpus
    from kdecs.evaluation.semeval import read_submission, score_submission

    submission = read_submission(file, gold, emotion_table)
    return score_submission(map_corpus(gold, emotion_table) if emotion_table else gold, submission)


def _show_semeval(
    files: list[Path],
    runs: "list[SemevalScores]",
    has_details: bool,
    has_intervals: bool,
    sampling: tuple[int, int],
    as_json: bool,
) -> None:
    """Print the scores of one submission, or mean, deviation and interval over several."""
    from kdecs.evaluation.display import print_seeds_of_submissions, print_submission
    from kdecs.evaluation.semeval import KEYS, metrics_of
    from kdecs.evaluation.significance import bootstrap_intervals, summarise_seeds

    found = []
    for scores in runs:
        run: dict[str, Any] = scores.as_dict()
        run["above_rule"] = _above_rule(
            scores.sums_by_dialogue, scores.rule_sums, list(scores.known), *sampling, metrics_of
        )
        if has_intervals:
            drawn = bootstrap_intervals(
                scores.sums_by_dialogue, num_samples=sampling[0], seed=sampling[1], metrics=metrics_of
            )
            run["intervals"] = {key: drawn[key] for key in scores.known}
        if has_details:
            run["by_emotion"] = scores.by_emotion
        found.append(run)
    summary = {
        key: summarise_seeds([scores.known[key] for scores in runs])
        for key in KEYS
        if all(key in scores.known for scores in runs)
    }
    if as_json and len(runs) == 1:
        print(json.dumps(found[0], indent=2))
    elif as_json:
        seeds = {key: asdict(summary[key]) if key in summary else None for key in KEYS}
        named = [{"predictions": str(file), **run} for file, run in zip(files, found, strict=True)]
        print(json.dumps({"over_seeds": seeds, "runs": named}, indent=2))
    elif len(runs) == 1:
        print_submission(runs[0], found[0])
    else:
        print_seeds_of_submissions(files, runs, summary)


def _compare_semeval(
    files: tuple[Path, Path], a: "SemevalScores", b: "SemevalScores", samples: int, seed: int, as_json: bool
) -> None:
    from kdecs.evaluation.display import print_compared_submissions
    from kdecs.evaluation.semeval import KEYS, metrics_of
    from kdecs.evaluation.significance import compare_systems

    compared = compare_systems(
        a.sums_by_dialogue,
        b.sums_by_dialogue,
        keys=[key for key in a.known if key in b.known],
        num_samples=samples,
        seed=seed,
        metrics=metrics_of,
    )
    above_rule = [
        _above_rule(of.sums_by_dialogue, of.rule_sums, list(of.known), samples, seed, metrics_of)
        for of in (a, b)
    ]
    if as_json:
        found: dict[str, Any] = dict.fromkeys(KEYS)
        found |= {key: asdict(value) for key, value in compared.items()}
        found |= {"protocol": "semeval", "num_gold": a.num_gold, "baselines": a.baselines}
        found["above_rule"] = dict(zip(("a", "b"), above_rule, strict=True))
        print(json.dumps(found, indent=2))
    else:
        print_compared_submissions(files, a, b, compared, above_rule)


def _released_order(protocol: str, released_rows: Path | None) -> tuple[str, ...] | None:
    """The order of dialogues that `--released-rows` gives; None without it."""
    from kdecs.evaluation.released import read_released_order

    if released_rows is None:
        return None
    if protocol != "reccon-released":
        raise typer.BadParameter(
            f"expected --protocol reccon-released, found {protocol}: no other protocol depends on the order of rows",
            param_hint="--released-rows",
        )
    return read_released_order(released_rows)


def _log_guessed_order(scored: "list[tuple[Path, Scores]]") -> None:
    for file, scores in scored:
        if scores.scored.is_order_guessed:
            logging.getLogger(__name__).warning(
                "%s: Neg F1 depends on which dialogue is the last one of RECCON's rows, which is not known for this "
                "corpus; its own order was taken. --released-rows FILE gives the order of RECCON's row file",
                file,
            )


def _emotion_table(coarse: bool, table: Path | None) -> dict[str, str]:
    """The table that `--coarse` and `--table` ask for; empty if labels are compared unchanged."""
    from kdecs.corpus.reading import read_table
    from kdecs.corpus.schema import FINE_TO_COARSE

    if table:
        return read_table(table)
    return FINE_TO_COARSE if coarse else {}
