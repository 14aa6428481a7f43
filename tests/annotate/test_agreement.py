"""Agreement: textbooks' worked examples, the figures of other libraries, and spans and change over time by hand."""

import json
import random
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kdecs.annotate.agreement import (
    Section,
    agreement_of,
    cohen_kappa,
    fleiss_kappa,
    krippendorff_alpha,
    krippendorff_alpha_u,
    majority,
    pabak,
)
from kdecs.annotate.labels import Annotation, ReviewedTurn, TurnLabel, add_reviews, annotation_of_person
from kdecs.annotate.project import Project
from kdecs.cli import app
from kdecs.corpus.schema import Dialogue, Utterance
from kdecs.endpoint.answers import Cause
from kdecs.errors import ConfigError

# Thirty turns with three labels each, drawn at random.
TURNS = [
    *(
        "cca",
        "bcb",
        "add",
        "daa",
        "aba",
        "aaa",
        "cac",
        "abd",
        "bcb",
        "aaa",
        "caa",
        "cdd",
        "dac",
        "aaa",
        "bdb",
    ),
    *(
        "aaa",
        "ddd",
        "acd",
        "baa",
        "abb",
        "aaa",
        "dda",
        "ada",
        "bbb",
        "ada",
        "bbb",
        "ccc",
        "ddd",
        "bbb",
        "ada",
    ),
]


def test_figures_are_those_of_other_libraries() -> None:
    """scikit-learn 1.9.1, statsmodels 0.15.0 and krippendorff 0.9.0 gave the expected values.

    On 200 more random tables, with up to 16 labels, 5 annotators and missing labels, the largest difference was 4e-16.
    """
    columns = list(zip(*TURNS, strict=True))
    kappas = [cohen_kappa(columns[i], columns[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert kappas == pytest.approx([0.22492401215805458, 0.47115384615384615, 0.399075500770416], abs=1e-14)
    assert fleiss_kappa(TURNS) == pytest.approx(0.35959736202707393, abs=1e-14)
    assert krippendorff_alpha(TURNS) == pytest.approx(0.3667129468934398, abs=1e-14)
    holed = [labels[: 1 + n % 3] for n, labels in enumerate(TURNS)]
    assert krippendorff_alpha(holed) == pytest.approx(0.3276619099890231, abs=1e-14)


def test_figures_are_those_of_the_textbooks() -> None:
    # Cohen's kappa of the table 20, 5 / 10, 15.
    first, second = "y" * 25 + "n" * 25, "y" * 20 + "n" * 5 + "y" * 10 + "n" * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert pabak(first, second, 2) == pytest.approx(2 * 0.7 - 1)
    assert pabak("aab", "aaa", 4) == pytest.approx((4 * 2 / 3 - 1) / 3)
    # Fleiss 1971, in the worked example of ten subjects, fourteen raters and five categories: 0.210.
    rows = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1),
        (7, 7, 0, 0, 0), (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    units = ["".join(label * n for label, n in zip("12345", row, strict=True)) for row in rows]
    assert fleiss_kappa(units) == pytest.approx(0.210, abs=5e-4)
    # Krippendorff 2011, four observers, twelve units with missing data, nominal: 0.743.
    units = ["111", "2223", "3333", "3333", "2222", "1234", "4444", "1121", "2222", "555", "11", "3"]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def sections_of(length: int, *units: tuple[int, int]) -> list[Section]:
    """The units (start, length) with the gaps between them."""
    found = []
    end = 0
    for start, size in (*units, (length, 0)):
        found += [Section(end, start - end, False)] * (start > end) + [Section(start, size, True)] * (
            size > 0
        )
        end = start + size
    return found


def slow_alpha_u(annotators: Iterable[list[Section]]) -> float | None:
    """The published formulas, term by term, over all pairs of sections."""
    both = list(annotators)
    length, every = both[0][-1].end, [section for sections in both for section in sections]
    observed = 0.0
    for g, h in [*product(both[0], both[1]), *product(both[1], both[0])]:
        if g.is_unit and h.is_unit and -g.length < g.start - h.start < h.length:
            observed += (g.start - h.start) ** 2 + (g.start + g.length - h.start - h.length) ** 2
        elif g.is_unit and not h.is_unit and h.length - g.length >= g.start - h.start >= 0:
            observed += g.length**2
        elif h.is_unit and not g.is_unit and g.length - h.length >= h.start - g.start >= 0:
            observed += h.length**2
    units, gaps = ([each for each in every if each.is_unit is wanted] for wanted in (True, False))
    expected = 0.0
    for g in units:
        expected += (len(units) - 1) / 3 * (2 * g.length**3 - 3 * g.length**2 + g.length)
        expected += g.length**2 * sum(h.length - g.length + 1 for h in gaps if h.length >= g.length)
    if not expected:
        return None
    expected *= 2 / length
    expected /= 2 * length * (2 * length - 1) - sum(g.length * (g.length - 1) for g in units)
    return 1 - observed / (2 * length**2) / expected


def test_alpha_u_is_that_of_the_textbook_and_of_a_slow_oracle() -> None:
    # Krippendorff 2004, p. 254: a text from 150 to 450, the category c; D_o = 0.0144, D_e = 0.0532.
    first = sections_of(300, (75, 70), (220, 30))
    second = sections_of(300, (70, 80), (205, 20), (250, 20))
    assert krippendorff_alpha_u(first, second) == pytest.approx(0.7286, abs=1e-4)
    same = sections_of(300, (30, 60), (150, 50))
    assert krippendorff_alpha_u(same, same) == 1
    # By hand: "two three" against "three four" in five words. Both ends differ by 1: D_o = 2 (1 + 1) / (2 * 25) = 0.08.
    # Each unit has 1/3 (16 - 12 + 2) = 2 and 4 times one place in two gaps: D_e = 2/5 * 2 (2 + 8) / (10 * 9 - 2 * 2).
    first, second = sections_of(5, (1, 2)), sections_of(5, (2, 2))
    assert krippendorff_alpha_u(first, second) == pytest.approx(1 - 0.08 / (8 / 86))
    draw = random.Random(0)
    for _ in range(200):
        length = draw.randint(1, 40)
        pair = []
        for _ in range(2):
            ends = sorted(draw.sample(range(length + 1), draw.randint(0, min(6, length + 1)) // 2 * 2))
            pair.append(
                sections_of(length, *((a, b - a) for a, b in zip(ends[::2], ends[1::2], strict=True)))
            )
        found = krippendorff_alpha_u(*pair)
        assert found == krippendorff_alpha_u(*reversed(pair))
        assert found == (None if (slow := slow_alpha_u(pair)) is None else pytest.approx(slow, abs=1e-12))
    assert krippendorff_alpha_u([], []) is krippendorff_alpha_u(*[sections_of(4)] * 2) is None


def test_nothing_shared_and_nothing_to_distinguish_give_no_figure() -> None:
    assert cohen_kappa([], []) is fleiss_kappa([]) is krippendorff_alpha([]) is pabak([], [], 3) is None
    assert cohen_kappa("aa", "aa") is fleiss_kappa(["aa"]) is krippendorff_alpha(["aa", "a"]) is None
    assert [majority(votes) for votes in ("aab", "ab", "abc", "a", "")] == ["a", None, None, "a", None]


DIALOGUE = Dialogue(
    "d",
    tuple(
        Utterance(turn, "A", text, None, None)
        for turn, text in enumerate(("one two three four", "five six", "seven"), start=1)
    ),
)


def person(name: str, *labels: tuple[str | None, dict[int, str] | None]) -> Annotation:
    found = {
        ("d", turn): TurnLabel(
            emotion,
            None if causes is None else tuple(Cause(*cause) for cause in causes.items()),
            f"2026-01-0{turn}T00:00:00Z",
        )
        for turn, (emotion, causes) in enumerate(labels, start=1)
    }
    return Annotation(name, "person", found)


def test_spans_words_confusions_and_time_by_hand() -> None:
    ann = person("ann", ("worry", {1: "one two"}), ("hope", {1: "two three", 2: "six"}), ("neutral", {}))
    ben = person("ben", ("worry", {1: "one two"}), ("hope", {1: "three four"}), ("hope", None))
    cem = person("cem", ("worry", {1: "one"}), ("worry", {2: "six"}), (None, None))
    found = agreement_of([ann, ben, cem], {"d": DIALOGUE}, 4, 0)
    pair = found.span_pairs[0]
    # Turns 1 and 2: three causes of ann, two of ben, two turns in common; "two three" and "three four" share a token.
    assert (pair["targets"], pair["spans"]) == (2, 2)
    assert pair["cause_turn_f1"] == pytest.approx(2 * 2 / 5)
    assert (pair["exact"], pair["token_f1"]) == (0.5, pytest.approx((1 + 0.5) / 2))
    # The text of alpha_U: the four words of turn 1 for target 1, then these and the two words of turn 2 for target 2.
    ann_units, ben_units = sections_of(10, (0, 2), (5, 2), (9, 1)), sections_of(10, (0, 2), (6, 2))
    assert pair["alpha_u"] == pytest.approx(slow_alpha_u([ann_units, ben_units]))
    # Target 1 has the four words of turn 1, target 2 these and the two words of turn 2.
    words = ["TTT", "TTF", "FFF", "FFF", "FFF", "TFF", "TTF", "FTF", "FFF", "TFT"]
    assert found.words == len(words)
    assert found.word_alpha == pytest.approx(krippendorff_alpha(words))
    assert found.confusions == [
        {"first": "hope", "second": "worry", "count": 2},
        {"first": "hope", "second": "neutral", "count": 1},
    ]
    assert (found.fleiss_turns, found.alpha_turns) == (2, 3)
    assert [row["open"] for row in found.annotators] == [0, 0, 1]
    time_of_cem = [row for row in found.over_time if row["annotator"] == "cem"]
    assert [row["against_the_others"] for row in time_of_cem] == [1.0, 0.0, None]
    assert time_of_cem[1]["from"] == "2026-01-02T00:00:00Z"


def test_reviews_are_kept_once_and_the_latest_counts(tmp_path: Path) -> None:
    def line(emotion: str, day: int) -> ReviewedTurn:
        at = f"2026-01-0{day}T00:00:00Z"
        return ReviewedTurn(dialogue_id="d", turn=1, emotion=emotion, causes=None, at=at)

    path = tmp_path / "reviews" / "ann.jsonl"
    assert add_reviews(path, [line("hope", 3), line("worry", 2)]) == 2
    assert add_reviews(path, [line("hope", 3), line("fear", 1)]) == 1
    lines = [ReviewedTurn.model_validate_json(text) for text in path.read_text().splitlines()]
    assert annotation_of_person("ann", lines).labels["d", 1].emotion == "hope"


def test_the_command_prints_tables_and_json(project: Project, gold: list[Dialogue]) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["annotate", "agreement", str(project.root), *arguments])

    assert isinstance(run().exception, ConfigError) and "nobody has labelled" in str(run().exception)
    for name, label in (("ann", None), ("ben", "neutral")):
        lines = [
            ReviewedTurn(
                dialogue_id=dialogue.id,
                turn=u.turn,
                emotion=label or str(u.emotion),
                causes=[],
                at="2026-01-01T00:00:00Z",
            )
            for dialogue in gold
            for u in dialogue.utterances
        ]
        add_reviews(project.review_file(name), lines)
    found = json.loads(run("--json").stdout)
    num_turns = sum(len(dialogue.utterances) for dialogue in gold)
    neutral = sum(u.emotion == "neutral" for dialogue in gold for u in dialogue.utterances)
    assert found["emotion_pairs"][0]["agreement"] == pytest.approx(neutral / num_turns)
    assert found["emotion_pairs"][0]["kappa"] == 0
    shown = run()
    assert shown.exit_code == 0 and "Krippendorff's alpha" in shown.stdout and "ann, ben" in shown.stdout
    assert "expected two annotators" in str(run("--only", "models").exception)
    assert "cem: has no labels" in str(run("--annotator", "cem").exception)
