"""Sentence classes by rules and by a judge: what does not apply says nothing, what fails fails."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest

from tests.judge_server import JudgeServer
from tests.oracle.helpers import addition, made
from tests.traces.helpers import decode
from tribunal.models.judge import HttpJudge, JudgeError, JudgeSettings
from tribunal.models.loading import load_model
from tribunal.traces.sentence_classes import by_judge, by_rules, read_reply
from tribunal.traces.sentence_labels import CLASSES

STORY = {
    "Okay, so Natalia sold clips to 48 of her friends in April.": "problem_setup",
    "The question asks how many she sold altogether.": "problem_setup",
    "Let me find the number for May first.": "plan_generation",
    "To find the total, we add both months.": "plan_generation",
    "I recall that May has 31 days.": "fact_retrieval",
    "There are 60 minutes in an hour.": "fact_retrieval",
    "48 / 2 = 24.": "active_computation",
    "Half of 48 is 24.": "active_computation",
    "Wait, that's not right.": "uncertainty_management",
    "Hmm, 48 + 24 might be 62.": "uncertainty_management",
    "Let me double-check: 48 + 24 = 72.": "self_checking",
    "So I can verify this by adding again.": "self_checking",
    "Therefore, she sold both numbers.": "result_consolidation",
    "That makes 72 clips in total.": "result_consolidation",
    "The answer is \\boxed{72}.": "final_answer_emission",
    "Natalia is a girl.": None,
}


def test_rules_name_the_class_of_plain_cases_and_nothing_where_none_applies():
    trace, label, _ = made(list(STORY))
    assert by_rules(decode(trace.completion_ids), label) == list(STORY.values())
    assert set(STORY.values()) == {*CLASSES, None}


def test_rules_tell_the_steps_the_redone_steps_and_the_answer_of_a_written_sum():
    trace, label, _ = addition(
        17, 15, 1, "7+5=12 write 7 carry 1 | wait 7+5=12 write 2 carry 1 | 1+1+1=3 write 3</think>\nAnswer: 32<sep>y<eos>"
    )
    text = load_model_decode(trace)
    assert by_rules(text, label) == ["active_computation", "uncertainty_management", "active_computation", "final_answer_emission"]


def load_model_decode(trace) -> str:
    from tests.oracle.helpers import BUILTIN

    return load_model(BUILTIN).format.decode(trace.completion_ids[: trace.readable])


def judge_of(server: JudgeServer, monkeypatch, attempts: int = 2) -> HttpJudge:
    monkeypatch.setenv("no_proxy", "*")
    return HttpJudge(JudgeSettings(url=server.url, model="stub", attempts=attempts), sleep=lambda _: None)


def numbered(question: str) -> list[str]:
    return re.findall(r"^\d+\. (.*)$", question.partition("Sentences:")[2], re.MULTILINE)


def test_a_judge_is_asked_about_twenty_sentences_at_a_time_and_its_classes_come_back_in_order(monkeypatch):
    sentences = [f"Step {n} is here." for n in range(45)]
    trace, label, problem = made(sentences)

    def reply(question: str) -> str:
        answers = {str(i): CLASSES[int(s.split()[1]) % 8].replace("_", " ").title() for i, s in enumerate(numbered(question), 1)}
        return f"Here you are:\n```json\n{json.dumps(answers)}\n```"

    with JudgeServer(reply) as server:
        found = by_judge(decode(trace.completion_ids), label, problem, judge_of(server, monkeypatch))
    assert found == [CLASSES[n % 8] for n in range(45)]
    assert [len(numbered(r["messages"][0]["content"])) for r in server.requests] == [20, 20, 5]
    assert "Step 19 is here." in server.requests[1]["messages"][0]["content"].partition("Sentences:")[0]  # what came before


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ("I cannot do that.", "no JSON object"),
        ('{"1": "active_computation"}', "wanted 1, 2"),
        ('{"1": "active_computation", "2": "thinking"}', "unknown class 'thinking'"),
        ('{"1": "active_computation", "2": null}', "unknown class 'none'"),
        ('["active_computation", "active_computation"]', "no JSON object"),
    ],
)
def test_a_judge_whose_answers_cannot_be_read_fails_with_what_it_said_and_never_becomes_a_class(monkeypatch, reply, complaint):
    trace, label, problem = made(["She sold 48.", "Half of it is 24."])
    with JudgeServer(lambda _: reply) as server:
        with pytest.raises(JudgeError, match=rf"trace p/0, sentences 0 to 1: .*{complaint}.*2 attempts"):
            by_judge(decode(trace.completion_ids), label, problem, judge_of(server, monkeypatch))
        assert len(server.requests) == 2


def test_a_readable_answer_at_a_later_attempt_counts(monkeypatch):
    trace, label, problem = made(["She sold 48.", "Half of it is 24."])
    replies = iter(["sorry", '{"1": "problem_setup", "2": "active_computation"}'])
    with JudgeServer(lambda _: next(replies)) as server:
        found = by_judge(decode(trace.completion_ids), label, problem, judge_of(server, monkeypatch))
    assert found == ["problem_setup", "active_computation"]


def test_an_answer_that_was_cut_off_is_asked_for_again_and_never_read(monkeypatch):
    trace, label, problem = made(["She sold 48.", "Half of it is 24."])
    whole = '{"1": "problem_setup", "2": "active_computation"}'
    cut = {"message": {"content": '{"1": "fact_retrieval", "2": "fact_retrieval"} or rather'}, "finish_reason": "length"}
    replies = iter([json.dumps({"choices": [cut]}).encode(), whole])
    with JudgeServer(lambda _: next(replies)) as server:
        found = by_judge(decode(trace.completion_ids), label, problem, judge_of(server, monkeypatch))
    assert found == ["problem_setup", "active_computation"]
    message = r"trace p/0, sentences 0 to 1: .*ran out of tokens.*max_new_tokens.*2 attempts"
    with JudgeServer(lambda _: json.dumps({"choices": [cut]}).encode()) as server, pytest.raises(JudgeError, match=message):
        by_judge(decode(trace.completion_ids), label, problem, judge_of(server, monkeypatch))


def test_of_several_objects_in_a_reply_the_last_counts():
    assert read_reply('{"1": "x"} no: {"1": "Self-Checking"}', 1) == ["self_checking"]
    assert Counter(read_reply(json.dumps({str(n): c for n, c in enumerate(CLASSES, 1)}), 8)) == Counter(CLASSES)
