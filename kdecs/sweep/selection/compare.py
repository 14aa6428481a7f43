"""Settings of one or several sweeps against one of them, on validation: means over seeds, and paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdecs.artifact import sha256_of_file
from kdecs.config import CONFIG_NAME
from kdecs.errors import ArtifactError, ConfigError, printable
from kdecs.evaluation.significance import Comparison, holm
from kdecs.sweep.config import load_trial_config
from kdecs.sweep.selection.choose import compare_settings
from kdecs.sweep.selection.record import SettingScore, rank_settings
from kdecs.sweep.space import VARIANT_KEY
from kdecs.sweep.status import TrialResult, read_results, student_file, trial_directory

SHOWN = {
    "macro_f1": "macro F1",
    "positive_f1": "Pos F1",
    "exact_match": "EM",
    "utterance_macro_f1": "utt. macro F1",
}
SHOWN_OF_UTTERANCES = {"utterance_macro_f1": "macro F1", "emotion_accuracy": "Emo Acc"}
_MAX_NAMES = 12


@dataclass(frozen=True)
class Contender:
    """A setting with its complete trials. `name` is its label, followed by its sweep's name if there are several."""

    name: str
    sweep: Path
    setting: SettingScore
    trials: tuple[TrialResult, ...]

    @property
    def aliases(self) -> set[str]:
        """What it may be called on a command line."""
        return {self.name, self.setting.label, str(self.setting.settings.get(VARIANT_KEY))}

    def mean(self, score: str) -> float | None:
        """The mean over seeds of a score in percent, or None if a student lacks it."""
        values = [trial.metrics[score] for trial in self.trials if score in trial.metrics]
        return sum(values) / len(values) if len(values) == len(self.trials) else None


@dataclass(frozen=True)
class Difference:
    """A contender's score minus the reference's, pooled over the seeds that both have; p by Holm over all of them."""

    name: str
    score: str
    num_seeds: int
    compared: Comparison
    holm_p: float

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """Difference, interval, p and corrected p, as tables show them."""
        of = self.compared
        return (
            f"{of.difference:+.2f}",
            f"{of.low:+.2f} to {of.high:+.2f}",
            f"{of.p:.3f}",
            f"{self.holm_p:.3f}",
        )


def contenders(sweeps: Sequence[Path]) -> list[Contender]:
    """All settings of finished sweeps, by falling mean within each.

    Raises ArtifactError for an unfinished or damaged sweep, ConfigError if sweeps differ in task or validation file.
    """
    found: list[Contender] = []
    kinds: dict[tuple[str, str], Path] = {}
    for sweep in sweeps:
        results = read_results(sweep)
        by_id = {result.id: result for result in results}
        ranked = rank_settings(results)
        for setting in ranked:
            trials = tuple(by_id[identity] for identity in setting.trials)
            name = setting.label if len(sweeps) == 1 else f"{setting.label} ({sweep.name})"
            found.append(Contender(name, sweep, setting, trials))
        first = found[-1].trials[0]
        corpus = load_trial_config(student_file(trial_directory(sweep, first), CONFIG_NAME)).corpus
        kinds[first.metric, sha256_of_file(corpus.valid)] = sweep
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise ConfigError(
            f"{one} and {other}: their students differ in task or validation file, so their scores cannot be compared"
        )
    return found


def named(everyone: Sequence[Contender], name: str) -> Contender:
    """The contender of a label or a variant's name. Raises ArtifactError if it is nobody's or several's."""
    text = " ".join(name.split())
    exact = [each for each in everyone if text == each.name]
    matching = exact or [each for each in everyone if text in each.aliases]
    if len(matching) == 1:
        return matching[0]
    listed = "; ".join(each.name for each in (matching or everyone)[:_MAX_NAMES])
    if matching:
        raise ArtifactError(
            f"{printable(name)}: {len(matching)} settings have this name; name one of {listed}"
        )
    raise ArtifactError(f"{printable(name)}: no setting has this name; there are {listed}")


def differences(reference: Contender, others: Sequence[Contender]) -> list[Difference]:
    """Each of the others minus the reference, by score, in order.

    Holm's correction counts every row: all settings and all scores that are shown together.
    """
    rows: list[tuple[str, str, int, Comparison]] = []
    for other in others:
        seeds = {trial.seed for trial in other.trials} & {trial.seed for trial in reference.trials}
        if not seeds:
            raise ArtifactError(
                f"{other.name} and {reference.name}: no seed was trained of both, so nothing pairs them"
            )
        found = compare_settings((other.sweep, other.trials), (reference.sweep, reference.trials))
        rows += [
            (other.name, score, len(seeds), found[score]) for score in shown(reference) if score in found
        ]
    corrected = holm([compared.p for *_, compared in rows])
    return [Difference(*row, p) for row, p in zip(rows, corrected, strict=True)]


def shown(contender: Contender) -> dict[str, str]:
    """The scores that a comparison shows, with their titles."""
    return SHOWN_OF_UTTERANCES if contender.trials[0].metric == "utterance_macro_f1" else SHOWN
