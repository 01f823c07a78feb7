"""What predicts correctness without any activation: the controls that a probe has to beat, cross-fitted in its own folds.

Every control is a logistic regression (the same solver, its C chosen inside the same folds) on a few facts of the trace,
or on TF-IDF of its text or of its question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logit
from sklearn.feature_extraction.text import CountVectorizer, TfidfTransformer

from tribunal.probes.crossfit import CrossFit, Floats, Prepare, Rows, cross_fit
from tribunal.probes.linear import to_device
from tribunal.probes.table import Table

BASELINES = ("majority", "length", "finish", "bag_of_words", "question_only", "logprob")
"""Controls that read no activation, in the order in which they are shown."""
DESCRIPTIONS = {
    "majority": "the share of correct traces, for every trace",
    "length": "number of readable tokens, and its logarithm",
    "finish": "cut off by the token limit; thought never closed",
    "bag_of_words": "TF-IDF of the words and signs of the trace",
    "question_only": "TF-IDF of the question's words, signs and characters (1 to 3), and the question's length",
    "logprob": "mean and minimum log-probability of the sampled tokens",
    "layer_0": "the probe of the same kind and pooling after block 0",
    "permuted_labels": "ridge refitted on labels permuted within each problem, mean and 95 % range over permutations: chance in the "
    "within-problem pairs; its AUROC keeps what tells easy problems from hard ones",
    "random_directions": "random unit vectors, oriented on the training rows: mean and 95 % range over vectors",
}
FACT_CS = (0.01, 1.0, 100.0)
TEXT_CS = (0.1, 1.0, 10.0, 100.0)
MAX_WORDS = 20_000
MIN_TRACES_PER_WORD = 2


def available(table: Table) -> list[str]:
    """Controls that these traces allow: log-probabilities may be missing from imported ones."""
    return [name for name in BASELINES if name != "logprob" or table.logprobs is not None]


def fit_baseline(name: str, table: Table, rows: Rows) -> CrossFit:
    """Out-of-fold logits of one control, one per trace."""
    if name in ("bag_of_words", "question_only"):
        prepare = tf_idf(table.texts) if name == "bag_of_words" else tf_idf(table.questions, characters=True)
        return cross_fit(prepare, rows, TEXT_CS, standardise=False).fits["logistic"]
    facts = facts_of(name, table)
    if facts.shape[1] == 0 or not np.ptp(facts, axis=0).any():
        return _constant(rows)  # fitted by fold it would differ between folds, against the labels held out: AUROC below 1/2
    return cross_fit(to_device(facts), rows, FACT_CS).fits["logistic"]


def facts_of(name: str, table: Table) -> Floats:
    """A control's features, [n_traces, n_features]."""
    if name == "majority":
        return np.empty((len(table), 0))
    if name == "length":
        return np.column_stack([table.n_tokens, np.log1p(table.n_tokens)]).astype(float)
    if name == "finish":
        return np.column_stack([table.unfinished, table.unclosed]).astype(float)
    assert name == "logprob" and table.logprobs is not None, name
    return table.logprobs


def _constant(rows: Rows) -> CrossFit:
    share = float(np.average(rows.labels, weights=rows.weights))
    n_folds = int(rows.folds.max()) + 1
    return CrossFit(
        logits=np.full(len(rows.labels), logit(share)),
        inner_auroc=np.full(n_folds, 0.5),
        c_of_fold=[],
        c=None,
        vector=np.empty(0),
        bias=float(logit(share)),
    )


def tf_idf(texts: Sequence[str], *, characters: bool = False) -> Prepare:
    """TF-IDF features whose vocabulary and weights come from the training rows.

    Args:
        characters: add character n-grams (1 to 3) and the text's length: a number's size is not in its word.
    """
    counters = [CountVectorizer(token_pattern=r"\w+|[^\w\s]", lowercase=True, max_features=MAX_WORDS)]
    if characters:
        counters.append(CountVectorizer(analyzer="char_wb", ngram_range=(1, 3), max_features=MAX_WORDS))
    counts = [counter.fit_transform(texts) for counter in counters]
    lengths = np.log1p([len(text) for text in texts])[:, None]

    def prepare(training: NDArray[np.bool_]) -> torch.Tensor:
        blocks = []
        for block in counts:
            seen = np.asarray((block[training] > 0).sum(0)).ravel() >= MIN_TRACES_PER_WORD
            kept = block[:, seen]
            blocks.append(TfidfTransformer(sublinear_tf=True).fit(kept[training]).transform(kept).toarray())
        if characters:
            blocks.append((lengths - lengths[training].mean()) / (lengths[training].std() or 1.0))
        return to_device(np.hstack(blocks))

    return prepare
