"""How a predicted span compares with a gold one: RECCON's three classes and SQuAD's token F1."""

import re
import string
from collections import Counter
from typing import Literal

Match = Literal["correct", "similar", "incorrect"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def match(gold: str, predicted: str) -> Match:
    """ "correct" if equal after stripping, "similar" if one contains the other, else "incorrect".

    The empty string is contained in every string: no span for a positive row is "similar".
    """
    gold, predicted = gold.strip(), predicted.strip()
    if gold == predicted:
        return "correct"
    if predicted in gold or gold in predicted:
        return "similar"
    return "incorrect"


def squad_tokens(text: str) -> list[str]:
    """Lower-case, without ASCII punctuation and the articles a, an, the, split at white space."""
    return _ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split()


def squad_f1(gold: str, predicted: str) -> float:
    """F1 of the two bags of tokens, 0 to 1; both empty 1, one empty 0 (SQuAD 2.0, Rajpurkar et al. 2018)."""
    gold_tokens, predicted_tokens = squad_tokens(gold), squad_tokens(predicted)
    if not gold_tokens or not predicted_tokens:
        return float(gold_tokens == predicted_tokens)
    common = sum((Counter(gold_tokens) & Counter(predicted_tokens)).values())
    return 2 * common / (len(gold_tokens) + len(predicted_tokens))
