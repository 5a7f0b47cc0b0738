"""Which candidate an answer names, and the metrics ``ValidRatio`` and ``GenHit`` of that."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from recbole.evaluator.base_metric import AbstractMetric
from recbole.utils import EvaluatorType

from recbole_sdpo.data.catalogue import folded

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Letters of scripts that put no blank between words: Thai, Lao, Burmese, Khmer, kana, Han."""

SPACED = rf"[^\W{UNSPACED}]"
"""The letters and digits of other scripts."""

VALID, HIT = "answers.valid", "answers.hit"
"""Under which RecBole's collector keeps of each target: is the answer valid, and is it a hit?"""


def named(answer: str, titles: Sequence[str]) -> int | None:
    """Which of ``titles`` an answer names: its place among them, or None if not exactly one.

    Titles and answer are compared :func:`folded`: case, blanks and compatible forms of characters
    do not matter. A title is named where it stands in the answer as whole words, but not where it
    stands inside a longer title that is named there: "Star Trek: First Contact" names no film
    called "Star Trek". Two candidates whose titles differ in nothing that matters are both named,
    so that such an answer names more than one.
    """
    answer, titles = folded(answer), [folded(title) for title in titles]
    spans = [
        (*match.span(), title)
        for title in {*titles} - {""}
        for match in re.finditer(_as_words(title), answer)
    ]

    def inside_a_longer(start: int, stop: int) -> bool:
        around = ((first, last) for first, last, _ in spans if first <= start and stop <= last)
        return any(last - first > stop - start for first, last in around)

    whole = {title for start, stop, title in spans if not inside_a_longer(start, stop)}
    places = [place for place, title in enumerate(titles) if title in whole]
    return places[0] if len(places) == 1 else None


def _as_words(title: str) -> str:
    """A pattern of ``title`` as whole words, where its script has blanks that tell."""

    def letters(edge: str) -> str:
        """What may not stand beside that end of the title, if anything."""
        if edge.isdigit():
            return r"\w"  # a number before a counter is no title
        return "" if re.match(f"[{UNSPACED}]", edge) else SPACED

    before, after = letters(title[0]), letters(title[-1])
    return (before and f"(?<!{before})") + re.escape(title) + (after and f"(?!{after})")


class _ShareOfAnswers(AbstractMetric):
    metric_type = EvaluatorType.RANKING

    def calculate_metric(self, dataobject: Any) -> dict[str, float]:
        """The share under the metric's name, in lower case and without a k."""
        (key,) = self.metric_need
        share = float(dataobject.get(key).double().mean())
        return {type(self).__name__.lower(): round(share, self.decimal_place)}


class ValidRatio(_ShareOfAnswers):
    """The share of answers that name exactly one candidate (S-DPO, section 4.1)."""

    metric_need = (VALID,)


class GenHit(_ShareOfAnswers):
    """The share of answers that name one candidate, the target: the paper's HitRatio@1 of text."""

    metric_need = (HIT,)


OF_ANSWERS = {kind.__name__.lower(): kind for kind in (ValidRatio, GenHit)}
"""The metrics that need the model to write, by RecBole's name."""
