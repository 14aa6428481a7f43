"""The protocol semeval against a slow, independent implementation, and the submission files."""

import json
import random
import re
import string
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from kdecs.corpus.reading import bundled_sample, read_corpus
from kdecs.errors import PredictionError
from kdecs.evaluation.baselines import trivial_predictions
from kdecs.evaluation.commands import compare, evaluate
from kdecs.evaluation.predictions import Prediction, by_pair, write_predictions
from kdecs.evaluation.semeval import (
    EMOTIONS,
    KEYS,
    PAIR_KEYS,
    clean_span,
    conversation_of,
    place_of,
    read_submission,
    score_submission,
)

app = typer.Typer()
app.command("evaluate")(evaluate)
app.command("compare")(compare)
PAIRS = "emotion-cause_pairs"


def random_task(rng: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Gold conversations and a submission, with repeats, edges inside tokens, and places beyond the utterance."""
    gold, submitted = [], []
    for number in range(1, rng.randint(2, 4)):
        said = [
            {
                "utterance_ID": turn,
                "text": " ".join(
                    rng.choices(["a", ".", "b", "!", "c", "a.", "?b", "..."], k=rng.randint(1, 7))
                ),
                "speaker": "A",
                "emotion": rng.choice(["joy", "anger", "fear", "neutral"]),
            }
            for turn in range(1, rng.randint(2, 5))
        ]
        pairs, places = [], []
        for u in said:
            for _ in range(rng.randint(0, 4)):
                text = rng.choice(said)
                start = rng.randrange(len(text["text"]))
                span = text["text"][start : rng.randint(start + 1, len(text["text"]))]
                if span.strip():
                    pairs.append([f"{u['utterance_ID']}_{u['emotion']}", f"{text['utterance_ID']}_{span}"])
            for _ in range(rng.randint(0, 4)):
                emotion = u["emotion"] if rng.random() < 0.8 else rng.choice(EMOTIONS)
                start = rng.randint(0, 4)
                where = f"{rng.choice(said)['utterance_ID']}_{start}_{start + rng.randint(-1, 4)}"
                places.append([f"{u['utterance_ID']}_{emotion}", where])
        rng.shuffle(pairs)
        head = {"conversation_ID": number, "conversation": said}
        gold.append(head | {PAIRS: pairs})
        submitted.append(head | {PAIRS: places})
    return gold, submitted


def slow_place(span: str, utterance: str) -> tuple[int, int]:
    odd = string.punctuation + string.whitespace
    while span and (span[0] in odd or span[-1] in odd):
        span = span[1:] if span[0] in odd else span[:-1]
    tokens = utterance.split()
    places = [
        (s, e)
        for s in range(len(tokens))
        for e in range(s + 1, len(tokens) + 1)
        if tokens[s:e] == span.split()
    ]
    return places[0] if places else (0, 0)


def ratios(right: float, predicted: float, gold: float) -> list[float]:
    p, r = right / (predicted + 1e-8), right / (gold + 1e-8)
    return [p, r, 2 * p * r / (p + r + 1e-8)]


def slow_scores(gold: list[dict[str, Any]], submitted: list[dict[str, Any]]) -> dict[str, float]:
    """Section by section as the task describes its scores: lists, loops and removals, no sums by dialogue."""
    wanted: list[tuple[Any, ...]] = []
    given: list[tuple[Any, ...]] = []
    for conversation in gold:
        texts = [u["text"] for u in conversation["conversation"]]
        for left, right in conversation[PAIRS]:
            (target, emotion), (cause, span) = left.split("_"), right.split("_", 1)
            item = (
                conversation["conversation_ID"],
                target,
                cause,
                emotion,
                *slow_place(span, texts[int(cause) - 1]),
            )
            if item not in wanted and emotion != "neutral":
                wanted.append(item)
    for conversation in submitted:
        for left, right in conversation[PAIRS]:
            (target, emotion), (cause, start, end) = left.split("_"), right.split("_")
            item = (conversation["conversation_ID"], target, cause, emotion, int(start), int(end))
            if item not in given and emotion != "neutral":
                given.append(item)
    # Each row: right, predicted, gold.
    strict = {e: [0.0, 0.0, 0.0] for e in EMOTIONS}
    tokens = {e: [0.0, 0.0, 0.0] for e in EMOTIONS}
    pairs = {e: [0.0, 0.0, 0.0] for e in EMOTIONS}
    left_over, unmatched = list(wanted), list(wanted)
    for item in given:
        emotion, start, end = item[3:]
        strict[emotion][1] += 1
        if item in left_over:
            left_over.remove(item)
            strict[emotion][0] += 1
        tokens[emotion][1] += end - start
        best = (0.0, 0, ())
        for other in wanted:
            common = min(end, other[5]) - max(start, other[4])
            if other[:4] == item[:4] and common > 0:
                candidate = (common / (other[5] - other[4]), common, other)
                if candidate[:2] > best[:2]:
                    best = candidate
        if best[2]:
            tokens[emotion][0] += best[1]
            tokens[emotion][2] += best[2][5] - best[2][4]
            if best[2] in unmatched:
                unmatched.remove(best[2])
    for item in wanted:
        strict[item[3]][2] += 1
    for item in unmatched:
        tokens[item[3]][2] += item[5] - item[4]
    for column, items in ((1, given), (2, wanted)):
        for key in {item[:4] for item in items}:
            pairs[key[3]][column] += 1
    for key in {item[:4] for item in given} & {item[:4] for item in wanted}:
        pairs[key[3]][0] += 1
    found: dict[str, float] = {}
    for name, table, counts in (
        ("strict_", strict, strict),
        ("proportional_", tokens, strict),
        ("", pairs, pairs),
    ):
        micro = ratios(*(sum(column) for column in zip(*table.values(), strict=True)))
        total = sum(row[2] for row in counts.values())
        weighted = [
            sum(ratios(*table[e])[n] * counts[e][2] / total for e in EMOTIONS) if total else 0.0
            for n in range(3)
        ]
        for n, figure in enumerate(("precision", "recall", "f1")):
            found[f"{name}{figure}" if name else f"{figure}_pair"] = micro[n]
            found[f"weighted_{name}{figure}"] = weighted[n]
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_scores_equal_the_slow_ones(tmp_path_factory, seed):
    gold, submitted = random_task(random.Random(seed))
    folder = tmp_path_factory.getbasetemp()
    (folder / "gold").write_text(json.dumps(gold))
    (folder / "pred").write_text(json.dumps(submitted))
    corpus = read_corpus(folder / "gold", log=False)
    scores = score_submission(corpus, read_submission(folder / "pred", corpus, {}))
    expected = slow_scores(gold, submitted)
    assert set(expected) == set(KEYS)
    for key in KEYS:
        assert scores.values[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-9)
    # Subtask 2 is Subtask 1 without the places.
    for conversation in submitted:
        conversation[PAIRS] = [[left, right.split("_")[0]] for left, right in conversation[PAIRS]]
    (folder / "pred").write_text(json.dumps(submitted))
    pairs = score_submission(corpus, read_submission(folder / "pred", corpus, {}))
    if any(conversation[PAIRS] for conversation in submitted):
        assert pairs.known.keys() == set(PAIR_KEYS)
    assert {key: pairs.values[key] for key in PAIR_KEYS} == {key: scores.values[key] for key in PAIR_KEYS}


@pytest.mark.parametrize(
    ("span", "utterance", "place"),
    [
        ("We won", "Oh , We won . We won !", (2, 4)),
        (' "We won !" ', 'Oh , " We won !', (3, 5)),
        ("won", "We won! won", (2, 3)),
        ("won", "We won!", (0, 0)),
        ("...", "Oh ...", (0, 0)),
        ("e won", "We won", (0, 0)),
        ("a  b", "a b", (0, 2)),
    ],
)
def test_gold_spans_stand_at_their_first_run_of_tokens(span, utterance, place):
    assert place_of(span, utterance) == place
    assert clean_span(clean_span(span)) == clean_span(span)


def row(candidate: int, span: str, *, target: int = 2, emotion: str | None = "happiness") -> Prediction:
    return Prediction("7", target, candidate, emotion, True, span)


def test_predicted_spans_become_tokens(tmp_path):
    path = tmp_path / "gold"
    said = [("neutral", "Oh , we won!"), ("joy", "Good for you .")]
    conversation = [
        {"utterance_ID": n, "text": text, "speaker": "A", "emotion": emotion}
        for n, (emotion, text) in enumerate(said, start=1)
    ]
    path.write_text(json.dumps([{"conversation_ID": 7, "conversation": conversation, PAIRS: []}]))
    (dialogue,) = read_corpus(path).dialogues
    rows = [
        row(1, "we won"),
        row(2, ""),
        row(2, "u ."),
        row(2, "elsewhere"),
        row(1, "a", target=1, emotion="neutral"),
    ]
    for prediction, place in zip(rows[:4], ("1_2_4", "2_0_3", "2_2_4", "2_0_0"), strict=True):
        assert conversation_of(dialogue, [prediction], 1)[PAIRS] == [["2_joy", place]]
    one = conversation_of(dialogue, [rows[0], row(2, ""), rows[4]], 2)
    assert one["conversation_ID"] == 7
    assert one[PAIRS] == [["2_joy", "1"], ["2_joy", "2"]]
    assert [u["emotion"] for u in one["conversation"]] == ["neutral", "joy"]
    with pytest.raises(PredictionError, match="pair 7/2/1: found a cause without an emotion"):
        conversation_of(dialogue, [row(1, "we won", emotion=None)], 1)


@pytest.fixture
def files(tmp_path) -> tuple[Path, Path, list[dict[str, Any]]]:
    rng = random.Random(5)
    gold, submitted = random_task(rng)
    for name, document in (("gold.json", gold), ("Subtask_1_pred.json", submitted)):
        (tmp_path / name).write_text(json.dumps(document))
    return tmp_path / "gold.json", tmp_path / "Subtask_1_pred.json", submitted


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_scores_submissions_and_lines(files, tmp_path):
    gold, submission, _ = files
    arguments = ("evaluate", "--corpus", gold, "--protocol", "semeval", "--predictions", submission)
    scores = json.loads(run(*arguments, "--json", "--details", "--intervals", "--samples", 100).stdout)
    assert set(KEYS) <= set(scores)
    assert set(scores["baselines"]) == {"j = i, gold emotions", "j >= i-1, gold emotions"}
    assert all(low <= scores[key] <= high for key, (low, high) in scores["intervals"].items())
    assert sum(item["num_gold"] for item in scores["by_emotion"].values()) == scores["num_gold"] > 0
    assert "gold and" in run(*arguments, "--details", "--intervals", "--samples", 100).stdout
    seeds = json.loads(run(*arguments, "--predictions", submission, "--json").stdout)
    assert seeds["over_seeds"]["strict_f1"]["mean"] == scores["strict_f1"]
    assert "runs" in run(*arguments, "--predictions", submission).stdout
    compared = run("compare", submission, submission, "--corpus", gold, "--protocol", "semeval", "--json")
    assert json.loads(compared.stdout)["f1_pair"]["difference"] == 0
    above = seeds["runs"][0]["above_rule"]
    assert json.loads(compared.stdout)["above_rule"] == {"a": above, "b": above}
    shown = run(
        "compare", submission, submission, "--corpus", gold, "--protocol", "semeval", "--samples", 100
    )
    assert "A − B" in shown.stdout and "w. prop. precision" in shown.stdout
    assert not re.search(r"\d…", shown.stdout), "no figure is cut"
    assert "B above the rule j >= i-1, with its 95% interval: weighted strict f1 " in shown.stdout
    assert run(*arguments, "--universe", "all").exit_code == 2
    hint = run("evaluate", "--corpus", gold, "--predictions", submission).exception
    assert isinstance(hint, PredictionError) and "--protocol semeval" in str(hint)
    # Lines of a rule with gold emotions score as the rule does, on a corpus of another format.
    test = read_corpus(bundled_sample("test"), log=False)
    emotions = {(d.id, u.turn): u.emotion for d in test.dialogues for u in d.utterances}
    rule = trivial_predictions(test, "all")["j = i"].values()
    lines = [
        Prediction(
            p.dialogue_id, p.target, p.candidate, emotions[p.dialogue_id, p.target], p.is_cause, p.span
        )
        for p in rule
    ]
    write_predictions(tmp_path / "lines.jsonl", lines)
    arguments = ("evaluate", "--corpus", bundled_sample("test"), "--protocol", "semeval", "--json")
    scored = json.loads(run(*arguments, "--predictions", tmp_path / "lines.jsonl").stdout)
    assert {key: scored[key] for key in KEYS} == scored["baselines"]["j = i, gold emotions"]
    # And so does the submission that is made of them.
    written = [conversation_of(d, [p for p in lines if p.dialogue_id == d.id], 1) for d in test.dialogues]
    (tmp_path / "again.json").write_text(json.dumps(written))
    again = json.loads(run(*arguments, "--predictions", tmp_path / "again.json").stdout)
    assert {key: again[key] for key in KEYS} == {key: scored[key] for key in KEYS}
    assert by_pair(lines).keys() == {p.key for p in lines}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop(), "found no conversation"),
        (lambda s: s.append(s[0]), "a second time"),
        (lambda s: s[0].pop(PAIRS), f"field {PAIRS}: found no such key"),
        (lambda s: s[0].update({"conversation_ID": 1.5}), "field conversation_ID: found 1.5"),
        (lambda s: s.append(7), "of the list: found 7"),
        (lambda s: s[0].update({PAIRS: [["2_joy"]]}), "a list of 1"),
        (lambda s: s[0].update({PAIRS: [["2_joy", "1_We won"]]}), '"1_4_9"'),
        (lambda s: s[0].update({PAIRS: [["2_joy", "1_1"]]}), '"1_4_9"'),
        (lambda s: s[0].update({PAIRS: [["joy", "1_1_2"]]}), '"1_4_9"'),
        (lambda s: s[0].update({PAIRS: [["2_bliss", "1_1_2"]]}), "the emotion 'bliss'"),
        (lambda s: s[0].update({PAIRS: [["2_joy", "1_1_2"], ["2_joy", "1"]]}), "with and without spans"),
    ],
)
def test_a_submission_that_cannot_be_scored_is_refused(files, change, message):
    gold, path, submitted = files
    change(submitted)
    path.write_text(json.dumps(submitted))
    corpus = read_corpus(gold, log=False)
    with pytest.raises(PredictionError) as refusal:
        read_submission(path, corpus, {})
    assert message in str(refusal.value) and str(path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_conversations_beyond_the_gold_are_counted_and_neutral_pairs_left_out(files):
    gold, path, submitted = files
    corpus = read_corpus(gold, log=False)
    before = score_submission(corpus, read_submission(path, corpus, {}))
    submitted.append({"conversation_ID": 99, "nonsense": True})
    submitted[0][PAIRS].append(["1_neutral", "1_0_1"])
    path.write_text(json.dumps(submitted))
    after = score_submission(corpus, read_submission(path, corpus, {}))
    assert after.values == before.values
    assert (after.submission.num_other, after.submission.num_neutral) == (
        1,
        before.submission.num_neutral + 1,
    )
