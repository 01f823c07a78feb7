"""Examples: right answers at the right tokens, splits by problem, and nothing that depends on other traces."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from tests.oracle.helpers import BUILTIN, addition, additions, example, made, one_task, sentence_labels
from tests.traces.helpers import decode
from tribunal.core import registry
from tribunal.core.errors import ConfigError, DataError
from tribunal.core.records import Problem
from tribunal.datasets import answers
from tribunal.models.loading import load_model
from tribunal.oracle.audit import AuditSettings, audit_examples
from tribunal.oracle.examples import build_examples, default_layers, split_of
from tribunal.oracle.tasks.pairs import make_pairs
from tribunal.oracle.tasks.random_bit import bit_of
from tribunal.oracle.tasks.task import PACKAGE, BaseTask, ExampleSettings, make_tasks, require, task_class
from tribunal.traces.sentence_classes import by_rules

RNG = np.random.default_rng(0)
STORY = ["She sold 48 clips.", "Half of 48 is 24.", "Wait, is that right?", "So 48 + 24 = 72.", "The answer is 72."]
KINDS = ["problem_setup", "active_computation", "uncertainty_management", "active_computation", "final_answer_emission"]


def drafts(name: str, trace, label, problem, sentences=None, *, builtin: bool = False, **settings: Any):
    return one_task(name, builtin=builtin, per_trace=99, **settings).examples(trace, label, problem, sentences, np.random.default_rng(0))


def build(made_traces, names, *, builtin: bool = True, sentence=None, seed: int = 0, **settings: Any):
    known = ExampleSettings(**settings)
    decoder = load_model(BUILTIN).format.decode if builtin else decode
    traces, labels, problems = zip(*made_traces, strict=True)
    tasks = make_tasks(names, known, decoder, builtin=builtin)
    return list(build_examples(tasks, traces, labels, {p.id: p for p in problems}, sentence, known, seed, n_layers=36))


def test_steps_of_a_sum_are_read_with_their_column_digit_and_carry_at_their_boundary():
    made_trace = addition(347, 285)  # 7+5=12 write 2 carry 1 | 4+8+1=13 write 3 carry 1 | 3+2+1=6 write 6
    for name, targets in (("step_index", "123"), ("step_digit", "236"), ("carry", "11")):
        found = drafts(name, *made_trace, builtin=True)
        assert [draft.target for draft in found] == list(targets)
    text = load_model(BUILTIN).format.decode
    ends = [text(made_trace[0].completion_ids[: draft.tokens[-1] + 1]) for draft in drafts("step_index", *made_trace, builtin=True)]
    assert [end.rpartition(" write ")[2] for end in ends] == ["2 carry 1 | ", "3 carry 1 | ", "6</think>"]
    assert {len(draft.tokens) for draft in drafts("step_digit", *made_trace, builtin=True)} == {11}


def test_a_redone_step_has_its_columns_number_again_and_a_slip_is_read_as_it_was_written():
    slipped = addition(17, 15, 1, "7+5=12 write 7 carry 1 | wait 7+5=12 write 2 carry 1 | 1+1+1=3 write 3</think>\nAnswer: 32<sep>y<eos>")
    assert [draft.target for draft in drafts("step_index", *slipped, builtin=True)] == ["1", "1", "2"]
    assert [draft.target for draft in drafts("step_digit", *slipped, builtin=True)] == ["7", "2", "3"]


def test_a_trace_that_is_no_written_sum_is_not_asked_about_steps():
    broken = addition(17, 15, 2, "7+5=12 write write</think>\nAnswer: 32<sep>y<eos>")
    assert drafts("step_index", *broken, builtin=True) == []


def test_no_problem_is_in_two_splits_and_its_split_depends_on_nothing_but_its_id():
    found = build(additions(40), ["step_index", "random_bit"])
    splits = {}
    for one in found:
        assert splits.setdefault(one.problem_id, one.split) == one.split
    alone = build(additions(40)[7:8], ["carry"], seed=5)
    assert {example.split for example in alone} == {splits[alone[0].problem_id]}
    shares = Counter(split_of(f"p{n}", test_share=0.2, validation_share=0.1) for n in range(4000))
    assert abs(shares["test"] / 4000 - 0.2) < 0.03 and abs(shares["validation"] / 4000 - 0.1) < 0.02


def test_a_traces_examples_do_not_depend_on_the_traces_and_tasks_around_it():
    names = ["context_prediction", "step_digit", "correctness"]
    together = build(additions(9), names, per_trace=2)
    alone = [e for made_trace in additions(9) for e in build([made_trace], ["correctness"], per_trace=2)]
    assert len(alone) == 18 and alone == [e for e in together if e.task == "correctness"]
    assert alone != build(additions(9), ["correctness"], per_trace=2, seed=1)
    assert len({example.key for example in together}) == len(together)


@pytest.mark.parametrize(("frequent", "rare"), [("correct", "incorrect"), ("incorrect", "correct")])
def test_a_model_that_is_nearly_always_right_is_asked_about_three_right_traces_for_a_wrong_one(frequent, rare):
    """Or the label audit would refuse the recipe on any problems that its model can do."""
    verdicts = [rare if n % 25 == 0 else frequent for n in range(1000)]
    traces = [made(STORY, problem=f"p{n // 2}", sample=n % 2, verdict=verdict) for n, verdict in enumerate(verdicts)]
    found = build(traces, ["correctness"], builtin=False)
    counts = Counter(e.target for e in {e.trace_key: e for e in found}.values())
    targets = {"correct": "yes", "incorrect": "no"}
    assert counts[targets[rare]] == 40 and 90 <= counts[targets[frequent]] <= 150
    assert audit_examples(found, AuditSettings(), tasks=["correctness"]).refusals == []
    assert build(traces[:3], ["random_bit"], builtin=False) == build(traces, ["random_bit"], builtin=False)[:12]
    even = [made(STORY, problem=f"p{n}", verdict=("correct", "correct", "incorrect")[n % 3]) for n in range(30)]
    assert len(build(even, ["correctness"], builtin=False)) == 30 * 4, "nobody is passed over where there are enough of both"
    assert len(build(traces[1:20], ["correctness"], builtin=False)) == 19 * 4, "nor where there is one verdict only"


def test_layers_are_a_quarter_half_and_three_quarters_drawn_one_by_one_or_all_together():
    assert default_layers(36) == [9, 18, 27]
    traces = [made(STORY, problem=f"p{n}") for n in range(30)]
    one = build(traces, ["correctness"], builtin=False)
    assert Counter(len(e.layers) for e in one) == {1: len(one)} and {e.layers[0] for e in one} == {9, 18, 27}
    assert {tuple(e.layers) for e in build(traces, ["correctness"], builtin=False, layers_per_example="all")} == {(9, 18, 27)}
    assert {e.n_vectors for e in build(traces, ["correctness"], builtin=False, vectors=1, layers=[3, 4], layers_per_example="all")} == {2}


def test_the_random_bit_is_even_over_traces_and_in_every_question_of_one_the_same():
    bits = [bit_of(f"p{n}/0") for n in range(2000)]
    assert abs(bits.count("1") - 1000) < 100
    found = build(additions(12), ["random_bit"])
    assert all(len({e.target for e in found if e.trace_key == key}) == 1 for key in {e.trace_key for e in found})


def test_context_prediction_asks_for_tokens_that_are_not_injected_and_stand_right_beside_them():
    trace, label, problem = made(STORY)
    text = "".join(map(chr, trace.completion_ids))
    found = drafts("context_prediction", trace, label, problem)
    assert len(found) > 20
    for draft in found:
        count = int("".join(c for c in draft.question if c.isdigit()))
        start = draft.tokens[-1] + 1 if "next" in draft.question or "after" in draft.question else draft.tokens[0] - count
        assert draft.target == text[start : start + count] and start >= 0
        assert not set(draft.tokens) & set(range(start, start + count))


def test_sentence_tasks_ask_at_the_end_of_their_sentence_and_answer_with_its_label():
    trace, label, problem = made(STORY)
    tiers, thirds = ["low", "high", "medium", "critical", None], ["low", "middle", "middle", "high", None]
    rows = [{"sentence_class": k, "tier": t, "answer_third": a, "importance": 0.1} for k, t, a in zip(KINDS, tiers, thirds)]
    sentences = sentence_labels(trace, rows)
    for name, targets in (
        ("sentence_class", [kind.replace("_", " ") for kind in KINDS]),
        ("sentence_importance", tiers[:4]),
        ("answer_tracking", thirds[:4]),
    ):
        found = drafts(name, trace, label, problem, sentences)
        assert [draft.target for draft in found] == targets and all(draft.target in draft.choices for draft in found)
        assert [draft.tokens[-1] for draft in found] == [span.end_token - 1 for span in label.sentences][: len(targets)]
        assert all(draft.tokens[0] >= span.start_token for draft, span in zip(found, label.sentences))  # nothing of the sentence before
        assert drafts(name, trace, label, problem, None) == []


def test_summaries_come_from_the_traces_own_classes_and_importance_so_no_two_are_alike():
    targets = set()
    for n in range(20):
        story = [f"She sold {n + 3} clips.", *STORY[1:]]
        trace, label, problem = made(story, problem=f"p{n}")
        important = sentence_labels(
            trace, [{"sentence_class": k, "importance": i} for k, i in zip(KINDS, [0.5 + n, 0.1, 0.2, 0.3 + n % 2, None])]
        )
        [draft] = drafts("reasoning_summary", trace, label, problem, important, vectors=2)
        targets.add(draft.target)
        assert len(draft.tokens) == 2 and draft.tokens == sorted(draft.tokens)
    assert len(targets) == 20
    phases = "problem setup, then active computation, then uncertainty management, then active computation, and 1 more phase"
    assert f"{phases}. It turns on: She sold 3 clips." in targets


def test_a_summary_leaves_out_what_has_no_class_and_is_made_where_at_least_half_have_one():
    kinds = ["active_computation", None, "active_computation", "active_computation", None]
    trace, label, problem = made(STORY)
    rows = [{"sentence_class": kind, "importance": i} for kind, i in zip(kinds, [0.1, 0.9, 0.2, 0.3, None])]
    [draft] = drafts("reasoning_summary", trace, label, problem, sentence_labels(trace, rows))
    assert draft.target == "active computation, then active computation (2). It turns on: Half of 48 is 24."
    rows[0]["sentence_class"] = None
    assert drafts("reasoning_summary", trace, label, problem, sentence_labels(trace, rows)) == []


def test_rules_class_enough_of_a_plain_story_for_a_summary():
    trace, label, problem = made(["Natalia sold clips to friends.", *STORY[1:4], "Natalia is happy.", STORY[4]])
    classes = by_rules(decode(trace.completion_ids), label)
    assert classes.count(None) == 2
    labels = sentence_labels(trace, [{"sentence_class": name, "importance": 0.1} for name in classes])
    assert len(drafts("reasoning_summary", trace, label, problem, labels)) == 1


def test_no_summary_turns_on_a_sentence_that_rollouts_do_not_tell_from_chance():
    trace, label, problem = made(STORY)
    rows = [{"sentence_class": kind, "importance": 0.2, "importance_p": 0.02} for kind in KINDS]  # five of them: 0.02 is chance
    assert drafts("reasoning_summary", trace, label, problem, sentence_labels(trace, rows)) == []
    rows[3]["importance_p"] = 0.01
    assert len(drafts("reasoning_summary", trace, label, problem, sentence_labels(trace, rows))) == 1


@pytest.mark.parametrize(
    ("sentences", "turn", "finish", "quoted"),
    [
        (["Half of 48 is", "48 clips."], 0, "stop", "Half of 48 is."),  # the line ended there
        (["She sold 48.", "Half of 48 is"], 1, "stop", "Half of 48 is."),
        (["She sold 48.", "Half of 48 is"], 1, "length", "Half of 48 is"),
        (["She sold 48.", "That is what we have:", "It is 1."], 1, "length", "That is what we have ..."),
    ],
)
def test_a_summary_has_no_end_only_where_the_trace_was_cut_off_in_the_sentence_that_it_quotes(sentences, turn, finish, quoted):
    trace, label, problem = made(sentences, separator="\n")
    trace = trace.model_copy(update={"finish_reason": finish})
    rows = [{"sentence_class": "problem_setup", "importance": float(i == turn)} for i in range(len(sentences))]
    [draft] = drafts("reasoning_summary", trace, label, problem, sentence_labels(trace, rows))
    assert draft.target.partition("It turns on: ")[2] == quoted
    examples = [example("reasoning_summary", target=draft.target, key=str(n)) for n in range(2)]
    assert any("end in mid-sentence" in line for line in audit_examples(examples, AuditSettings()).refusals) == (quoted[-1] != ".")


def test_hint_use_is_asked_only_where_the_hint_can_be_what_moved_the_answer(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"problem_id": f"h{n}", "without": f"q{n}", "hint": "13", "kind": "authority"} for n in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = ["72", "72", "13", None]  # q2 gives the hint's answer by itself, q3 none
    hinted = ["13", "72", "13", "13"]
    traces = [made(STORY, problem=f"q{n}", **{"answer": "72"}) for n in range(4)] + [made(STORY, problem=f"h{n}") for n in range(4)]
    traces = [(t, label.model_copy(update={"answer": a}), p) for (t, label, p), a in zip(traces, plain + hinted)]
    found = build(traces, ["hint_use", "correctness"], builtin=False, pairs=pairs, verdicts=["correct", "incorrect", "unparsable"])
    assert {(e.problem_id, e.target) for e in found if e.task == "hint_use"} == {("h0", "yes"), ("h1", "no")}
    assert {e.stratum for e in found if e.task == "hint_use"} == {"authority"}
    assert {e.problem_id: e.group for e in found} == {f"{kind}{n}": f"q{n}" for kind in "qh" for n in range(4)}
    split = {e.problem_id: e.split for e in found}
    assert [split[f"h{n}"] for n in range(4)] == [split[f"q{n}"] for n in range(4)]  # a problem and its hinted twin, in every task


def test_hinted_twins_stay_together_where_nothing_is_asked_about_their_hints():
    """Without ``examples.pairs``; a name that only looks like a twin's is its own problem."""
    names = [f"q{n}{mark}" for n in range(20) for mark in ("", "#hint", "#authority", "#more")] + ["alone#hint"]
    found = build([made(STORY, problem=name) for name in names], ["random_bit"], builtin=False)
    group = {e.problem_id: e.group for e in found}
    assert all(group[f"q{n}{mark}"] == f"q{n}" for n in range(20) for mark in ("", "#hint", "#authority"))
    assert group["q3#more"] == "q3#more" and group["alone#hint"] == "alone#hint"
    assert len({e.split for e in found if e.group == "q3"}) == 1


def test_hinted_problems_name_a_wrong_answer_and_keep_the_gold_one():
    problems = [
        Problem(id=f"p{n}", question="How many?", answer=str(n), dataset="d", revision="1") for n in range(30)
    ] + [Problem(id="mc", question="Which?", answer="B", choices=["x", "y", "z"], dataset="d", revision="1")]  # fmt: skip
    rows, pairs = make_pairs(problems, "authority")
    assert len(rows) == 2 * len(pairs) == 62 and len({row["id"] for row in rows}) == 62
    for problem, pair in zip(problems, pairs):
        assert pair.without == problem.id
        assert answers.grade(f"The answer is {pair.hint}.", problem.answer, problem.choices).verdict == "incorrect"
    assert "professor" in rows[1]["question"] and rows[1]["answer"] == "0"
    with pytest.raises(DataError, match="no wrong answer can be made of 'Paris'"):
        make_pairs([problems[0].model_copy(update={"answer": "Paris"})])


def test_your_own_questions_are_asked_of_the_trace_and_sentence_they_name(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"problem_id": "p", "question": "Is it about clips?", "answer": "yes", "sentence": 1, "sample": 0},
            {"problem_id": "p", "question": "Is it a poem {really}?", "answer": "no"}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = (drafts("yes_no", *made(STORY, sample=sample), yes_no=path) for sample in (0, 1))
    assert [(d.question, d.target) for d in first] == [("Is it about clips?", "yes"), ("Is it a poem {really}?", "no")]
    assert [d.question for d in second] == ["Is it a poem {really}?"]
    assert first[0].tokens[-1] == made(STORY)[1].sentences[1].end_token - 1
    path.write_text(json.dumps({**rows[0], "sentence": 5}) + "\n")
    with pytest.raises(DataError, match="has no sentence 5; it has 5"):
        drafts("yes_no", *made(STORY), yes_no=path)
    path.write_text(json.dumps({**rows[0], "answer": "maybe"}) + "\n")
    with pytest.raises(DataError, match="line 1: answer"):
        one_task("yes_no", yes_no=path)


@pytest.mark.parametrize("lost", [{"problem_id": "q"}, {"problem_id": "p", "sample": 7}])
def test_a_question_about_a_problem_or_sample_without_a_trace_is_refused_and_not_passed_over(tmp_path, lost):
    path, asked = tmp_path / "mine.jsonl", {"question": "Is it about clips?", "answer": "yes"}
    path.write_text("".join(json.dumps({**asked, **row}) + "\n" for row in [{"problem_id": "p"}, lost, lost]))
    name = "q" if lost["problem_id"] == "q" else "p/7"
    with pytest.raises(DataError, match=rf"mine\.jsonl: 2 of 3 lines are about .* without a trace, first '{name}'; take them out"):
        build([made(STORY)], ["yes_no"], builtin=False, yes_no=path)
    path.write_text(json.dumps({**asked, "problem_id": "p", "sample": 0}) + "\n")
    truncated = made(STORY, verdict="truncated")  # it has a trace; that it is not asked about is the user's own setting
    assert build([truncated], ["yes_no"], builtin=False, yes_no=path) == []


@pytest.mark.parametrize(("hinted", "plain"), [("h", "gone"), ("gone", "q")])
def test_hint_pairs_of_which_either_problem_has_no_trace_are_refused(tmp_path, hinted, plain):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"problem_id": hinted, "without": plain, "hint": "13"}) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl: 1 of 1 lines are about .* without a trace, first 'gone'"):
        build([made(STORY, problem="h"), made(STORY, problem="q")], ["hint_use"], builtin=False, pairs=path)


def test_labels_of_other_sentences_or_traces_are_refused():
    trace, label, problem = made(STORY)
    with pytest.raises(DataError, match=r"4 labelled sentences, but labels\.jsonl has 5; run label_sentences again"):
        build([(trace, label, problem)], ["sentence_class"], builtin=False, sentence={trace.key: sentence_labels(trace, [{}] * 4)})
    with pytest.raises(DataError, match="run label_traces again"):
        build([(trace, made(STORY, sample=3)[1], problem)], ["correctness"], builtin=False)


def test_a_task_that_lacks_what_it_needs_is_refused_with_where_that_comes_from():
    require(["carry"], {"addition"}, "x.yaml: train_oracle.tasks")
    with pytest.raises(ConfigError, match=r"x\.yaml: train_oracle\.tasks: task 'sentence_class' needs label_sentences with classes"):
        require(["carry", "sentence_class"], {"addition"}, "x.yaml: train_oracle.tasks")
    with pytest.raises(ConfigError, match="unknown oracle task 'carri'; did you mean 'carry'"):
        require(["carri"], set(), "x")


@pytest.mark.parametrize("name", registry.names(PACKAGE))
def test_a_task_is_one_file_with_one_class_and_a_code_of_its_own(name: str):
    kind = task_class(name)
    assert issubclass(kind, BaseTask) and kind.phrasings and kind.kind in ("closed", "open", "yes_no")
    codes = [task_class(other).code for other in registry.names(PACKAGE)]
    assert codes.count(kind.code) == 1
