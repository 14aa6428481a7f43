"""The paper's tables with our figures in them: Table 4, and Tables 5 and 6 if the sweep tried what they compare.

    Table 4   systems on causal spans (ECSPE) and on cause utterances (ECPE)
    Table 5   what each part of the method is worth
    Table 6   causal spans if the fine or the coarse emotion is given

A table is rows by column, whatever it shows, so that one function writes CSV and LaTeX and one template shows it. Rows
of other systems join Table 4 as `Row`s, too.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdecs.artifact import write_text
from kdecs.config import CONFIG_NAME
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig, TrialConfig, load_trial_config
from kdecs.sweep.report import published
from kdecs.sweep.report.tables import columns_of, latex_escaped
from kdecs.sweep.selection.pick import best_seed
from kdecs.sweep.selection.record import SelectionRecord, SettingScore
from kdecs.sweep.space import SHARE_KEY, VARIANT_KEY
from kdecs.sweep.status import TrialResult, student_file, trial_directory

Source = Literal["paper", "trivial rule", "ours"]
Values = Mapping[str, float | None]
TITLES = {
    "emotion_accuracy": "Emo Acc",
    "exact_match": "EM",
    "positive_f1": "Pos F1",
    "negative_f1": "Neg F1",
    "macro_f1": "macro F1",
    "utterance_positive_f1": "Pos F1",
    "utterance_negative_f1": "Neg F1",
    "utterance_macro_f1": "macro F1",
}


@dataclass(frozen=True, slots=True)
class Row:
    """A row: a system, where its figures come from, and its scores in percent for each group of columns."""

    name: str
    source: Source
    values: Mapping[str, Values]


@dataclass(frozen=True, slots=True)
class PaperTable:
    """A table of the paper. `groups` are heads that span columns, each with the scores below it."""

    name: str
    title: str
    groups: Mapping[str, tuple[str, ...]]
    rows: tuple[Row, ...]
    caption: str

    def columns(self) -> list[tuple[str, str]]:
        """(group, score) of every column."""
        return [(group, key) for group, keys in self.groups.items() for key in keys]

    def cells(self, row: Row) -> list[float | None]:
        """The figures of a row, None where it has none."""
        return [row.values.get(group, {}).get(key) for group, key in self.columns()]


@dataclass(frozen=True, slots=True)
class ScoredSweep:
    """A finished sweep as a table reads it: its settings by rank, trials, selection and trivial rules."""

    directory: Path
    config: SweepConfig
    ranked: Sequence[SettingScore]
    results: Sequence[TrialResult]
    baselines: Mapping[str, Mapping[str, float]]
    selection: SelectionRecord | None

    @property
    def baselines_tried(self) -> list[SettingScore]:
        """The best setting of each baseline, in the config's order."""
        best: dict[str, SettingScore] = {}
        for setting in self.ranked:  # by falling mean
            best.setdefault(str(setting.settings.get(VARIANT_KEY)), setting)
        return [best[name] for name in self.config.baselines if name in best]

    @property
    def best_student(self) -> SettingScore:
        """The setting that was chosen, or the best one that is no baseline; of baselines alone, the best of them."""
        if self.selection:
            return self.selection.setting
        students = (s for s in self.ranked if s.settings.get(VARIANT_KEY) not in self.config.baselines)
        return next(students, self.ranked[0])

    @property
    def is_ecpe(self) -> bool:
        """Whether its students find cause utterances without spans."""
        return self.results[0].metric == "utterance_macro_f1"

    def on_test(self, settings: Sequence[SettingScore]) -> dict[str, Mapping[str, float]] | None:
        """Test scores by the settings' keys, or None unless all of them were scored on test."""
        record = self.selection
        if record is None:
            return None
        found = {row.id: row.scores for row in record.table if row.scores is not None}
        if record.test is not None:
            found[record.winner.id] = record.test
        scored: dict[str, Mapping[str, float]] = {}
        for setting in settings:
            scores = next((found[identity] for identity in setting.trials if found.get(identity)), None)
            if scores is None:
                return None
            scored[setting.key] = scores
        return scored

    def on_validation(self, setting: SettingScore) -> dict[str, float]:
        """The mean over seeds of every score that all seeds of a setting have."""
        group = [result for result in self.results if result.id in setting.trials]
        keys = set.intersection(*(set(result.metrics) for result in group)) & set(TITLES)
        return {key: sum(result.metrics[key] for result in group) / len(group) for key in keys}

    def scores_of(
        self, settings: Sequence[SettingScore]
    ) -> tuple[Literal["test", "validation"], dict[str, Values]]:
        """The split and the scores by the settings' keys: those of test if it was opened for all of them."""
        on_test = self.on_test(settings)
        if on_test is not None:
            return "test", dict(on_test)
        return "validation", {setting.key: self.on_validation(setting) for setting in settings}

    def seed_of(self, setting: SettingScore) -> int:
        """The seed that stands for a setting on test."""
        record = self.selection
        scored = {row.id: row.seed for row in record.table} if record else {}
        if record:
            scored[record.winner.id] = record.winner.seed
        known = next((scored[identity] for identity in setting.trials if identity in scored), None)
        return best_seed(list(self.results), setting).seed if known is None else known

    def rules(self, split: str) -> Mapping[str, Mapping[str, float]]:
        """The scores of the trivial rules on the split that our rows show."""
        return self.selection.test_baselines if split == "test" and self.selection else self.baselines

    def about(self, split: str, settings: Sequence[SettingScore]) -> str:
        """What a caption says of our rows: universe, split, numbers of rows, seeds."""
        record = self.selection
        config = _trial_config(self, settings[0])
        numbers = sorted({setting.num_seeds for setting in settings})
        seeds = f"{' or '.join(map(str, numbers))} seed{'s' if numbers != [1] else ''}"
        if split == "test" and record and record.test and config.corpus.test:
            return (
                f"Ours: sweep {self.config.name}, test split {config.corpus.test.name}, universe {record.universe}, "
                f"protocol {record.protocol}, {record.test['num_positive']} positive and "
                f"{record.test['num_negative']} negative rows; one student of {seeds} per setting, chosen on "
                f"validation (seed {', '.join(str(self.seed_of(setting)) for setting in settings)})."
            )
        return (
            f"Ours: sweep {self.config.name}, validation split {config.corpus.valid.name}, universe fold1, protocol "
            f"reccon; means over {seeds}. These are no test scores, because test was not opened for "
            f"{'the winner' if record is None else 'every setting'}: "
            f"{'kdecs.launch.select_student' if record is None else 'kdecs.launch.select_student --table'} does that."
        )


def paper_tables(sweep: ScoredSweep, beside: Sequence[ScoredSweep] = ()) -> list[PaperTable]:
    """Table 4 with the systems of all sweeps, and Tables 5 and 6 if the first one tried their variants."""
    found = [_table_4([sweep, *beside]), _table_5(sweep), _table_6(sweep)]
    return [table for table in found if table is not None]


PAPER = "The paper's figures are those of Chen et al. (2024) on its own corpora and pairs."


def _table_4(sweeps: Sequence[ScoredSweep]) -> PaperTable:
    spans, utterances = "spans (ECSPE)", "cause utterances (ECPE)"
    names = [name for name in {**published.TABLE_4_SPANS, **published.TABLE_4_UTTERANCES} if name != "KD-ECS"]
    rows = [
        Row(
            name,
            "paper",
            {
                spans: published.TABLE_4_SPANS.get(name, {}),
                utterances: published.TABLE_4_UTTERANCES.get(name, {}),
            },
        )
        for name in [*names, "KD-ECS"]
    ]
    # One row for a system that both halves have: the same rule, or the same setting in a sweep of either task.
    rules: dict[str, dict[str, Values]] = {}
    ours: dict[str, dict[str, Values]] = {}
    about = []
    for sweep in sweeps:
        half = utterances if sweep.is_ecpe else spans
        best = sweep.best_student
        split, scores = sweep.scores_of([best])
        shown = [(best, split, scores)]
        others = [*best_of_variants(sweep).values(), *sweep.baselines_tried]
        shown += [(each, *sweep.scores_of([each])) for each in others if each.key != best.key]
        for setting, its_split, its_scores in shown:
            label = f"{setting.label} ({its_split})"
            if half in ours.get(label, {}):
                label = f"{sweep.config.name}: {label}"
            ours.setdefault(label, {})[half] = its_scores[setting.key]
        for name, values in sweep.rules(split).items():
            rules.setdefault(f"{name} ({split})", {}).setdefault(half, values)
        about.append(sweep.about(split, [setting for setting, its_split, _ in shown if its_split == split]))
    rows += [Row(name, "trivial rule", values) for name, values in rules.items()]
    rows += [Row(name, "ours", values) for name, values in ours.items()]
    return PaperTable(
        "table4",
        "Systems beside the paper's (Table 4)",
        {spans: published.SPANS, utterances: published.UTTERANCES},
        tuple(rows),
        " ".join([*about, PAPER]),
    )


def _table_5(sweep: ScoredSweep) -> PaperTable | None:
    best = best_of_variants(sweep)
    named = [name for name in best if name in published.TABLE_5]
    # The paper's table is about spans.
    if len(named) < 2 or sweep.is_ecpe or any(SHARE_KEY in setting.settings for setting in sweep.ranked):
        return None
    split, scores = sweep.scores_of(list(best.values()))
    ours = f"ours, {split}"
    rows = [
        Row(name, "ours", {"paper": published.TABLE_5.get(name, {}), ours: scores[setting.key]})
        for name, setting in best.items()
    ]
    rows += [
        Row(name, "trivial rule", {ours: values})
        for name, values in sweep.rules(split).items()
        if "exact_match" in values
    ]
    return PaperTable(
        "table5",
        "What each part is worth (Table 5)",
        {"paper": published.ABLATION, ours: (*published.ABLATION, "emotion_accuracy")},
        tuple(rows),
        f"{sweep.about(split, list(best.values()))} {PAPER}",
    )


def _table_6(sweep: ScoredSweep) -> PaperTable | None:
    given: dict[str, SettingScore] = {}
    for setting in sweep.ranked:  # the best of a kind comes first
        config = _trial_config(sweep, setting)
        if isinstance(config, StudentConfig):
            given.setdefault(config.model.given_emotions, setting)
    if not {"fine", "coarse"} <= given.keys():
        return None
    asked = [each for each in sweep.baselines_tried if _trial_config(sweep, each).is_given_emotions]
    shown = [given["fine"], given["coarse"], *asked]
    split, scores = sweep.scores_of(shown)
    fine, coarse = "fine emotion given", "coarse emotion given"
    rows = [
        Row(name, "paper", {fine: values, coarse: published.TABLE_6_COARSE[name]})
        for name, values in published.TABLE_6_FINE.items()
    ]
    rows += [
        Row(f"{name} ({split})", "trivial rule", {fine: values, coarse: values})
        for name, values in sweep.rules(split).items()
        if "exact_match" in values
    ]
    ours = {fine: scores[given["fine"].key], coarse: scores[given["coarse"].key]}
    rows.append(Row(f"{sweep.config.name} ({split})", "ours", ours))
    # Its questions name the corpus' own labels, which are the fine ones where a student is given both.
    rows += [Row(f"{each.label} ({split})", "ours", {fine: scores[each.key]}) for each in asked]
    return PaperTable(
        "table6",
        "Spans with the given emotion (Table 6)",
        {fine: published.GIVEN, coarse: published.GIVEN},
        tuple(rows),
        f"{sweep.about(split, shown)} {PAPER}",
    )


def best_of_variants(sweep: ScoredSweep) -> dict[str, SettingScore]:
    """The best setting of each variant on validation, in the config's order."""
    best: dict[str, SettingScore] = {}
    for setting in sweep.ranked:  # by falling mean
        if VARIANT_KEY in setting.settings:
            best.setdefault(str(setting.settings[VARIANT_KEY]), setting)
    return {name: best[name] for name in sweep.config.variants if name in best}


def _trial_config(sweep: ScoredSweep, setting: SettingScore) -> TrialConfig:
    result = next(result for result in sweep.results if result.id in setting.trials)
    return load_trial_config(student_file(trial_directory(sweep.directory, result), CONFIG_NAME))


def write_table(folder: Path, table: PaperTable) -> list[str]:
    """Write a table as CSV and as LaTeX; returns the names of the files."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["system", "source", *(f"{group}: {key}" for group, key in table.columns())])
    writer.writerows([row.name, row.source, *table.cells(row)] for row in table.rows)
    write_text(folder / f"{table.name}.csv", text.getvalue())
    write_text(folder / f"{table.name}.tex", _latex(table))
    return [f"{table.name}.csv", f"{table.name}.tex"]


def write_settings_csv(path: Path, sweep: ScoredSweep) -> str:
    """Write every setting's scores on validation, and on test where it was scored; returns the file's name."""
    keys = [key for key, _ in columns_of(sweep.results[0].metric)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "setting",
            "seeds",
            *(f"valid_{key}" for key in keys),
            "chosen_seed",
            *(f"test_{key}" for key in keys),
        ]
    )
    for setting in sweep.ranked:
        valid, scores = sweep.on_validation(setting), sweep.on_test([setting])
        test: Values = scores[setting.key] if scores else {}
        numbers = [setting.num_seeds, *(valid.get(key) for key in keys)]
        writer.writerow([setting.label, *numbers, sweep.seed_of(setting), *(test.get(key) for key in keys)])
    write_text(path, text.getvalue())
    return path.name


def _latex(table: PaperTable) -> str:
    heads, rules, first = [], [], 2
    for group, keys in table.groups.items():
        heads.append(f"\\multicolumn{{{len(keys)}}}{{c}}{{{latex_escaped(group)}}}")
        rules.append(f"\\cmidrule(lr){{{first}-{first + len(keys) - 1}}}")
        first += len(keys)
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        "\\begin{tabular}{l" + "r" * len(table.columns()) + "}",
        "\\toprule",
        " & " + " & ".join(heads) + " \\\\",
        " ".join(rules),
        "system & " + " & ".join(TITLES[key] for _, key in table.columns()) + " \\\\",
    ]
    source = None
    for row in table.rows:
        if row.source != source:
            lines.append("\\midrule")
            source = row.source
        cells = ["--" if value is None else f"{value:.2f}" for value in table.cells(row)]
        lines.append(f"{latex_escaped(row.name)} & " + " & ".join(cells) + " \\\\")
    lines += [
        "\\bottomrule",
        "\\end{tabular}",
        f"\\caption{{{latex_escaped(table.title)}. {latex_escaped(table.caption)}}}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"
