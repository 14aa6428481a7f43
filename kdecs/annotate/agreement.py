"""How far annotators agree: kappa, alpha and PABAK of emotions, words of spans, confusions, and change over time.

Everything is computed in nominal form, from the textbooks' definitions:

    Cohen's kappa          (p_o - p_e) / (1 - p_e) of two annotators, p_e from each one's own label shares
    PABAK                  (k p_o - 1) / (k - 1) for k labels: kappa as if every label were equally frequent
    Fleiss' kappa          mean agreement within turns against that of the pooled label shares; turns that all labelled
    Krippendorff's alpha   1 - D_o / D_e over all turns that at least two labelled, whoever they are
    Krippendorff's alpha_U 1 - D_o / D_e of two annotators' spans as units of one text: how far their ends lie apart
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from kdecs.annotate.labels import Annotation, TurnKey, TurnLabel
from kdecs.corpus.schema import NEUTRAL, Dialogue
from kdecs.evaluation.rows import squad_f1

_BLOCKS = 5
_MOST_CONFUSIONS = 10


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's kappa of two annotators' labels of the same turns; None if it is 0/0."""
    size = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True))
    shares, others = Counter(first), Counter(second)
    expected = sum(count * others[label] for label, count in shares.items()) / size if size else 0.0
    return None if size - expected <= 0 else (observed - expected) / (size - expected)


def pabak(first: Sequence[str], second: Sequence[str], num_labels: int) -> float | None:
    """Prevalence- and bias-adjusted kappa of two annotators who choose among `num_labels`."""
    if not first:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / len(first)
    return (num_labels * observed - 1) / (num_labels - 1)


def fleiss_kappa(units: Sequence[Sequence[str]]) -> float | None:
    """Fleiss' kappa of turns that equally many annotators labelled; None if it is 0/0."""
    if not units or len(units[0]) < 2:
        return None
    raters = len(units[0])
    assert all(len(unit) == raters for unit in units)
    pooled = Counter(label for unit in units for label in unit)
    within = sum(
        sum(count * (count - 1) for count in Counter(unit).values()) / (raters * (raters - 1))
        for unit in units
    ) / len(units)
    expected = sum((count / (len(units) * raters)) ** 2 for count in pooled.values())
    return None if expected >= 1 else (within - expected) / (1 - expected)


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Krippendorff's nominal alpha; units with fewer than two labels say nothing. None if it is 0/0."""
    pairable = [unit for unit in units if len(unit) > 1]
    pooled = Counter(label for unit in pairable for label in unit)
    size = pooled.total()
    observed = sum(
        (len(unit) ** 2 - sum(count**2 for count in Counter(unit).values())) / (len(unit) - 1)
        for unit in pairable
    )
    expected = size**2 - sum(count**2 for count in pooled.values())
    return 1 - (size - 1) * observed / expected if expected else None


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a text of which an annotator has made a unit, or a gap between units; `start` counts from 0."""

    start: int
    length: int
    is_unit: bool

    @property
    def end(self) -> int:
        """Where the next section begins."""
        return self.start + self.length


def krippendorff_alpha_u(first: Sequence[Section], second: Sequence[Section]) -> float | None:
    """Krippendorff's alpha_U of two annotators' units of one category; None if it is 0/0.

    The sections of each cover the same text without a break. For sections g and h that overlap, each from b to e with
    the length l:

        delta² = (b_g - b_h)² + (e_g - e_h)²  of two units;  l²  of a unit that lies within a gap;  0  otherwise
        D_o = sum delta² / (m (m - 1) L²), each pair from both sides
        D_e = 2/L sum_g [(N - 1)/3 (2 l³ - 3 l² + l) + l² sum_h max(0, l_h - l + 1)] / (m L (m L - 1) - sum_g l (l - 1))

    with m = 2 annotators, a text of length L, and the N units g and the gaps h of both. Source: Krippendorff 2004,
    "Measuring the Reliability of Qualitative Text Analysis Data". With more than two annotators the coefficient is
    known to misbehave (Krippendorff et al. 2016).
    """
    length = first[-1].end if first else 0
    assert length == (second[-1].end if second else 0)
    distance = 0
    here = there = 0
    while here < len(first) and there < len(second):  # sections that overlap; the others add nothing
        g, h = first[here], second[there]
        if g.is_unit and h.is_unit:
            distance += (g.start - h.start) ** 2 + (g.end - h.end) ** 2
        elif g.is_unit != h.is_unit:
            unit, gap = (g, h) if g.is_unit else (h, g)
            is_within = gap.start <= unit.start and unit.end <= gap.end
            distance += unit.length**2 if is_within else 0
        here, there = here + (g.end <= h.end), there + (h.end <= g.end)
    lengths = Counter(each.length for each in (*first, *second) if each.is_unit)
    gaps = Counter(each.length for each in (*first, *second) if not each.is_unit)
    num_units = lengths.total()
    expected = 0.0
    for size, count in lengths.items():
        places = sum(number * (gap - size + 1) for gap, number in gaps.items() if gap >= size)
        within = (num_units - 1) / 3 * (2 * size**3 - 3 * size**2 + size)
        expected += count * (within + size**2 * places)
    if not expected:
        return None
    both = 2 * length
    expected *= 2 / length / (both * (both - 1) - sum(n * size * (size - 1) for size, n in lengths.items()))
    return 1 - 2 * distance / (2 * length**2) / expected


@dataclass(frozen=True)
class Agreement:
    """The figures of `kdecs annotate agreement`; shares and coefficients are of 1, None where nothing is shared."""

    annotators: list[dict[str, Any]]
    emotion_pairs: list[dict[str, Any]]
    fleiss_kappa: float | None
    fleiss_turns: int
    alpha: float | None
    alpha_turns: int
    span_pairs: list[dict[str, Any]]
    word_alpha: float | None
    words: int
    confusions: list[dict[str, Any]]
    over_time: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The values of `kdecs annotate agreement --json`."""
        return dict(vars(self))


def agreement_of(
    annotations: Sequence[Annotation], dialogues: Mapping[str, Dialogue], num_labels: int, after: int
) -> Agreement:
    """The agreement of annotators about the turns that they share."""
    emotions = {each.name: each.emotions() for each in annotations}
    by_turn: dict[TurnKey, list[str]] = {}
    for found in emotions.values():
        for key, label in found.items():
            by_turn.setdefault(key, []).append(label)
    shared_by_all = [labels for labels in by_turn.values() if len(labels) == len(annotations)]
    pairable = [labels for labels in by_turn.values() if len(labels) > 1]
    words = list(_words(annotations, dialogues, after))
    return Agreement(
        annotators=[
            {
                "annotator": each.name,
                "kind": each.kind,
                "turns": len(emotions[each.name]),
                "open": len(each.labels) - len(emotions[each.name]),
                "mean_kappa": _mean(
                    _emotion_pair(emotions, each.name, other.name, num_labels)["kappa"]
                    for other in annotations
                    if other is not each
                ),
                "against_the_others": _against_the_others(each, annotations, each.labels),
            }
            for each in annotations
        ],
        emotion_pairs=[
            _emotion_pair(emotions, a.name, b.name, num_labels) for a, b in combinations(annotations, 2)
        ],
        fleiss_kappa=fleiss_kappa(shared_by_all),
        fleiss_turns=len(shared_by_all),
        alpha=krippendorff_alpha(pairable),
        alpha_turns=len(pairable),
        span_pairs=[_span_pair(a, b, dialogues, after) for a, b in combinations(annotations, 2)],
        word_alpha=krippendorff_alpha(words),
        words=len(words),
        confusions=_confusions(by_turn.values()),
        over_time=[row for each in annotations for row in _over_time(each, annotations)],
    )


def _emotion_pair(
    emotions: Mapping[str, Mapping[TurnKey, str]], first: str, second: str, num_labels: int
) -> dict[str, Any]:
    shared = sorted(emotions[first].keys() & emotions[second].keys())
    left, right = ([emotions[name][key] for key in shared] for name in (first, second))
    return {
        "first": first,
        "second": second,
        "turns": len(shared),
        "agreement": _share(sum(a == b for a, b in zip(left, right, strict=True)), len(shared)),
        "kappa": cohen_kappa(left, right),
        "pabak": pabak(left, right, num_labels),
    }


def decided_causes(label: TurnLabel) -> dict[int, str] | None:
    """The causes of an emotional turn by their turn; None if the turn is neutral or its causes are open."""
    if label.emotion in (None, NEUTRAL) or label.causes is None:
        return None
    return {cause.turn: cause.span for cause in label.causes}


def _span_pair(
    first: Annotation, second: Annotation, dialogues: Mapping[str, Dialogue], after: int
) -> dict[str, Any]:
    """Cause turns and spans of the targets that both find emotional."""
    num_targets = num_named = num_both = num_exact = 0
    overlaps: list[float] = []
    # The words that may be in a span of these targets, one target after another, are the text of alpha_U.
    sections: tuple[list[Section], list[Section]] = [], []
    for key in sorted(first.labels.keys() & second.labels.keys()):
        left, right = (decided_causes(each.labels[key]) for each in (first, second))
        if left is None or right is None:
            continue
        num_targets += 1
        num_named += len(left) + len(right)
        both = left.keys() & right.keys()
        num_both += len(both)
        num_exact += sum(left[turn] == right[turn] for turn in both)
        overlaps += [squad_f1(left[turn], right[turn]) for turn in both]
        for utterance in dialogues[key[0]].utterances[: key[1] + after]:
            words = _word_places(utterance.text)
            for found, causes in zip(sections, (left, right), strict=True):
                place = span_place(utterance.text, causes.get(utterance.turn, ""))
                inside = [n for n, word in enumerate(words) if _overlap(word, place)]
                _extend(found, inside[0] if inside else len(words), is_unit=False)
                _extend(found, len(inside), is_unit=True)
                _extend(found, len(words) - inside[-1] - 1 if inside else 0, is_unit=False)
    return {
        "first": first.name,
        "second": second.name,
        "targets": num_targets,
        "cause_turn_f1": _share(2 * num_both, num_named),
        "spans": num_both,
        "exact": _share(num_exact, num_both),
        "token_f1": _mean(overlaps),
        "alpha_u": krippendorff_alpha_u(*sections),
    }


def _extend(sections: list[Section], length: int, *, is_unit: bool) -> None:
    """Add a section to the end; a gap that follows a gap is one with it."""
    start = sections[-1].end if sections else 0
    if not length:
        return
    if sections and not is_unit and not sections[-1].is_unit:
        last = sections.pop()
        start, length = last.start, last.length + length
    sections.append(Section(start, length, is_unit))


def _words(
    annotations: Sequence[Annotation], dialogues: Mapping[str, Dialogue], after: int
) -> Iterable[list[str]]:
    """For each word that may be in a span of a target: whether each annotator has it in one."""
    keys = sorted({key for each in annotations for key in each.labels})
    for dialogue_id, target in keys:
        named = [
            decided_causes(each.labels[key])
            for each in annotations
            if (key := (dialogue_id, target)) in each.labels
        ]
        decided = [causes for causes in named if causes is not None]
        if len(decided) < 2:
            continue
        for utterance in dialogues[dialogue_id].utterances[: target + after]:
            places = [span_place(utterance.text, causes.get(utterance.turn, "")) for causes in decided]
            for word in _word_places(utterance.text):
                yield [str(_overlap(word, place)) for place in places]


def _word_places(text: str) -> list[tuple[int, int]]:
    """The characters [start, end) of each word of a text."""
    return [match.span() for match in re.finditer(r"\S+", text)]


def _overlap(word: tuple[int, int], place: tuple[int, int] | None) -> bool:
    return place is not None and place[0] < word[1] and word[0] < place[1]


def span_place(text: str, span: str) -> tuple[int, int] | None:
    """The characters [start, end) of a span in its turn, at its first place; None for no span."""
    start = text.find(span) if span else -1
    return None if start < 0 else (start, start + len(span))


def majority(labels: Sequence[Any]) -> Any | None:
    """The value that more than half of the votes have, or None."""
    counts = Counter(labels).most_common(1)
    return counts[0][0] if counts and 2 * counts[0][1] > len(labels) else None


def _against_the_others(
    one: Annotation, annotations: Sequence[Annotation], keys: Iterable[TurnKey]
) -> float | None:
    """The share of an annotator's emotions that the majority of the others has, where the others have one."""
    hits = []
    for key in keys:
        mine = one.labels[key].emotion
        others = [
            label
            for other in annotations
            if other is not one and key in other.labels and (label := other.labels[key].emotion) is not None
        ]
        consensus = majority(others)
        if mine is not None and consensus is not None:
            hits.append(float(mine == consensus))
    return _mean(hits)


def _over_time(one: Annotation, annotations: Sequence[Annotation]) -> Iterable[dict[str, Any]]:
    """Agreement with the others' majority in fifths of an annotator's turns, by the time of the decision."""
    dated = sorted((label.at, key) for key, label in one.labels.items() if label.at is not None)
    bounds = [round(n * len(dated) / _BLOCKS) for n in range(_BLOCKS + 1)]
    for start, end in pairwise(bounds):
        if block := dated[start:end]:
            yield {
                "annotator": one.name,
                "from": block[0][0],
                "to": block[-1][0],
                "turns": len(block),
                "against_the_others": _against_the_others(one, annotations, [key for _, key in block]),
            }


def _confusions(labels_of_turns: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
    """The pairs of labels that annotators most often give to the same turn."""
    counts: Counter[tuple[str, str]] = Counter()
    for labels in labels_of_turns:
        for a, b in combinations(sorted(labels), 2):
            if a != b:
                counts[a, b] += 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [{"first": a, "second": b, "count": n} for (a, b), n in ranked[:_MOST_CONFUSIONS]]


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
