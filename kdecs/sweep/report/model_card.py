"""The model card of a selected student: data, teacher, settings, scores with intervals, baselines, limits."""

from pathlib import Path
from typing import Any

from kdecs import __version__
from kdecs.artifact import content_checksum, read_manifest
from kdecs.student.config import StudentConfig

CARD_NAME = "model-card.md"
_SCORES = (
    ("macro_f1", "macro F1"),
    ("positive_f1", "Pos F1"),
    ("negative_f1", "Neg F1"),
    ("exact_match", "EM"),
    ("emotion_accuracy", "emotion accuracy"),
    ("utterance_macro_f1", "utterance macro F1"),
)


def model_card(sweep: Path, record: dict[str, Any], config: StudentConfig) -> str:
    """Markdown from the selection's record and the winner's config. No paths of this machine: it is published."""
    winner, test = record["winner"], record["test"]
    manifest = read_manifest(sweep / winner["directory"], "student")
    lines = [
        f"# {winner['label']}",
        "",
        f"A student for emotion-cause extraction in dialogues, by kdecs {__version__}. Of "
        f"{len(record['settings'])} settings it is the best seed of the setting with the highest mean "
        f"{record['metric']} on validation.",
        "",
        "## Data",
        "",
        "| split | file | sha256 |",
        "|---|---|---|",
        *_data_rows(config),
        "",
        f"Trained on {manifest.details.get('num_pairs', 'an unknown number of')} pairs; emotions: "
        f"{', '.join(manifest.details.get('emotions', [])) or 'as in the corpus'}.",
        "",
        "## Teacher and settings",
        "",
        *_settings_rows(config, record),
        "",
        "## Scores on test",
        "",
        f"Universe {record['universe']}, protocol {record['protocol']}, {test['num_positive']} positive and "
        f"{test['num_negative']} negative rows, opened {record['test_opened_at']}, once. Percent; the interval "
        "is the 95% bootstrap over dialogues, of this one student; seeds vary beside it.",
        "",
        "| score | this student | 95% | " + " | ".join(record["test_baselines"]) + " |",
        "|---|---|---|" + "---|" * len(record["test_baselines"]),
        *_score_rows(record),
        "",
        _validation_line(record),
        "",
        "## Limits",
        "",
        *_limits(record, config),
    ]
    return "\n".join(lines) + "\n"


def _data_rows(config: StudentConfig) -> list[str]:
    splits = {"train": config.corpus.train, "valid": config.corpus.valid, "test": config.corpus.test}
    return [
        f"| {split} | {path.name} | `{content_checksum(path)[:16]}` |"
        for split, path in splits.items()
        if path is not None and path.is_file()
    ]


def _settings_rows(config: StudentConfig, record: dict[str, Any]) -> list[str]:
    setting = record["settings"][0]
    values = {
        "teacher": setting["teacher"] or "none",
        "mode": config.distillation.mode,
        "base": Path(config.model.base).name,
        "α": config.distillation.alpha,
        "τ": config.distillation.temperature,
        "seed": record["winner"]["seed"],
        "learning rate": config.optimization.learning_rate,
        "epochs": config.optimization.epochs,
        "pairs a step": config.batches.global_batch_pairs,
        **{k: v for k, v in setting["settings"].items() if k not in ("teacher",) and "." in k},
    }
    return ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in values.items())]


def _score_rows(record: dict[str, Any]) -> list[str]:
    rows = []
    for key, title in _SCORES:
        if key not in record["test"]:  # emotions that were given
            continue
        low, high = record["test_intervals"][key]
        rules = [rule.get(key) for rule in record["test_baselines"].values()]
        shown = " | ".join("–" if value is None else f"{value:.2f}" for value in rules)
        rows.append(f"| {title} | {record['test'][key]:.2f} | {low:.2f} to {high:.2f} | {shown} |")
    return rows


def _validation_line(record: dict[str, Any]) -> str:
    setting = record["settings"][0]
    interval = setting["interval"]
    spread = f", 95% {interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
    line = (
        f"On validation the setting reaches {setting['mean']:.2f} over {setting['num_seeds']} seeds{spread}."
    )
    second = record["runner_up"]
    if second:
        test = second["tests"][record["metric"]]
        line += (
            f" Against the runner-up, {second['label']}: {test['difference']:+.2f} points "
            f"(95% {test['low']:+.2f} to {test['high']:+.2f}, p {test['p']:.3f}, paired over dialogues)."
        )
    return line


def _limits(record: dict[str, Any], config: StudentConfig) -> list[str]:
    metric = record["metric"]
    rules = {name: rule[metric] for name, rule in record["test_baselines"].items() if metric in rule}
    name = max(rules, key=lambda rule: rules[rule])
    difference = record["test"][metric] - rules[name]
    found = [
        f"- In {metric} it stands {abs(difference):.2f} points {'above' if difference >= 0 else 'below'} the best "
        f"trivial rule on test, {name}.",
        "- Its validation score is that of the best of several seeds, so it is optimistic; the test score is not.",
        f"- Prompts hold at most {config.model.max_prompt_tokens} tokens: the oldest history is cut first.",
        f"- It was tested on {config.corpus.test.name if config.corpus.test else 'one corpus'} alone: other sources, "
        "registers and languages were not tested.",
    ]
    if config.model.given_emotions != "none":
        found.append("- It expects the target's emotion to be given, and does not predict it.")
    return found
