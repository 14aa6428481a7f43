"""The report's own tables: variants with their significance, and the leaderboard in LaTeX."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdecs.artifact import write_text
from kdecs.sweep.selection.record import SelectionRecord, SettingScore
from kdecs.sweep.space import SHARE_KEY, VARIANT_KEY
from kdecs.sweep.status import TrialResult

COLUMNS = (
    ("macro_f1", "macro F1"),
    ("positive_f1", "Pos F1"),
    ("negative_f1", "Neg F1"),
    ("exact_match", "EM"),
    ("emotion_accuracy", "Emo Acc"),
    ("utterance_macro_f1", "utt. macro F1"),
)


def columns_of(metric: str) -> tuple[tuple[str, str], ...]:
    """The scores that a report shows of students that are chosen by `metric`: without spans, those of utterances."""
    if metric != "utterance_macro_f1":
        return COLUMNS
    titles = {
        "utterance_macro_f1": "macro F1",
        "utterance_positive_f1": "Pos F1",
        "utterance_negative_f1": "Neg F1",
    }
    return (*titles.items(), ("emotion_accuracy", "Emo Acc"))


@dataclass(frozen=True, slots=True)
class AblationRow:
    """A variant compared with the first one: difference of means in points, p over dialogues and over seeds."""

    variant: str
    label: str
    means: dict[str, float | None]
    sd: float | None
    difference: float | None
    dialogues_p: float | None
    seeds_p: float | None


def setting_means(group: Sequence[TrialResult]) -> dict[str, float | None]:
    """The mean over seeds of each column, None if the students have no such score."""
    means: dict[str, float | None] = {}
    for key, _ in columns_of(group[0].metric):
        values = [result.metrics[key] for result in group if key in result.metrics]
        means[key] = sum(values) / len(values) if values else None
    return means


def ablation_rows(
    ranked: Sequence[SettingScore],
    results: Sequence[TrialResult],
    order: Sequence[str],
    selection: SelectionRecord | None,
) -> list[AblationRow]:
    """One row per variant, in the config's order. None if variants are compared by share, or there is only one."""
    # As in the selection: settings come by falling mean, so the first one of a variant is its best.
    best: dict[str, SettingScore] = {}
    for setting in ranked:
        if VARIANT_KEY in setting.settings and SHARE_KEY not in setting.settings:
            best.setdefault(str(setting.settings[VARIANT_KEY]), setting)
    names = [name for name in order if name in best]
    if len(names) < 2:
        return []
    by_id = {result.id: result for result in results}
    tests = {row.variant: row.tests for row in selection.variants} if selection else {}
    reference = best[names[0]]
    rows = []
    for name in names:
        setting = best[name]
        group = [by_id[identity] for identity in setting.trials]
        is_first = name == names[0]
        test = tests.get(name, {}).get(group[0].metric)
        rows.append(
            AblationRow(
                variant=name,
                label=setting.label,
                means=setting_means(group),
                sd=setting.sd,
                difference=None if is_first else setting.mean - reference.mean,
                # Two different questions: whether the difference would hold on other dialogues, and whether other
                # trainings on the same data would show it.
                dialogues_p=test.p if test else None,
                seeds_p=None if is_first else _paired_by_seed(group, [by_id[i] for i in reference.trials]),
            )
        )
    return rows


def _paired_by_seed(first: Sequence[TrialResult], second: Sequence[TrialResult]) -> float | None:
    """p of Student's paired t test over equal seeds, or None if there are fewer than two or all differ by the same."""
    from scipy import stats

    others = {result.seed: result.score for result in second}
    pairs = [(result.score, others[result.seed]) for result in first if result.seed in others]
    # Equal differences have no variance, so t is not defined.
    differences = {a - b for a, b in pairs}
    if len(pairs) < 2 or len(differences) == 1:
        return None
    return float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue)


def write_ablation_csv(path: Path, rows: Sequence[AblationRow]) -> str:
    """Write the ablation table's data and return the file's name."""
    keys = [*rows[0].means]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["variant", *keys, "sd", "difference", "p_dialogues", "p_seeds"])
    for row in rows:
        writer.writerow(
            [
                row.variant,
                *(row.means[key] for key in keys),
                row.sd,
                row.difference,
                row.dialogues_p,
                row.seeds_p,
            ]
        )
    write_text(path, text.getvalue())
    return path.name


def latex_table(
    name: str,
    ranked: Sequence[SettingScore],
    results: Sequence[TrialResult],
    baselines: Mapping[str, Mapping[str, float]],
) -> str:
    """A booktabs table of the settings and the trivial rules on validation. The best mean of a column is bold."""
    columns = columns_of(results[0].metric)
    by_id = {result.id: result for result in results}
    groups = [[by_id[identity] for identity in setting.trials] for setting in ranked]
    means = [setting_means(group) for group in groups]
    best = {key: max((v for m in means if (v := m[key]) is not None), default=None) for key, _ in columns}
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{tabular}{l" + "r" * len(columns) + "}",
        "\\toprule",
        "setting & " + " & ".join(latex_escaped(title) for _, title in columns) + " \\\\",
        "\\midrule",
    ]
    for setting, row in zip(ranked, means, strict=True):
        cells = [_cell(row[key], is_best=row[key] == best[key]) for key, _ in columns]
        if setting.sd is not None:
            place = next(n for n, (key, _) in enumerate(columns) if key == by_id[setting.trials[0]].metric)
            cells[place] += f" \\tiny{{$\\pm${setting.sd:.2f}}}"
        lines.append(f"{latex_escaped(setting.label)} & " + " & ".join(cells) + " \\\\")
    lines.append("\\midrule")
    for rule, values in baselines.items():
        cells = [_cell(values.get(key), is_best=False) for key, _ in columns]
        lines.append(f"{latex_escaped(rule)} & " + " & ".join(cells) + " \\\\")
    lines += [
        "\\bottomrule",
        "\\end{tabular}",
        f"% sweep {name}: means over seeds on validation, $\\pm$ sd over seeds",
    ]
    return "\n".join(lines) + "\n"


def _cell(value: float | None, *, is_best: bool) -> str:
    if value is None:
        return "--"
    return f"\\textbf{{{value:.2f}}}" if is_best else f"{value:.2f}"


def latex_escaped(text: str) -> str:
    """A label in LaTeX, with its special characters, Greek letters and comparisons."""
    # A backslash before ~ or ^ would be an accent over the next letter.
    marks = {
        "α": "$\\alpha$",
        "τ": "$\\tau$",
        ">=": "$\\geq$",
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
    }
    pattern = r"α|τ|>=|\\|[&%$#_{}~^]"
    return re.sub(pattern, lambda found: marks.get(found[0], "\\" + found[0]), text)
