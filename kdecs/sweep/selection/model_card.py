"""The model card of a selected student: data, teacher, settings, scores with intervals, baselines, limits."""

from pathlib import Path
from typing import Any

from kdecs import __version__
from kdecs.artifact import content_checksum, read_manifest
from kdecs.config import files_of
from kdecs.evaluation.baselines import SELF_AND_PREVIOUS
from kdecs.student.config import StudentConfig
from kdecs.sweep.selection.record import SelectionRecord
from kdecs.sweep.space import trials_directory

CARD_NAME = "model-card.md"
_SCORES = (
    ("macro_f1", "macro F1"),
    ("positive_f1", "Pos F1"),
    ("negative_f1", "Neg F1"),
    ("exact_match", "EM"),
    ("emotion_accuracy", "emotion accuracy"),
    ("utterance_macro_f1", "utterance macro F1"),
)


def model_card(sweep: Path, record: SelectionRecord, config: StudentConfig) -> str:
    """Markdown from the selection's record and the winner's config. It is published, so it names no local path."""
    details = read_manifest(trials_directory(sweep) / record.winner.id, "student").details
    test = record.test or {}
    lines = [
        f"# {record.winner.label}",
        "",
        f"A student for emotion-cause extraction in dialogues, by kdecs {__version__}. {_choice(record)}",
        "",
        "## Data",
        "",
        "| split | file | sha256 |",
        "|---|---|---|",
        *_data_rows(config),
        "",
        f"Trained on {details.get('num_pairs', 'an unknown number of')} pairs; emotions: "
        f"{', '.join(details.get('emotions', [])) or 'as in the corpus'}.",
        "",
        "## Teacher and settings",
        "",
        "| setting | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _settings(config, record).items()),
        "",
        "## Scores on test",
        "",
        f"Universe {record.universe}, protocol {record.protocol}, {test['num_positive']} positive and "
        f"{test['num_negative']} negative rows. Test was opened once, on {record.test_opened_at}. Scores in percent. "
        "The interval is the 95% bootstrap over dialogues for this one student; it leaves out the spread over seeds.",
        "",
        "| score | this student | 95% | " + " | ".join(record.test_baselines) + " |",
        "|---|---|---|" + "---|" * len(record.test_baselines),
        *_score_rows(record, test),
        "",
        _validation_line(record),
        *([f"On test it is {above}."] if (above := above_rule(record)) else []),
        "",
        "## Limits",
        "",
        *_limits(record, config),
    ]
    return "\n".join(lines) + "\n"


def verdict(record: SelectionRecord) -> tuple[float, str]:
    """The winner's distance on test to the best trivial rule, in points of the metric, and that rule's name."""
    metric = record.metric
    # The strongest rule by the same metric: to beat a weak one alone would say nothing.
    rules = {name: values[metric] for name, values in record.test_baselines.items() if metric in values}
    name = max(rules, key=lambda rule: rules[rule])
    return (record.test or {})[metric] - rules[name], name


def above_rule(record: SelectionRecord) -> str:
    """How far the winner's metric on test is above the rule "j >= i-1", with its interval; empty if it is not known."""
    distance = record.test_above_rule.get(record.metric)
    if distance is None:
        return ""
    side = "above" if distance.difference >= 0 else "below"
    score = record.metric.replace("_", " ").replace("f1", "F1")
    return (
        f"{abs(distance.difference):.2f} points of {score} {side} the rule {SELF_AND_PREVIOUS} "
        f"(95% {distance.low:+.2f} to {distance.high:+.2f}, paired over dialogues)"
    )


def _choice(record: SelectionRecord) -> str:
    number = len(record.settings)
    if record.picked is None:
        best = f"the one with the highest mean {record.metric} on validation"
        return f"Of {number} settings, it is the best seed of {best}."
    place = record.settings.index(record.setting) + 1
    return (
        f"A person picked it among the students of {number} settings. Its setting is number {place} by mean "
        f"{record.metric} on validation."
    )


def _data_rows(config: StudentConfig) -> list[str]:
    splits = [
        *(("train", path) for path in files_of(config.corpus.train)),
        ("valid", config.corpus.valid),
        ("test", config.corpus.test),
    ]
    return [
        f"| {split} | {path.name} | `{content_checksum(path)[:16]}` |"
        for split, path in splits
        if path is not None and path.is_file()
    ]


def _settings(config: StudentConfig, record: SelectionRecord) -> dict[str, Any]:
    setting = record.setting
    return {
        "teacher": setting.teacher or "none",
        "mode": config.distillation.mode,
        # A local base is a path of the machine that trained.
        "base": Path(config.model.base).name,
        "α": config.distillation.alpha,
        "τ": config.distillation.temperature,
        "seed": record.winner.seed,
        "learning rate": config.optimization.learning_rate,
        **config.optimization.budget,
        "pairs per step": config.batches.global_batch_pairs,
        **{key: value for key, value in setting.settings.items() if "." in key},
    }


def _score_rows(record: SelectionRecord, test: dict[str, Any]) -> list[str]:
    rows = []
    for key, title in _SCORES:
        if test.get(key) is None:  # emotions that were given, or are not predicted
            continue
        low, high = record.test_intervals[key]
        rules = [rule.get(key) for rule in record.test_baselines.values()]
        shown = " | ".join("–" if value is None else f"{value:.2f}" for value in rules)
        rows.append(f"| {title} | {test[key]:.2f} | {low:.2f} to {high:.2f} | {shown} |")
    return rows


def _validation_line(record: SelectionRecord) -> str:
    setting = record.setting
    spread = f", 95% {setting.interval[0]:.2f} to {setting.interval[1]:.2f}" if setting.interval else ""
    line = f"On validation the setting reaches {setting.mean:.2f} over {setting.num_seeds} seeds{spread}."
    if record.runner_up:
        test = record.runner_up.tests[record.metric]
        line += (
            f" Against {_rival(record)}, {record.runner_up.label}: {test.difference:+.2f} points "
            f"(95% {test.low:+.2f} to {test.high:+.2f}, p {test.p:.3f}, paired over dialogues)."
        )
    return line


def _rival(record: SelectionRecord) -> str:
    return "the runner-up" if record.picked is None else "the best other setting"


def _limits(record: SelectionRecord, config: StudentConfig) -> list[str]:
    difference, rule = verdict(record)
    found = [
        f"- Its {record.metric} on test is {abs(difference):.2f} points {'above' if difference >= 0 else 'below'} that "
        f"of the best trivial rule, {rule}.",
        "- Its validation score is that of the best of several seeds, so it is optimistic. The test score is not.",
        f"- Prompts hold at most {config.model.max_prompt_tokens} tokens; the oldest history is cut first.",
        f"- It was tested on {config.corpus.test.name if config.corpus.test else 'one corpus'} alone. Other sources, "
        "registers and languages were not tested.",
    ]
    if config.is_given_emotions:
        found.append("- It expects the target's emotion to be given, and does not predict it.")
    return found
