"""The judge over HTTP, against a real server: its key, its failures, and that nothing takes the place of an answer."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from tests.judge_server import JudgeServer
from tests.oracle.helpers import BUILTIN
from tribunal.models.judge import CutOff, HttpJudge, JudgeError, JudgeSettings, LocalJudge, open_judge


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge_of(server_url: str, **settings) -> tuple[HttpJudge, list[float]]:
    waits: list[float] = []
    return HttpJudge(JudgeSettings(url=server_url, model="stub", **settings), sleep=waits.append), waits


def test_the_question_the_model_and_the_key_of_the_environment_reach_the_server(monkeypatch):
    with JudgeServer(lambda question: f"You asked: {question}") as server:
        judge, _ = judge_of(server.url, api_key_env="MY_KEY")
        assert judge.ask("why?") == "You asked: why?"
        monkeypatch.setenv("MY_KEY", "secret")
        judge.ask("why?", attempt=2)
    first, second = server.requests
    assert first["path"] == "/v1/chat/completions" and first["model"] == "stub" and first["temperature"] == 0.0
    assert first["key"] is None and second["key"] == "Bearer secret"
    assert second["temperature"] > 0 and second["seed"] == 2
    assert "secret" not in judge.name + judge.settings.model_dump_json()


def test_a_busy_server_is_asked_again_after_waiting_and_then_given_up():
    codes = iter([503, 429, "here"])
    with JudgeServer(lambda _: next(codes)) as server:
        judge, waits = judge_of(server.url)
        assert judge.ask("q") == "here" and waits == [1.0, 2.0]
    with JudgeServer(lambda _: 500) as server:
        judge, waits = judge_of(server.url, attempts=3)
        with pytest.raises(JudgeError, match=r"cannot be reached \(HTTP 500 .*, 3 attempts\).*what is labelled already is kept"):
            judge.ask("q")
        assert len(server.requests) == 3 and waits == [1.0, 2.0]


def test_a_refused_key_a_wrong_address_and_a_server_of_another_kind_are_told_apart_at_once():
    for reply, message in (
        (401, r"refuses the key \(HTTP 401.*MY_KEY \(not set now\)"),
        (404, "check judge.url and judge.model"),
        (b"<html>", "no chat completion"),
    ):
        with JudgeServer(lambda _, reply=reply: reply) as server:
            judge, waits = judge_of(server.url, api_key_env="MY_KEY")
            with pytest.raises(JudgeError, match=message):
                judge.ask("q")
            assert len(server.requests) == 1 and waits == []


def test_what_the_server_says_of_a_question_that_it_refuses_is_shown_in_one_line_and_what_it_says_of_a_key_is_not():
    said = b'{"error":\n "maximum context length is 4096 tokens"}' + b"x" * 500
    with JudgeServer(lambda _: (400, said)) as server, pytest.raises(JudgeError, match="HTTP 400 Bad Request") as caught:
        judge_of(server.url)[0].ask("q")
    assert '{"error": "maximum context length is 4096 tokens"}xx' in str(caught.value) and "x" * 200 not in str(caught.value)
    assert "\n" not in str(caught.value)
    with JudgeServer(lambda _: (401, b"incorrect key: my-secret")) as server, pytest.raises(JudgeError) as caught:
        judge_of(server.url)[0].ask("q")
    assert "my-secret" not in str(caught.value)


@pytest.mark.parametrize("content", ["null", '"{\\"1\\": \\"active_comp"'])
def test_an_answer_that_ran_out_of_tokens_says_so_and_how_many_it_had(content):
    reply = b'{"choices": [{"message": {"content": %s}, "finish_reason": "length"}]}' % content.encode()
    with JudgeServer(lambda _: reply) as server, pytest.raises(CutOff, match=r"longer than judge\.max_new_tokens \(1024\); raise that, or"):
        judge_of(server.url)[0].ask("q")


def test_where_and_how_patiently_a_judge_is_asked_changes_no_label_and_may_change_on_a_resume():
    known = JudgeSettings(url="http://a:1/v1", model="stub").fingerprint()
    moved = JudgeSettings(url="https://b/v1", model="stub", api_key_env="MINE", timeout_s=1, attempts=9)
    assert moved.fingerprint() == known
    assert JudgeSettings(model="other").fingerprint() != known != JudgeSettings(model="stub", max_new_tokens=9).fingerprint()


def test_an_unreachable_judge_is_refused_when_it_is_opened():
    with JudgeServer(lambda _: "ready") as server:
        url = server.url
        open_judge(JudgeSettings(url=url, model="stub"))
    with pytest.raises(JudgeError, match=r"stub at http://127\.0\.0\.1:\d+/v1 cannot be reached \(.*refused.*1 attempts\)"):
        open_judge(JudgeSettings(url=url, model="stub", attempts=1))


def test_settings_say_which_judge_completely():
    for given, message in (
        ({}, "judge.model is missing"),
        ({"kind": "local"}, "judge.local is missing"),
        ({"model": "m", "url": "localhost"}, "must begin with http"),
    ):
        with pytest.raises(ValidationError, match=message):
            JudgeSettings(**given)


def test_a_local_model_answers_greedily_at_first_and_anew_at_later_attempts():
    judge = LocalJudge(JudgeSettings(kind="local", local=BUILTIN, max_new_tokens=120))
    assert judge.ask("347 + 285 =").strip() == judge.ask("347 + 285 =").strip() == "Answer: 632"
    with pytest.raises(CutOff, match=r"max_new_tokens \(9\)"):
        LocalJudge(JudgeSettings(kind="local", local=BUILTIN, max_new_tokens=9)).ask("347 + 285 =")
