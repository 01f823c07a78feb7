"""The audit of sentence labels warns of what would be learned in place of them."""

from __future__ import annotations

from typing import Any

import pytest

from tribunal.traces.sentence_audit import SentenceAudit
from tribunal.traces.sentence_labels import THIRDS, TIERS, SentenceLabel, TraceSentences


def audited(*traces: list[dict[str, Any]], importance: str = "none", track_answers: bool = False) -> dict[str, Any]:
    audit = SentenceAudit()
    for sample, rows in enumerate(traces):
        audit.see(TraceSentences(problem_id="p", sample=sample, sentences=[SentenceLabel(**row) for row in rows]))
    return audit.as_json(classes="none", importance=importance, track_answers=track_answers)


def test_thirds_that_follow_the_sentences_position_are_warned_of_like_tiers():
    rising = [{"answer_logprob": -3.0 + n, "answer_third": third} for n, third in enumerate(THIRDS)]
    mixed = [{"answer_logprob": value, "answer_third": third} for value, third in zip((-1.0, -3.0, -2.0), ("high", "low", "middle"))]
    found = audited(rising, rising, mixed, track_answers=True)
    assert found["answers"]["position_correlation"] == pytest.approx((1 + 1 - 0.5) / 3)
    [line] = found["warnings"]
    assert "answer_logprob goes with the sentence's position (mean rank correlation +0.50 within traces)" in line and "third" in line
    assert audited(rising, mixed, mixed[::-1], track_answers=True)["warnings"] == []
    tiers = [{"importance": 4.0 - n, "tier": tier} for n, tier in enumerate(reversed(TIERS))]
    [line] = audited(tiers, importance="suppression")["warnings"]
    assert "importance goes with the sentence's position (mean rank correlation -1.00" in line and "tier" in line


def test_traces_whose_rollouts_differ_no_more_than_by_chance_are_counted_and_warned_of():
    def resampled(*p_values: float) -> list[dict[str, Any]]:
        return [
            {"importance": value, "importance_by_chance": 0.2, "importance_p": p, "tier": TIERS[n]}
            for n, (value, p) in enumerate(zip((0.3, 0.1, 0.5, 0.1), p_values))
        ]

    noise, real = resampled(0.3, 0.9, 0.1, 0.9), resampled(0.3, 0.9, 0.001, 0.9)
    found = audited(noise, real, importance="rollouts")
    assert found["importance"]["by_chance"] == {
        "traces": 2, "traces_within_chance": 1, "mean_importance": 0.25, "mean_by_chance": 0.2,
    }  # fmt: skip
    assert "in 1 of 2 traces no sentence moves the answers more than chance does (mean importance 0.25" in found["warnings"][0]
    assert audited(real, importance="rollouts")["warnings"] == []
    assert audited([{"importance": 0.1}], importance="suppression")["importance"]["by_chance"] is None


def test_traces_of_which_more_than_a_tier_is_lost_in_rounding_are_counted_and_warned_of():
    def suppressed(rounding: float) -> list[dict[str, Any]]:
        values = (0.3, 0.02, 0.5, 0.01)
        return [{"importance": value, "importance_by_chance": rounding, "tier": TIERS[n]} for n, value in enumerate(values)]

    [line] = audited(suppressed(0.02), suppressed(0.01), importance="suppression")["warnings"]
    assert line.startswith("in 1 of 2 traces more than 25% of the sentences matter no more than rounding does") and "float32" in line
