"""The metrics against a slow implementation that shares no code with them: raw JSON in, plain loops."""

import json
import os
import random
import string
from collections import Counter
from csv import DictReader
from pathlib import Path
from typing import Any

import pytest

from kdecs.corpus.reading import read_corpus
from kdecs.evaluation.metrics import evaluate
from kdecs.evaluation.predictions import Prediction, by_pair, read_predictions
from kdecs.evaluation.released import KNOWN_ORDER, read_released_order

WORDS = ["We", "we", "won", "the", "The", "game", "a", "an", "!", ".", "big", "bag", "lost", "x", "it's"]
NO_ANSWER = "Impossible ≠æ≠æ≠ answer"
RECCON = Path(os.environ.get("KDECS_RECCON", Path(__file__).parents[2].parent / "shared" / "reccon"))
EMOTIONS = ["neutral", "happiness", "anger", "happy", "fear", "gratitude"]


def slow_tokens(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return [token for token in kept.split() if token not in ("a", "an", "the")]


def slow_f1(gold: str, predicted: str) -> float:
    left, right = slow_tokens(gold), slow_tokens(predicted)
    if not left and not right:
        return 1.0
    rest, common = list(right), 0
    for token in left:
        if token in rest:
            rest.remove(token)
            common += 1
    if common == 0:
        return 0.0
    precision, recall = common / len(right), common / len(left)
    return 2 * precision * recall / (precision + recall)


def quotient(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0


def harmonic(precision: float, recall: float) -> float:
    return quotient(2 * precision * recall, precision + recall)


def normal(emotion: str) -> str:
    return "happiness" if emotion == "happy" else emotion


def slow_rows(document: dict[str, Any], universe: str) -> list[tuple[str, int, int, str | None]]:
    """(dialogue, target, candidate, gold span or None) in the order of the released script."""
    rows: list[tuple[str, int, int, str | None]] = []
    for dialogue_id, nested in document.items():
        for utterance in nested[0]:
            i = utterance["turn"]
            has_evidence = "expanded emotion cause evidence" in utterance
            if universe == "fold1" and not has_evidence:
                continue
            evidence = utterance.get("expanded emotion cause evidence", [])
            spans = utterance.get("expanded emotion cause span", [])
            rows.extend(
                (dialogue_id, i, j, s) for j, s in zip(evidence, spans, strict=True) if j != "b" and j <= i
            )
            rows.extend((dialogue_id, i, j, None) for j in range(1, i + 1) if j not in evidence)
    return rows


def slow_scores(
    document: dict[str, Any],
    lines: list[dict[str, Any]],
    universe: str,
    protocol: str,
    table: dict[str, str],
) -> dict[str, float]:
    """The scores by their definitions, row by row."""
    gold_emotion = {(d, u["turn"]): normal(u["emotion"]) for d, nested in document.items() for u in nested[0]}
    gold_emotion = {key: table.get(label, label) for key, label in gold_emotion.items()}
    own_emotion = {
        (line["dialogue_id"], line["target"]): normal(line["emotion"])
        for line in lines
        if line["emotion"] is not None
    }
    predicted_emotion = {key: table.get(label, label) for key, label in own_emotion.items()}
    by_key = {(line["dialogue_id"], line["target"], line["candidate"]): line for line in lines}
    total_f = strict_f = exact = strict_exact = 0.0
    right_negatives = empty_positives = num_positive = num_negative = 0
    labels, predicted_labels, strict_hits = [], [], 0
    incorrect, last_similar, counted_negatives = 0, None, 0
    missing = set()
    for d, i, j, gold in slow_rows(document, universe):
        line = by_key.get((d, i, j))
        if line is None:
            missing.add((d, i, j))
        causal = line is not None and line["is_cause"] and own_emotion.get((d, i)) != "neutral"
        p = line["span"].strip() if causal else ""
        labels.append(gold is not None)
        predicted_labels.append(causal)
        if gold is None:
            num_negative += 1
            if protocol == "reccon-released":
                right_negatives += p != NO_ANSWER and (p in NO_ANSWER or NO_ANSWER in p)
                counted_negatives += p != NO_ANSWER
            else:
                right_negatives += p == ""
                counted_negatives += 1
            continue
        num_positive += 1
        g = gold.strip()
        emotion_right = predicted_emotion.get((d, i)) == gold_emotion[d, i]
        f = em = 0.0
        if g == p:
            f = em = 1.0
        elif g in p or p in g:
            last_similar = p
            f = slow_f1(g, p) if p else 0.0
        else:
            incorrect += 1
        if protocol == "squad":
            f = slow_f1(g, p)
        empty_positives += p == ""
        total_f, exact = total_f + f, exact + em
        if emotion_right:
            strict_f, strict_exact, strict_hits = strict_f + f, strict_exact + em, strict_hits + causal
    if protocol == "reccon-released" and last_similar == "":
        empty_positives += incorrect
    recall = quotient(right_negatives, counted_negatives)
    negative_f1 = harmonic(quotient(right_negatives, right_negatives + empty_positives), recall)
    scores = {
        "positive_f1": quotient(total_f, num_positive),
        "exact_match": quotient(exact, num_positive),
        "negative_f1": negative_f1,
        "strict_positive_f1": quotient(strict_f, num_positive),
        "strict_exact_match": quotient(strict_exact, num_positive),
        "strict_negative_f1": negative_f1,
    }
    for value, name in ((True, "positive"), (False, "negative")):
        hits = sum(a == b == value for a, b in zip(labels, predicted_labels, strict=True))
        for prefix, right in (("", hits), ("strict_", strict_hits if value else hits)):
            precision = quotient(right, predicted_labels.count(value))
            found = harmonic(precision, quotient(right, labels.count(value)))
            scores[f"{prefix}utterance_{name}_f1"] = found
    for prefix in ("", "strict_"):
        scores[f"{prefix}macro_f1"] = (scores[f"{prefix}positive_f1"] + scores[f"{prefix}negative_f1"]) / 2
        ends = [scores[f"{prefix}utterance_{name}_f1"] for name in ("positive", "negative")]
        scores[f"{prefix}utterance_macro_f1"] = sum(ends) / 2
    decided = [(gold_emotion[key], emotion) for key, emotion in predicted_emotion.items()]
    scores["emotion_accuracy"] = quotient(sum(a == b for a, b in decided), len(decided))
    one_each = []
    for label in {label for pair in decided for label in pair}:
        right = sum(a == b == label for a, b in decided)
        precision = quotient(right, sum(b == label for _, b in decided))
        one_each.append(harmonic(precision, quotient(right, sum(a == label for a, _ in decided))))
    scores["emotion_macro_f1"] = quotient(sum(one_each), len(one_each))
    counts = {"num_positive": num_positive, "num_negative": num_negative, "missing": len(missing)}
    found = {key: 100 * value for key, value in scores.items()} | counts
    absent = () if decided else [key for key in scores if key.startswith(("emotion_", "strict_"))]
    return found | dict.fromkeys(absent)


def released_script(
    rows: list[tuple[str, int, int, str | None]], predicted: dict[tuple[str, int, int], str]
) -> tuple[float, float, float]:
    """EM, Pos F1 and Neg F1 by three dictionaries and two loops, as RECCON's script has them."""
    texts: dict[str, dict[str, tuple[str, str]]] = {"correct": {}, "similar": {}, "incorrect": {}}
    for number, (d, i, j, gold) in enumerate(rows):
        name = f"{d}_utt_{i}_" + (
            f"impossible_cause_utt_{j}" if gold is None else f"true_cause_utt_{j}_span_{number}"
        )
        truth, answer = (NO_ANSWER if gold is None else gold).strip(), predicted[d, i, j].strip()
        if truth == answer:
            texts["correct"][name] = truth, answer
        elif truth in answer or answer in truth:
            texts["similar"][name] = truth, answer
        else:
            texts["incorrect"][name] = truth, answer
    scores: list[float] = []
    right = wrong = empty = exact = 0
    z: tuple[str, str] | None = None
    for kind in texts:
        for name in texts[kind]:
            if kind == "correct" and "span" in name:
                exact += 1
                scores.append(1)
            elif kind == "similar" and "impossible" in name:
                right += 1
            elif kind == "similar":
                z = texts[kind][name]
                empty += z[1] == ""
                scores.append(slow_f1(*z) if z[1] else 0)
            elif kind == "incorrect" and "impossible" in name:
                wrong += 1
            elif kind == "incorrect":
                empty += z is not None and z[1] == ""  # z is still that of the last similar row
                scores.append(0)
    negative = harmonic(quotient(right, right + empty), quotient(right, right + wrong))
    return 100 * exact / len(scores), 100 * sum(scores) / len(scores), 100 * negative


@pytest.mark.skipif(not RECCON.is_dir(), reason="the RECCON files are not here (KDECS_RECCON)")
def test_the_released_protocol_is_the_released_script_on_the_validation_split():
    """In the order of the released rows, with predictions that their text for no answer contains."""
    document = json.loads((RECCON / "dailydialog_valid.json").read_text(encoding="utf-8"))
    csv = RECCON / "fold1_valid_ids.csv"
    order = read_released_order(csv)
    with csv.open(encoding="utf-8") as file:
        ids = ["_".join(row["id"].split("_")[1:3]) for row in DictReader(file)]
    assert list(order) == list(KNOWN_ORDER[:-1]) == list(dict.fromkeys(ids))
    corpus = read_corpus(RECCON / "dailydialog_valid.json")
    rows = slow_rows({name: document[name] for name in order}, "fold1")
    ends, differ = set(), 0
    for seed in range(6):
        rng = random.Random(seed)
        predicted, predictions = {}, []
        for d, i, j, gold in rows:
            text = document[d][0][j - 1]["utterance"]
            choices = ["", "", random_part(text, rng), "I", "a", NO_ANSWER, f"{NO_ANSWER} .", gold or ""]
            predicted[d, i, j] = rng.choice(choices)
        for (d, i, j), span in predicted.items():
            predictions.append(Prediction(d, i, j, None, span != "", span))
        found = evaluate(corpus, by_pair(predictions), protocol="reccon-released")
        expected = released_script(rows, predicted)
        keys = ("exact_match", "positive_f1", "negative_f1")
        assert [found[key] for key in keys] == pytest.approx(expected), seed
        assert not found.scored.is_order_guessed
        assert found.num_negative == 838
        # A file of the rows says the same; the annotation file's own order can say something else.
        given = evaluate(corpus, by_pair(predictions), protocol="reccon-released", released_order=order)
        assert given.values == found.values
        # By the end of the rows, and by that of the annotation file.
        ends |= {last_answer(rows, predicted)}
        differ += last_answer(rows, predicted) != last_answer(slow_rows(document, "fold1"), predicted)
    assert ends == {True, False} and differ


def last_answer(
    rows: list[tuple[str, int, int, str | None]], predicted: dict[tuple[str, int, int], str]
) -> bool:
    """Whether the last similar positive row was predicted ""."""
    answers = [(gold.strip(), predicted[d, i, j].strip()) for d, i, j, gold in rows if gold is not None]
    return [p == "" for g, p in answers if g != p and (g in p or p in g)][-1]


def random_text(rng: random.Random, most: int = 6) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, most)))


def random_document(rng: random.Random) -> dict[str, Any]:
    document = {}
    for d in range(rng.randint(1, 3)):
        texts = [random_text(rng) for _ in range(rng.randint(1, 5))]
        utterances = []
        for turn, text in enumerate(texts, 1):
            utterance = {"turn": turn, "speaker": "A", "utterance": text, "emotion": rng.choice(EMOTIONS)}
            if rng.random() < 0.7:
                evidence = [rng.choice(["b", *range(1, len(texts) + 1)]) for _ in range(rng.randint(0, 3))]
                utterance["expanded emotion cause evidence"] = evidence
                utterance["expanded emotion cause span"] = [
                    "b" if j == "b" else random_part(texts[j - 1], rng) for j in evidence
                ]
            utterances.append(utterance)
        document[f"d_{d}"] = [utterances]
    return document


def random_part(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    start = rng.randrange(len(words))
    return " ".join(words[start : rng.randint(start + 1, len(words))])


def random_lines(document: dict[str, Any], rng: random.Random) -> list[dict[str, Any]]:
    lines = []
    for dialogue_id, nested in document.items():
        for utterance in nested[0]:
            i = utterance["turn"]
            emotion = rng.choice([*EMOTIONS, utterance["emotion"], None])
            for j in range(1, i + 1):
                if rng.random() < 0.15:
                    continue
                is_cause = rng.random() < 0.5
                text = nested[0][j - 1]["utterance"]
                span = rng.choice(["", " ", text, random_part(text, rng), f" {text} ", random_text(rng, 2)])
                if rng.random() < 0.1:
                    span = rng.choice(["I", NO_ANSWER, f"{NO_ANSWER} !"])
                lines.append(
                    {"dialogue_id": dialogue_id, "target": i, "candidate": j, "emotion": emotion}
                    | {"is_cause": is_cause, "span": span if is_cause else rng.choice(["", " "])}
                )
    rng.shuffle(lines)
    return lines


def check_case(seed: int, folder: Path) -> int:
    """Compare one random case in a random universe and protocol; returns its number of rows."""
    rng = random.Random(seed)
    document = random_document(rng)
    lines = random_lines(document, rng)
    corpus_file, predictions_file = folder / "corpus.json", folder / "predictions.jsonl"
    corpus_file.write_text(json.dumps(document))
    predictions_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    universe = rng.choice(["fold1", "all"])
    protocol = rng.choice(["reccon", "reccon-released", "squad"])
    corpus = read_corpus(corpus_file)
    table = rng.choice([{}, {}, {"gratitude": "happiness", "fear": "neutral"}])
    predictions = read_predictions(predictions_file, corpus)
    found = evaluate(corpus, predictions, universe=universe, protocol=protocol, emotion_table=table)
    for key, value in slow_scores(document, lines, universe, protocol, table).items():
        expected = None if value is None else pytest.approx(value, abs=1e-9)
        assert found.as_dict()[key] == expected, (seed, universe, protocol, key)
    return found.num_positive + found.num_negative


def test_metrics_agree_with_the_slow_ones_on_random_cases(tmp_path):
    assert sum(check_case(seed, tmp_path) for seed in range(1000)) > 8_000


@pytest.mark.slow
def test_metrics_agree_with_the_slow_ones_on_many_random_cases(tmp_path):
    num_cases = 10_000 if os.environ.get("KDECS_CAMPAIGN") == "1" else 2_000
    assert sum(check_case(seed, tmp_path) for seed in range(1000, 1000 + num_cases)) > 10 * num_cases


def test_random_cases_reach_what_matters(tmp_path):
    """The random cases hold several spans a pair, futures, "b", neutral targets with causes and gaps."""
    seen: Counter[str] = Counter()
    for seed in range(300):
        rng = random.Random(seed)
        document = random_document(rng)
        lines = random_lines(document, rng)
        keys = [(d, i, j) for d, i, j, gold in slow_rows(document, "fold1") if gold is not None]
        seen["several spans"] += len(keys) > len(set(keys))
        seen["missing"] += len(lines) < sum(len(n[0]) * (len(n[0]) + 1) // 2 for n in document.values())
        seen["neutral and causal"] += any(line["emotion"] == "neutral" and line["is_cause"] for line in lines)
        for nested in document.values():
            for utterance in nested[0]:
                evidence = utterance.get("expanded emotion cause evidence", [])
                seen["outside"] += "b" in evidence
                seen["future"] += any(j != "b" and j > utterance["turn"] for j in evidence)
                seen["unsorted"] += [j for j in evidence if j != "b"] != sorted(
                    j for j in evidence if j != "b"
                )
    assert min(seen.values()) > 30
    assert len(seen) == 6
