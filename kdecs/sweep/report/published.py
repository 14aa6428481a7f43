"""What the paper reports, in percent: Tables 4 to 6 of Chen et al. 2024, and the points of its figures that it prints.

A system lacks what the paper leaves out. The figures are on the paper's own corpora: FG-RECCON for causal spans
(ECSPE), RECCON for cause utterances (ECPE). No single universe of pairs is consistent with every row of Table 4, so a
figure of one's own is comparable as far as corpus and universe agree.
"""

SPANS = ("emotion_accuracy", "exact_match", "positive_f1", "negative_f1", "macro_f1")
UTTERANCES = ("emotion_accuracy", "utterance_positive_f1", "utterance_negative_f1", "utterance_macro_f1")
ABLATION = ("exact_match", "positive_f1", "macro_f1")
GIVEN = ("exact_match", "positive_f1")

_SPANS: dict[str, tuple[float, ...]] = {
    "RoBERTa": (40.30, 26.08, 53.18, 84.75, 68.96),
    "SpanBERT": (42.87, 28.05, 54.21, 85.26, 69.74),
    "ECPE-2D": (44.26, 28.11, 55.18, 86.40, 70.79),
    "MGSAG": (46.74, 29.37, 55.69, 87.93, 71.81),
    "KEC": (47.02, 30.19, 56.94, 88.29, 72.62),
    "LLaMA-7B": (47.87, 31.25, 56.82, 88.70, 72.76),
    "LLaMA-13B": (48.10, 32.09, 57.14, 88.75, 72.94),
    "ChatGPT": (67.20, 33.78, 58.57, 89.42, 73.99),
    "KD-ECS": (48.26, 33.85, 58.62, 89.70, 74.16),
}
_UTTERANCES: dict[str, tuple[float, ...]] = {
    "RoBERTa": (55.98, 49.77, 85.28, 67.53),
    "ECPE-2D": (52.76, 52.39, 95.86, 73.62),
    "MGSAG": (61.11, 56.56, 91.86, 74.21),
    "UECA": (57.62, 57.39, 90.45, 73.92),
    "KEC": (59.33, 59.47, 92.74, 76.11),
    "LLaMA-7B": (59.61, 59.02, 91.60, 75.31),
    "LLaMA-13B": (60.48, 59.83, 92.24, 76.03),
    "ChatGPT": (76.39, 60.44, 92.32, 76.38),
    "KD-ECS": (61.04, 60.51, 92.87, 76.69),
}
_ABLATION: dict[str, tuple[float, ...]] = {
    "KD-ECS": (33.85, 58.62, 74.16),
    "w/o KD": (30.49, 56.27, 72.74),
    "w/o connectives": (29.13, 55.34, 71.59),
    "w/o mask_cau": (28.68, 54.76, 71.04),
}
_GIVEN_FINE: dict[str, tuple[float, ...]] = {
    "RoBERTa": (32.91, 59.10),
    "SpanBERT": (35.48, 61.05),
    "KD-ECS": (36.77, 62.14),
}
_GIVEN_COARSE: dict[str, tuple[float, ...]] = {
    "RoBERTa": (32.63, 58.17),
    "SpanBERT": (34.64, 60.00),
    "KD-ECS": (35.48, 61.32),
}

Figures = dict[str, dict[str, float]]
"""System -> score -> percent."""


def _named(keys: tuple[str, ...], rows: dict[str, tuple[float, ...]]) -> Figures:
    return {name: dict(zip(keys, values, strict=True)) for name, values in rows.items()}


TABLE_4_SPANS, TABLE_4_UTTERANCES = _named(SPANS, _SPANS), _named(UTTERANCES, _UTTERANCES)
TABLE_5 = _named(ABLATION, _ABLATION)
TABLE_6_FINE, TABLE_6_COARSE = _named(GIVEN, _GIVEN_FINE), _named(GIVEN, _GIVEN_COARSE)

# The paper draws both figures without numbers. These points stand in its tables: all of the training data, LLaMA-7B.
FIGURE_3 = {"KD": (1.0, 58.62), "joint": (1.0, 56.27)}
"""Line -> (share of the training data, Pos F1)."""
FIGURE_4 = {"llama-7b": 58.62}
"""Teacher -> Pos F1 of its student."""
