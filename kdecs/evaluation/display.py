"""Tables of scores for a terminal, rounded; programs read the JSON instead."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from kdecs.evaluation.metrics import SCORE_KEYS, STRICT_KEYS, EmotionReport, Scores
from kdecs.evaluation.semeval import SemevalScores
from kdecs.evaluation.significance import Comparison, SeedSummary
from kdecs.tables import figures_table, terminal

# A confusion matrix of more labels does not fit into 80 columns.
_MANY_LABELS = 8
_MOST_WRONG = 3
_SHOWN_OF_SUBMISSIONS = ("weighted_strict_f1", "weighted_proportional_f1", "weighted_f1")


def print_scores(scores: Scores, found: Mapping[str, Any]) -> None:
    """Print scores next to the trivial rules, with intervals, emotions and breakdowns if `found` has them."""
    console = terminal(soft_wrap=True)
    table = figures_table("Scores next to trivial rules", "score (%)", "system", "strict", *scores.baselines)
    for key in ("emotion_accuracy", "emotion_macro_f1", *STRICT_KEYS):
        rules = [f"{rule[key]:.2f}" if key in rule else "" for rule in scores.baselines.values()]
        strict = _percent(found, f"strict_{key}") if key in STRICT_KEYS else ""
        table.add_row(key.replace("_", " "), _percent(found, key), strict, *rules)
    console.print(table)
    _print_above_rule(console, found, "score (%)", 2)
    if "intervals" in found:
        _print_intervals(console, found)
    console.print(Text(counts_line(scores)))
    if "emotions" in found:
        _print_emotions(console, scores)
    if "breakdowns" in found:
        for title, groups in found["breakdowns"].items():
            _print_breakdown(console, title, groups)


def _percent(found: Mapping[str, Any], key: str) -> str:
    """A score, or a dash for one that the system has not: it predicts no emotions, or the corpus has no spans."""
    return "–" if found[key] is None else f"{found[key]:.2f}"


def print_comparison(
    a: Path,
    b: Path,
    scores_a: Scores,
    scores_b: Scores,
    compared: Mapping[str, Comparison],
    above_rule: Sequence[Mapping[str, Mapping[str, float]]],
) -> None:
    """Print, for each score, A, B, their difference with its interval, p, and the best trivial rule.

    `above_rule` says how far the scores of A and of B are above the rule "j >= i-1".
    """
    console = terminal(soft_wrap=True)
    columns = ("A", "B", "A − B", "95% interval", "p", "rule")
    table = figures_table("A minus B, paired by dialogue", "score (%)", *columns, tight=True)
    for key in SCORE_KEYS:
        found = compared.get(key)
        if found is None:  # A or B predicts no emotions
            figures = tuple(_percent(scores.as_dict(), key) for scores in (scores_a, scores_b)) + ("–",) * 3
        else:
            interval = f"{found.low:+.2f} … {found.high:+.2f}"
            difference = f"{found.difference:+.2f}"
            figures = (f"{found.a:.2f}", f"{found.b:.2f}", difference, interval, f"{found.p:.4f}")
        name = key.replace("_", " ").replace("utterance", "utt.")
        table.add_row(name, *figures, _best_rule(scores_a, key))
    console.print(table)
    console.print("rule: the best trivial rule's score")
    _print_above_rules(console, above_rule, ("macro_f1", "utterance_macro_f1"), 2)
    for name, path, scores in (("A", a, scores_a), ("B", b, scores_b)):
        console.print(Text(f"{name} = {path}: {counts_line(scores)}"))


def _print_above_rules(
    console: Console,
    above_rule: Sequence[Mapping[str, Mapping[str, float]]],
    keys: Sequence[str],
    num_digits: int,
) -> None:
    """A line each for A and B with the distances of some scores from the rule."""
    for name, distances in zip("AB", above_rule, strict=True):
        parts = [
            f"{key.replace('_', ' ')} "
            + "{difference:+.{n}f} ({low:+.{n}f} … {high:+.{n}f})".format(**distances[key], n=num_digits)
            for key in keys
            if key in distances
        ]
        if parts:
            console.print(Text(f"{name} above the rule j >= i-1, with its 95% interval: {', '.join(parts)}"))


def print_seeds(files: Sequence[Path], runs: Sequence[Scores], summary: Mapping[str, SeedSummary]) -> None:
    """Print mean, standard deviation and 95% interval of each score over runs, next to the best trivial rule."""
    console = terminal(soft_wrap=True)
    columns = ("mean", "std", "95% interval", "best rule")
    table = figures_table(f"Over {len(runs)} runs", "score (%)", *columns)
    for key, found in summary.items():
        interval = "" if found.low is None else f"{found.low:.2f} … {found.high:.2f}"
        std = "" if found.std is None else f"{found.std:.2f}"
        table.add_row(key.replace("_", " "), f"{found.mean:.2f}", std, interval, _best_rule(runs[0], key))
    console.print(table)
    for file, scores in zip(files, runs, strict=True):
        console.print(Text(f"{file}: {counts_line(scores)}"))


def _best_rule(scores: Scores, key: str) -> str:
    """The score of the best trivial rule; empty if no rule has this score."""
    # By number, of the texts that are shown: as texts "9.50" would beat "61.00".
    return max(
        (f"{rule[key]:.2f}" for rule in scores.baselines.values() if key in rule), key=float, default=""
    )


def counts_line(scores: Scores) -> str:
    """One line with the universe, the protocol and the counts."""
    is_given = scores.universe == "gold-emotions"
    unit = "pairs" if is_given else "rows"
    line = (
        f"universe {scores.universe}, protocol {scores.protocol}: {scores.num_positive:,} positive and "
        f"{scores.num_negative:,} negative {unit}; {scores.missing:,} pairs without a prediction (taken as no cause); "
    )
    without = f"{scores.utterances_without_emotion:,} of {scores.num_utterances:,} utterances"
    line += "gold emotions given" if is_given else f"{without} without a predicted emotion"
    if scores.scored.num_neutral:
        said = "is" if is_given else "is predicted"
        line += f"; {scores.scored.num_neutral:,} causes dropped because their target {said} neutral"
    return line


def _print_above_rule(console: Console, found: Mapping[str, Any], unit: str, num_digits: int) -> None:
    title = "Above the rule j >= i-1, with a 95% interval paired by dialogue"
    table = figures_table(title, unit, "difference", "low", "high")
    for key, distance in found["above_rule"].items():
        figures = (f"{distance[name]:+.{num_digits}f}" for name in ("difference", "low", "high"))
        table.add_row(key.replace("_", " "), *figures)
    console.print(table)


def _print_intervals(console: Console, found: Mapping[str, Any]) -> None:
    title = "95% intervals, bootstrap over dialogues"
    table = figures_table(title, "score (%)", "score", "low", "high")
    for key, (low, high) in found["intervals"].items():
        table.add_row(key.replace("_", " "), f"{found[key]:.2f}", f"{low:.2f}", f"{high:.2f}")
    console.print(table)


def _print_emotions(console: Console, scores: Scores) -> None:
    report = scores.emotions
    if not report.labels:
        return
    shows_matrix = len(report.labels) <= _MANY_LABELS
    columns = report.labels if shows_matrix else ("utterances", "mostly taken for")
    table = figures_table("Confusions of emotions", "gold \\ predicted", *columns, "F1")
    for label, row in zip(report.labels, report.confusion.tolist(), strict=True):
        cells = (
            [str(count) for count in row] if shows_matrix else [str(sum(row)), _taken_for(label, row, report)]
        )
        table.add_row(label, *cells, f"{report.f1[label]:.2f}")
    console.print(table)


def _taken_for(label: str, row: Sequence[int], report: EmotionReport) -> str:
    """The most frequent wrong predictions for a gold label."""
    wrong = [
        (count, other) for count, other in zip(row, report.labels, strict=True) if count and other != label
    ]
    return ", ".join(
        f"{other} {count}" for count, other in sorted(wrong, key=lambda item: -item[0])[:_MOST_WRONG]
    )


def _print_breakdown(console: Console, title: str, groups: Mapping[str, Mapping[str, Any]]) -> None:
    keys = ("positive_f1", "negative_f1", "macro_f1", "utterance_macro_f1")
    columns = ("positive rows", "negative rows", "Pos F1", "Neg F1", "macro F1", "utt. macro")
    table = figures_table(f"Scores by {title.replace('_', ' ')}", title.split("_")[-1], *columns)
    for group, values in groups.items():
        counts = (f"{values['num_positive']:,}", f"{values['num_negative']:,}")
        table.add_row(group, *counts, *(_percent(values, key) for key in keys))
    console.print(table)


def print_submission(scores: SemevalScores, found: Mapping[str, Any]) -> None:
    """Print the scores of a submission next to the rules, with intervals and emotions if `found` has them."""
    console = terminal(soft_wrap=True)
    table = figures_table("SemEval-2024 Task 3, next to trivial rules", "score", "system", *scores.baselines)
    for key, value in scores.known.items():
        rules = [f"{rule[key]:.4f}" if key in rule else "" for rule in scores.baselines.values()]
        table.add_row(key.replace("_", " "), f"{value:.4f}", *rules)
    console.print(table)
    _print_above_rule(console, found, "score", 4)
    if "intervals" in found:
        table = figures_table("95% intervals, bootstrap over dialogues", "score", "score", "low", "high")
        for key, (low, high) in found["intervals"].items():
            table.add_row(key.replace("_", " "), f"{scores.known[key]:.4f}", f"{low:.4f}", f"{high:.4f}")
        console.print(table)
    if "by_emotion" in found:
        kinds = [kind for kind in ("strict", "proportional") if f"{kind}_f1" in scores.known]
        table = figures_table(
            "By emotion", "emotion", "gold", "predicted", *(f"{k} F1" for k in kinds), "pair F1"
        )
        for emotion, values in scores.by_emotion.items():
            figures = (f"{values[key]:.4f}" for key in (*(f"{kind}_f1" for kind in kinds), "f1_pair"))
            table.add_row(emotion, f"{values['num_gold']:,}", f"{values['num_predicted']:,}", *figures)
        console.print(table)
    console.print(Text(submission_line(scores)))


def submission_line(scores: SemevalScores) -> str:
    """One line with the protocol and the counts."""
    line = f"protocol semeval: {scores.num_gold:,} gold and {scores.num_predicted:,} predicted causes"
    if scores.submission.num_neutral:
        line += f"; {scores.submission.num_neutral:,} causes of neutral targets are not scored"
    if scores.submission.num_other:
        line += f"; {scores.submission.num_other:,} conversations are not in the corpus"
    return line


def print_compared_submissions(
    files: tuple[Path, Path],
    a: SemevalScores,
    b: SemevalScores,
    compared: Mapping[str, Comparison],
    above_rule: Sequence[Mapping[str, Mapping[str, float]]],
) -> None:
    """Print A, B, their difference with its interval, and p for each score of two submissions.

    `above_rule` says how far the scores of A and of B are above the rule "j >= i-1".
    """
    console = terminal(soft_wrap=True)
    columns = ("A", "B", "A − B", "95% interval", "p")
    table = figures_table("A minus B, paired by dialogue", "score", *columns, tight=True)
    for key, found in compared.items():
        interval = f"{found.low:+.4f} … {found.high:+.4f}"
        figures = (f"{found.a:.4f}", f"{found.b:.4f}", f"{found.difference:+.4f}", interval, f"{found.p:.4f}")
        # Whole words would leave the figures no room in 80 columns.
        name = key.replace("_", " ").replace("weighted", "w.").replace("proportional", "prop.")
        table.add_row(name, *figures)
    console.print(table)
    console.print("w.: weighted by the gold causes of each emotion; prop.: proportional")
    _print_above_rules(console, above_rule, _SHOWN_OF_SUBMISSIONS, 4)
    for name, path, scores in zip("AB", files, (a, b), strict=True):
        console.print(Text(f"{name} = {path}: {submission_line(scores)}"))


def print_seeds_of_submissions(
    files: Sequence[Path], runs: Sequence[SemevalScores], summary: Mapping[str, SeedSummary]
) -> None:
    """Print mean, standard deviation and 95% interval of each score over submissions."""
    console = terminal(soft_wrap=True)
    table = figures_table(f"Over {len(runs)} runs", "score", "mean", "std", "95% interval")
    for key, found in summary.items():
        interval = "" if found.low is None else f"{found.low:.4f} … {found.high:.4f}"
        std = "" if found.std is None else f"{found.std:.4f}"
        table.add_row(key.replace("_", " "), f"{found.mean:.4f}", std, interval)
    console.print(table)
    for file, scores in zip(files, runs, strict=True):
        console.print(Text(f"{file}: {submission_line(scores)}"))
