"""What a generated answer is worth beside the right ones, as SQuAD defines it (Rajpurkar et al.
2016): letters' case, punctuation, articles and white space do not count. Pure functions on text.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words parted by one space."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def exact_match(answer: str, golds: Sequence[str]) -> float:
    """1 if the answer is one of the right ones, else 0. `golds` is not empty."""
    return max(float(normalise(answer) == normalise(gold)) for gold in golds)


def f1(answer: str, golds: Sequence[str]) -> float:
    """The largest F1 (0 to 1) of the answer's words beside a right one's. `golds` is not empty.

    Where nothing is left of either, F1 is 1 if nothing is left of both, else 0 (SQuAD 2.0).
    """
    return max(_word_f1(normalise(answer).split(), normalise(gold).split()) for gold in golds)


METRICS = {"f1": f1, "exact_match": exact_match}


def _word_f1(words: Sequence[str], gold: Sequence[str]) -> float:
    if not words or not gold:
        return float(words == gold)
    common = (Counter(words) & Counter(gold)).total()
    return 2 * common / (len(words) + len(gold))


def cut(text: str, stops: Sequence[str]) -> str:
    """A generated text up to the first of the stop texts in it, without white space around."""
    ends = [end for stop in stops if (end := text.find(stop)) >= 0]
    return text[: min(ends, default=len(text))].strip()
