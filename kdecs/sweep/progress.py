"""What a sweep's user sees: progress while trials train, and the dry run with its estimate of hours.

SweepProgress    a live table on a terminal, one line per trial that ended in a log
print_dry_run    trials and their states, the estimated time for the rest, teachers whose labels are missing
estimate_left    that time, from trials that were measured, else from arithmetic
"""

import json
import math
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kdecs.baselines.config import MrcConfig
from kdecs.baselines.generative.config import GenerativeConfig
from kdecs.corpus.encoding import Layout
from kdecs.corpus.pairs import pairs_of, training_subset
from kdecs.corpus.schema import NEUTRAL
from kdecs.corpus.splits import CorpusConfig, training_split
from kdecs.errors import ConfigError, KdecsError
from kdecs.student.config import StudentConfig
from kdecs.sweep.config import SweepConfig, TrialConfig, num_epochs
from kdecs.sweep.search import Search
from kdecs.sweep.space import Trial, missing_teachers
from kdecs.sweep.status import TrialResult, is_trained, metric_title, read_note, trial_points
from kdecs.sweep.teachers import build_commands
from kdecs.sweep.trial import find_student
from kdecs.tables import duration, terminal
from kdecs.tracking.record import METRICS_NAME

_MOVING = ("running", "stopped")
_ENDED = ("complete", "pruned", "failed")
_KEPT_OUT = {"held": "stopped by hand", "dropped": "dropped by hand"}
_BAR_WIDTH = 12
_NUM_BEST = 5
_CHARACTERS_PER_TOKEN = 4.0  # of English text in a subword vocabulary
_TEMPLATE_CHARACTERS = 120  # of a prompt beside the utterances
_INSTRUCTION_CHARACTERS = 700  # of what the questions about a dialogue have in common beside it
_ANSWER_CHARACTERS = 120  # of the question's own end and a usual answer
_GPU_TFLOPS = 40.0  # what a data-centre GPU sustains in such a training, not its peak
_CORE_TFLOPS = 0.03  # of one CPU core in float32
# Of bases by name: a name on a hub says nothing of its size, and a dry run downloads nothing.
_PARAMETERS = {
    "roberta-base": 0.125e9,
    "roberta-large": 0.355e9,
    "bert-base-uncased": 0.11e9,
    "llama-7b": 6.7e9,
    "llama-13b": 13.0e9,
}
_USUAL_PARAMETERS = 0.125e9


class SweepProgress:
    """Shows the trials that run, the best so far and the time left. Use it as a context manager.

    `num_trials` may be set again when settings are added.

    `before` are the results before this start. What had ended then is not printed, and its epochs do not count for the
    rate. A failed trial is tried, and printed, again.
    """

    def __init__(
        self,
        config: SweepConfig,
        num_trials: int,
        before: list[TrialResult],
        *,
        console: Console | None = None,
    ) -> None:
        self._name = config.name
        self.num_trials = num_trials
        self._began = time.monotonic()
        self._epochs_before = _epochs_done(before)
        self._printed = {result.id for result in before if result.status in ("complete", "pruned")}
        self._kept_out = {result.id: result.status for result in before if result.status in _KEPT_OUT}
        self._console = console or terminal(file=sys.stdout, highlight=False)
        # Without a thread of Rich's: the driver calls `update` once a second anyway.
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, results: list[TrialResult]) -> None:
        """Show the state. A trial that ended, and what a person asked of one, is printed once."""
        for result in results:
            self._print_kept_out(result)
            if result.status in _ENDED and result.id not in self._printed:
                self._printed.add(result.id)
                self._console.print(self._ended_line(result), soft_wrap=True)
        if self._console.is_terminal:
            self._live.update(self.table(results), refresh=True)

    def table(self, results: list[TrialResult]) -> Group:
        """What runs now, the best so far, and a line of totals."""
        table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="dim")
        table.add_column("trial", overflow="ellipsis", no_wrap=True, ratio=1)
        table.add_column("epoch", no_wrap=True)
        for title in ("macro F1", "time"):
            table.add_column(title, justify="right", no_wrap=True)
        # What a terminal's height leaves after the best trials, the head, the totals and the prompt.
        room = max(3, self._console.size.height - _NUM_BEST - 5)
        running = [result for result in results if result.status in _MOVING]
        for result in running[:room]:
            # The first attempt's seconds are written at the end of each epoch only, so the clock shows its age.
            since_start = time.time() - result.started if result.attempts == 1 and result.started else 0
            age = duration(max(result.seconds, since_start))
            table.add_row(result.label, _bar(result), _score(result), age)
        if len(running) > room:
            table.add_row(f"and {len(running) - room} more", "", "", "", style="dim")
        scored = [r for r in results if r.status == "complete" and r.has_score]
        for result in sorted(scored, key=lambda r: -r.score)[:_NUM_BEST]:
            table.add_row(
                f"✓ {result.label}", _bar(result), _score(result), duration(result.seconds), style="green"
            )
        return Group(table, Text(f"{self._name}: {self.summary(results)}", style="bold"))

    def summary(self, results: list[TrialResult]) -> str:
        """Such as `3/8 trials done, 2 running, best macro F1 61.20 (llama-7b α0.6 τ2 s3), 1m40s, about 3m left`."""
        counts = Counter(result.status for result in results)
        number = self.num_trials - counts["dropped"]
        parts = [f"{counts['complete'] + counts['pruned']}/{number} trials done"]
        if counts["pruned"]:
            parts.append(f"{counts['pruned']} of them stopped by the search")
        if moving := sum(counts[status] for status in _MOVING):
            parts.append(f"{moving} running")
        if counts["failed"]:
            parts.append(f"{counts['failed']} failed")
        for status, words in _KEPT_OUT.items():
            if counts[status]:
                parts.append(f"{counts[status]} {words}")
        scored = [r for r in results if r.status == "complete" and r.has_score]
        if scored:
            best = max(scored, key=lambda result: result.score)
            parts.append(f"best {metric_title(best.metric)} {best.score:.2f} ({best.label})")
        parts.append(duration(time.monotonic() - self._began))
        if left := self.seconds_left(results):
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def seconds_left(self, results: list[TrialResult]) -> float | None:
        """The time for the epochs that are left, at this start's rate. None before its first epoch, and at the end."""
        # In epochs rather than trials: a trial that has just begun counts by what is left of it, and the first estimate
        # comes after one epoch.
        done = _epochs_done(results) - self._epochs_before
        known = [result for result in results if result.status not in (*_ENDED, *_KEPT_OUT)]
        unknown = max(0, self.num_trials - len(results))  # trials of a search that are not chosen yet
        mean_epochs = sum(result.epochs for result in results) / max(1, len(results))
        left = sum(result.epochs - result.epoch for result in known) + unknown * mean_epochs
        if done <= 0 or left <= 0:
            return None
        return (time.monotonic() - self._began) / done * left

    def _print_kept_out(self, result: TrialResult) -> None:
        before, now = self._kept_out.get(result.id), result.status if result.status in _KEPT_OUT else None
        if now == before:
            return
        if now is None:
            del self._kept_out[result.id]
            self._printed.discard(result.id)  # it may end once more
            line = f"{result.label}: resumed"
        else:
            self._kept_out[result.id] = now
            line = f"{result.label}: {_KEPT_OUT[now]} after {result.epoch} of {result.epochs} epochs"
        self._console.print(line, soft_wrap=True)

    def _ended_line(self, result: TrialResult) -> str:
        line = f"trial {len(self._printed)}/{self.num_trials} {result.label}: "
        if result.status == "failed":
            return f"{line}failed ({result.error}); log: {result.log}"
        shown = (
            f"validation {metric_title(result.metric)} {_score(result)}"
            if _score(result)
            else "no validation score"
        )
        if result.status == "pruned":
            return f"{line}{shown}, stopped by the search after {result.epoch} of {result.epochs} epochs"
        if result.reused_from:
            return f"{line}{shown}, taken from {result.reused_from}"
        return f"{line}{shown}, {duration(result.seconds)}"


def _epochs_done(results: list[TrialResult]) -> int:
    """Epochs that were trained in this sweep. A student from the store cost nothing."""
    return sum(result.epoch for result in results if not result.reused_from)


def _score(result: TrialResult) -> str:
    return f"{result.score:.2f}" if result.has_score else ""


def _bar(result: TrialResult) -> str:
    share = 1.0 if result.status == "complete" else result.epoch / max(1, result.epochs)
    filled = round(_BAR_WIDTH * share)
    return f"{'━' * filled}{'╌' * (_BAR_WIDTH - filled)} {result.epoch}/{result.epochs}"


def print_dry_run(config: SweepConfig) -> None:
    """Print every trial with its state, the estimated hours for the rest, and the teachers whose labels are missing."""
    missing = missing_teachers(config)
    search = Search(config, planned=True)
    # The digests of a search need the content of the labels.
    if not missing:
        search.refuse_other_search()
    table = Table("trial", "id", "state", "epochs", "macro F1", "time", title=f"sweep {config.name}")
    known, left, num_stored, num_kept_out = search.trials(), [], 0, 0
    for trial, stage in known.values():
        result = search.result(trial, stage, is_live=True)  # a driver may run at the same time
        state = result.status
        if not trial.config_hash:
            state = "no labels"
            left.append(trial)
        elif (
            state not in ("complete", *_KEPT_OUT)
            and config.reuse_students
            and _is_taken_from_store(config, trial)
        ):
            state, num_stored = "in the store", num_stored + 1
        elif state in _KEPT_OUT:
            num_kept_out, state = num_kept_out + 1, _KEPT_OUT[state]
        elif state != "complete" and not (stage == "search" and state == "pruned"):
            left.append(trial)
        table.add_row(
            trial.label,
            trial.id if trial.config_hash else "",
            state,
            str(num_epochs(trial.config)),
            f"{result.score:.2f}" if result.has_score else "",
            duration(result.seconds) if result.seconds else "",
        )
    console = terminal(highlight=False)
    console.print(table)
    number = search.num_trials()
    num_done = len(known) - len(left) - num_stored - num_kept_out
    num_to_train = number - num_done - num_stored - num_kept_out
    line = f"{number} trials, {num_done} complete, {num_to_train} to train"
    line += f", {num_stored} in the store" if num_stored else ""
    console.print(line + (f", {num_kept_out} kept out by hand" if num_kept_out else ""), soft_wrap=True)
    if number > len(known):
        console.print(
            f"{number - len(known)} of them become known during the search ({config.search.method})",
            soft_wrap=True,
        )
    trials = [trial for trial, _ in known.values()] or [search.example]
    _print_hours(console, config, trials, left, number - len(known))
    for name in missing:
        labels = config.teachers[name].labels
        try:
            commands = build_commands(config, name)
        except ConfigError:
            console.print(f"teacher {name}: no soft labels at {labels}; export them first", soft_wrap=True)
            continue
        console.print(f"teacher {name}: no soft labels at {labels}; --build runs", soft_wrap=True)
        for _, arguments in commands:
            console.print(f"  {shlex.join(arguments)}", soft_wrap=True, style="dim")


def _print_hours(
    console: Console, config: SweepConfig, trials: list[Trial], left: list[Trial], num_unknown: int
) -> None:
    if not left and not num_unknown:
        return
    try:
        estimate = estimate_left(config, trials, left or trials)
    except KdecsError as error:  # the corpus or a base is not on this machine, which a dry run may well find
        console.print(f"hours unknown: {error}", soft_wrap=True)
        return
    # What a search has not chosen yet is taken to cost as much as what is known.
    mean = estimate.seconds / max(1, len(left or trials))
    seconds = mean * (len(left) + num_unknown)
    at_a_time = config.max_concurrent_trials
    if at_a_time is None and not config.gpus_per_trial and not config.ray_address:
        # Without GPUs and a cluster, this machine's cores decide.
        at_a_time = max(1, math.floor(len(os.sched_getaffinity(0)) / config.cpus_per_trial))
    unit = "GPU" if config.gpus_per_trial else "CPU"
    hours = seconds / 3600 * (config.gpus_per_trial or config.cpus_per_trial)
    when = f"about {duration(seconds / at_a_time)} with {at_a_time} at a time, " if at_a_time else ""
    console.print(f"{when}{hours:.1f} {unit} hours ({estimate.source})", soft_wrap=True)


def _is_taken_from_store(config: SweepConfig, trial: Trial) -> bool:
    """Whether the trial will take a finished student, which only a trial without epochs of its own does."""
    has_own_epochs = bool(trial_points(trial.directory / METRICS_NAME, trial.config.kind))
    return not has_own_epochs and find_student(config.student_store, trial.config_hash) is not None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds for one trial after another, and where the figure comes from."""

    seconds: float
    source: str


def estimate_left(config: SweepConfig, trials: Sequence[Trial], left: Sequence[Trial]) -> Estimate:
    """The time for the trials in `left`, summed. Complete ones among `trials`, all of the sweep, are the measure."""
    measured = [(trial, rate) for trial in trials if (rate := _seconds_per_epoch(config, trial)) is not None]
    if measured:
        mean = sum(rate for _, rate in measured) / len(measured)
        # By the token, since trials with other shares or budgets have shorter or longer epochs.
        per_token = sum(
            rate * num_epochs(trial.config) / _trained_tokens(trial.config) for trial, rate in measured
        ) / len(measured)
        seconds = sum(per_token * _trained_tokens(trial.config) for trial in left)
        return Estimate(seconds, f"measured: {len(measured)} trials, {mean:.1f} s per epoch")
    tflops = config.effective_tflops or (
        _GPU_TFLOPS * config.gpus_per_trial if config.gpus_per_trial else _CORE_TFLOPS * config.cpus_per_trial
    )
    seconds = 0.0
    for trial in left:
        # Per parameter and token: two operations forward, four backward.
        operations = 6 * _parameters(trial.config.model.base) * _trained_tokens(trial.config)
        seconds += operations / (tflops * 1e12)
    return Estimate(seconds, f"arithmetic: {tflops:g} TFLOP/s per trial (set effective_tflops), all epochs")


def _seconds_per_epoch(config: SweepConfig, trial: Trial) -> float | None:
    # A student in the store was trained with the same settings, so its time is as good a measure.
    places = [trial.directory if is_trained(trial) else None]
    places.append(find_student(config.student_store, trial.config_hash) if trial.config_hash else None)
    for place in places:
        note = read_note(place) if place else None
        points = trial_points(place / METRICS_NAME, trial.config.kind) if place else []
        if note and note.seconds and points:
            return note.seconds / len(points)
    return None


def _trained_tokens(config: TrialConfig) -> float:
    """Tokens of all steps of a training that nothing ends early."""
    if isinstance(config, StudentConfig):
        distillation = config.distillation
        # Pairs without gold labels are distilled; every other training leaves them out.
        has_all = distillation.mode == "kd" and distillation.outside_share == "distil"
        share = 1.0 if has_all else distillation.hard_share
        longest, layout = config.model.max_prompt_tokens, config.model.layout
        number, tokens = _tokens_of_pass(config.corpus, share, config.neutral_share, longest, layout)
        if distillation.gold_repeats > 1:
            gold_share = distillation.hard_share
            gold = _tokens_of_pass(config.corpus, gold_share, config.neutral_share, longest, layout)
            number += (distillation.gold_repeats - 1) * gold[0]
            tokens += (distillation.gold_repeats - 1) * gold[1]
    elif isinstance(config, GenerativeConfig):
        return config.optimization.epochs * _tokens_of_answers(config.corpus)
    elif isinstance(config, MrcConfig):
        number, tokens = _tokens_of_pass(config.corpus, 1.0, 0.0, config.model.max_tokens)
    else:
        number, tokens = _tokens_of_dialogues(config.corpus, by_target=config.system_name == "ueca-prompt")
    optimization = config.optimization
    if optimization.steps:
        (batch,) = config.batches.size.values()
        return optimization.steps * batch * tokens / max(1.0, number)
    return optimization.num_epochs * tokens


@cache
def _tokens_of_pass(
    corpus: CorpusConfig, share: float, neutral_share: float, longest: int, layout: Layout = "pair"
) -> tuple[float, float]:
    """The pairs of a pass over a share of the training dialogues, and their tokens by the characters of each prompt.

    In the layout tree the pairs of a target share its history.
    """
    split = training_split(corpus)
    kept = set(training_subset([d.id for d in split], share, corpus.train_share_seed)) if share < 1 else None
    num_pairs = tokens = 0.0
    for place, dialogue in enumerate(split):
        if kept is not None and place not in kept:
            continue
        lengths = [len(utterance.text) for utterance in dialogue.utterances]
        for pair in pairs_of(dialogue, "fold1+neutral"):
            trunk, branch = sum(lengths[: pair.target]), lengths[pair.candidate - 1] + _TEMPLATE_CHARACTERS
            weight = neutral_share if pair.emotion == NEUTRAL else 1.0
            num_pairs += weight
            read = min((trunk + branch) / _CHARACTERS_PER_TOKEN, longest)
            # The pair (i, i), which every target has, stands for the trunk.
            if layout == "tree" and pair.candidate != pair.target:
                read = min(branch / _CHARACTERS_PER_TOKEN, longest)
            tokens += weight * read
    return num_pairs, tokens


@cache
def _tokens_of_dialogues(corpus: CorpusConfig, *, by_target: bool) -> tuple[float, float]:
    """The dialogues of a baseline's pass, and their tokens: an utterance counts once, or for each target from it on."""
    number = total = 0.0
    for dialogue in training_split(corpus):
        number += 1
        for place, utterance in enumerate(dialogue.utterances):
            reads = len(dialogue.utterances) - place if by_target else 1
            total += reads * (len(utterance.text) / _CHARACTERS_PER_TOKEN)
    return number, total


@cache
def _tokens_of_answers(corpus: CorpusConfig) -> float:
    """The tokens of a generative baseline's pass: each dialogue once, and a question with its answer per utterance."""
    characters = 0.0
    for dialogue in training_split(corpus):
        characters += _INSTRUCTION_CHARACTERS + sum(len(each.text) for each in dialogue.utterances)
        characters += _ANSWER_CHARACTERS * len(dialogue.utterances)
    return characters / _CHARACTERS_PER_TOKEN


@cache
def _parameters(base: str) -> float:
    """Parameters of a base by the size of its weights, or by its name."""
    folder = Path(base)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    if weights:
        config = folder / "config.json"
        try:
            dtype = json.loads(config.read_text(encoding="utf-8")).get("dtype")
        except (
            OSError,
            ValueError,
            AttributeError,
        ):  # this is an estimate: the training says what is wrong with it
            dtype = None
        return weights / (2 if dtype in ("bfloat16", "float16") else 4)
    return _PARAMETERS.get(folder.name, _USUAL_PARAMETERS)
