"""Generated text against its references: BLEU, chrF, ROUGE, exact match."""

import unicodedata
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np

from fat5.tasks.metrics.bootstrap import Floats, Metric, eval_library, mean_of


def text_metrics(
    predictions: Sequence[str], targets: Sequence[str | Sequence[str]], names: Sequence[str]
) -> dict[str, Metric]:
    """bleu, chrf, rouge1, rouge2, rougeL (0 to 100) and exact_match (0 to 1).

    bleu and chrf are sacrebleu's with its defaults (mteval-13a tokens; character 6-grams, no word n-grams). A rouge is
    the mean F1 of rouge-score without stemming, over words of letters and digits of any script: rouge-score's own
    tokenizer takes every letter beyond a to z for a space. exact_match compares without surrounding white space.

    Where a target is a list, bleu and chrf count against all its texts, as sacrebleu does; the others take the nearest.
    """
    metrics: dict[str, Metric] = {}
    references = [[target] if isinstance(target, str) else list(target) or [""] for target in targets]
    pairs = list(zip(predictions, references, strict=True))
    rouges = [name for name in names if name.startswith("rouge")]
    if rouges:
        scorer = eval_library("rouge_score.rouge_scorer", "rouge-score").RougeScorer(rouges, tokenizer=Words())
        scores = [scorer.score_multi(texts, said) for said, texts in pairs]
        for name in rouges:
            metrics[name] = mean_of([100 * score[name].fmeasure for score in scores])
    if "bleu" in names:
        metrics["bleu"] = _corpus_metric("BLEU", predictions, references)
    if "chrf" in names:
        metrics["chrf"] = _corpus_metric("CHRF", predictions, references)
    if "exact_match" in names:
        metrics["exact_match"] = mean_of([said.strip() in [text.strip() for text in texts] for said, texts in pairs])
    return {name: metrics[name] for name in names}


class Words:
    """Lower-case words of letters, marks and digits, in any script; on ASCII text those of rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """The words in their order; composed and decomposed accents are the same."""
        folded = unicodedata.normalize("NFC", text).lower()
        kept = (letter if unicodedata.category(letter)[0] in "LMN" else " " for letter in folded)
        return "".join(kept).split()


def _corpus_metric(name: str, predictions: Sequence[str], references: list[list[str]]) -> Metric:
    """A metric of sacrebleu, from the statistics of each example that its own significance tests resample."""
    scorer: Any = getattr(eval_library("sacrebleu.metrics", "sacrebleu"), name)()
    # sacrebleu's paired tests use these two methods of its Metric in the same way; it has no public name for them.
    streams = [*zip_longest(*references)] or [()]  # the n-th references of all examples, None where there is none
    statistics = np.asarray(scorer._extract_corpus_statistics(predictions, streams), dtype=np.float64)

    def resample(counts: Floats) -> Floats:
        sums = (counts @ statistics).astype(np.int64).tolist()
        return np.array([scorer._compute_score_from_stats(row).score for row in sums])

    return Metric(len(references), resample)
