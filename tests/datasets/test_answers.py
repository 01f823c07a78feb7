"""Grading against hand-written completions whose right verdict is plain to a reader."""

from __future__ import annotations

import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tribunal.core.errors import DataError
from tribunal.datasets.answers import grade, grade_continuation, plain_number, same, second_opinion

C, W, U = "correct", "incorrect", "unparsable"

NUMBERS = [
    # plain statements
    ("The answer is 18.", "18", C),
    ("The answer is 18!", "18", C),
    ("So she makes 18 dollars every day.", "18", C),
    ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18", C),
    ("#### 18", "18", C),
    ("####18 dollars", "18", C),
    ("A: 18", "18", C),
    ("Q: How many?\nA: 18", "18", C),
    ("**A:** 18", "18", C),
    ("Answer: 632", "632", C),
    ("\nAnswer: 632", "633", W),
    ("**Answer:** 18", "18", C),
    ("**Final Answer**: 18", "18", C),
    ("## Final Answer\n18", "18", C),
    ("**Final Answer**\n\\[\n\\boxed{18}\n\\]", "18", C),
    ("The final answer is\n$$18$$", "18", C),
    ("The answer is: **18**", "18", C),
    ("ANSWER: 18", "18", C),
    ("the answer would be 18 eggs", "18", C),
    ("Therefore, the answer to the question is 18 eggs per day.", "18", C),
    ("The answer is x = 18", "18", C),
    ("The answer is 3 + 15 = 18 dollars.", "18", C),
    ("The answer is 5 times 3, which is 15.", "15", C),
    ("The answer is 18 dollars for 2 days.", "18", C),
    ("The answer is clear. Adding up gives 18", "18", C),
    ("The answer is not 20. It is 18", "18", C),
    # the last statement wins
    ("\\boxed{20} Wait, that is wrong. \\boxed{18}", "18", C),
    ("\\boxed{18} Wait, that is wrong. \\boxed{20}", "18", W),
    ("The answer is 20. Let me check. No: the answer is 18.", "18", C),
    ("#### 20\nCorrection:\n#### 18", "18", C),
    ("\\boxed{18}. This took 5 steps.", "18", C),
    ("The answer is 18. This took 5 steps.", "18", C),
    ("#### 18\n\nI hope that helps in 2024!", "18", C),
    # headings are not answers
    ("#### Step 3: add\nThe total is 18", "18", C),
    ("#### 3. Add them up\nThe total is 18", "18", C),
    # thinking does not count
    ("<think>The answer is 20. \\boxed{20}</think>The answer is 18.", "18", C),
    ("<think>\\boxed{18}</think>The answer is 20.", "18", W),
    ("<think>so 18</think>\n\n\\boxed{18}", "18", C),
    ("no tag, thought first: 20</think>18", "18", C),
    ("<think>18</think>20</think>18", "18", C),
    ("<think>It must be 18 because", "18", U),
    ("<think>18</think>", "18", U),
    ("<think>18</think>I cannot say.", "18", U),
    # boxes
    ("\\boxed{18}", "18", C),
    ("\\boxed {18}", "18", C),
    ("\\boxed 18", "18", C),
    ("\\fbox{18}", "18", C),
    ("$\\boxed{18}$", "18", C),
    ("\\boxed{\\boxed{18}}", "18", C),
    ("\\boxed{\\text{18}}", "18", C),
    ("\\boxed{\\mathbf{18}}", "18", C),
    ("\\boxed{x = 18}", "18", C),
    ("\\boxed{\\$18.00}", "18", C),
    ("\\boxed{18 \\text{ dollars}}", "18", C),
    ("\\boxed{18\\text{cm}^2}", "18", C),
    ("\\boxed{\\frac{36}{2}}", "18", C),
    ("\\boxed{\\dfrac{3}{4}}", "0.75", C),
    ("\\boxed{1{,}080}", "1080", C),
    ("\\boxed{1\\,080}", "1080", C),
    ("\\boxed{1,080}", "1080", C),
    ("\\boxed{10,80}", "1080", W),
    ("\\boxed{-3}", "-3", C),
    ("\\boxed{\u22123}", "-3", C),
    ("\\boxed{3}", "-3", W),
    ("\\boxed{90^\\circ}", "90", C),
    ("\\boxed{50\\%}", "50", C),
    ("\\boxed{\\text{Janet makes } \\$18}", "18", C),
    ("\\boxed{2\\sqrt{81}}", "18", C),
    ("\\boxed{3^2 \\cdot 2}", "18", C),
    ("\\boxed{3^2}", "18", W),
    ("\\boxed{18x}", "18", W),
    ("\\boxed{18, 20}", "18", W),
    ("\\boxed{x = 18 \\text{ or } x = 20}", "18", W),
    ("\\boxed{\\text{eighteen}}", "18", U),
    ("\\boxed{}", "18", U),
    ("The total is 18. \\boxed{}", "18", C),
    ("\\boxed{5!}", "120", C),
    ("so we get \\boxed{\\frac{1}{", "18", U),
    # forms of a number
    ("The answer is $18.00.", "18", C),
    ("The answer is 18.0", "18", C),
    ("The answer is 18.5", "18", W),
    ("The answer is 1,080.", "1080", C),
    ("The answer is $1,080,000.50", "1080000.50", C),
    ("The answer is 1080", "1,080", C),
    ("The answer is -$5", "-5", C),
    ("The answer is €18", "18", C),
    ("The answer is 3/4", "0.75", C),
    ("The answer is 1 1/2 cups", "1.5", C),
    ("The answer is .5", "0.5", C),
    ("The answer is 1.5 \\times 10^{3}", "1500", C),
    ("The answer is 1.5e3", "1500", C),
    ("The answer is 18 km/h", "18", C),
    ("The answer is 50%.", "50", C),
    ("The answer is 50%.", "0.5", C),
    ("The answer is 0.5", "50%", C),
    ("The answer is 50%", "0.5%", W),
    ("The answer is 50", "0.5", W),
    ("The answer is 1.5 million dollars", "1500000", C),
    ("The answer is １８", "18", C),
    ("The answer is `18`", "18", C),
    ("The answer is 18 or 20", "18", U),
    ("The answer is either 20 or 18", "18", U),
    ("The answer is 2\\pi", "2", U),
    ("10-18", "18", C),
    ("We get 5-18", "-18", W),
    # nothing there
    ("", "18", U),
    ("I do not know.", "18", U),
    ("x_18 and y^18", "18", U),
]  # fmt: skip


@pytest.mark.parametrize(("response", "gold", "verdict"), NUMBERS)
def test_a_number_is_graded_as_a_reader_would(response, gold, verdict):
    assert grade(response, gold).verdict == verdict


OTHER = [
    ("\\boxed{x^2+1}", "1+x^2", C),
    ("\\boxed{x^2-1}", "1+x^2", W),
    ("\\boxed{\\left(3, \\dfrac{\\pi}{2}\\right)}", "\\left( 3, \\frac{\\pi}{2} \\right)", C),
    ("\\boxed{(\\frac{\\pi}{2}, 3)}", "\\left( 3, \\frac{\\pi}{2} \\right)", W),
    ("\\boxed{\\sqrt{117}}", "3\\sqrt{13}", C),
    ("\\boxed{3 \\sqrt {13}}", "3\\sqrt{13}", C),
    ("\\boxed{[-2, 7]}", "x \\in [-2,7]", C),
    ("The answer is $6 - 5i$.", "6 - 5i", C),
    ("So we have $x = 2$ and hence\n$$p - q$$", "p-q", C),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}", C),
    ("\\boxed{Carla}", "\\text{Evelyn}", W),
    ("The answer is Evelyn because she ran fastest.", "Evelyn", C),
    ("The answer is No, because it rains.", "no", C),
    ("The answer is not clear.\nYes.", "Yes", C),
    ("So yes.", "Yes", C),
    ("**No**", "Yes", W),
    ("Answer: nobody", "no", W),
    ("The answer is yes or no.", "yes", U),
    ("It rained all day and nobody came to the party.", "yes", U),
    ("\\boxed{\\text{(C)}}", "C", C),
]  # fmt: skip


@pytest.mark.parametrize(("response", "gold", "verdict"), OTHER)
def test_expressions_and_words_are_graded_as_a_reader_would(response, gold, verdict):
    assert grade(response, gold).verdict == verdict


DATES = ["12/11/1937", "12/25/1937", "01/04/1938", "12/04/1937"]
PEOPLE = ["the red book", "Alice", "a bird", "red"]
CHOICES = [
    ("The answer is (B).", DATES, "B", C),
    ("The answer is B.", DATES, "B", C),
    ("Answer: B", DATES, "(B)", C),
    ("**Answer: B) 12/25/1937**", DATES, "B", C),
    ("answer: b", DATES, "B", C),
    ("ANSWER: (b)", DATES, "B", C),
    ("The answer is **B**", DATES, "B", C),
    ("The correct option is B because of the calendar.", DATES, "B", C),
    ("Option B is correct.", DATES, "B", C),
    ("I choose option (B)", DATES, "B", C),
    ("\\boxed{B}", DATES, "B", C),
    ("\\boxed{\\text{B}}", DATES, "B", C),
    ("\\boxed{\\text{(B)}}", DATES, "B", C),
    ("\\boxed{\\mathrm{B. } 12/25/1937}", DATES, "B", C),
    ("\\boxed{12/25/1937}", DATES, "B", C),
    ("The answer is 12/25/1937.", DATES, "B", C),
    ("Counting on, tomorrow is 12/25/1937.", DATES, "B", C),
    ("#### B", DATES, "B", C),
    ("B", DATES, "B", C),
    ("B. 12/25/1937", DATES, "B", C),
    ("(A) is wrong. (C) is wrong. So:\n(B)", DATES, "B", C),
    ("First I thought the answer is (A). But the answer is (B).", DATES, "B", C),
    ("<think>The answer is (A).</think>The answer is (B).", DATES, "B", C),
    ("The answer is (B).", DATES, "12/25/1937", C),
    ("The answer is (C).", DATES, "B", W),
    ("A: 12/11/1937\nB: 12/25/1937\nC: 01/04/1938\nI pick B.", DATES, "B", C),
    ("The answer is A because it comes first.", DATES, "A", C),
    ("A", DATES, "A", C),
    ("Option A", DATES, "A", C),
    # the article is no letter
    ("A bird sat there. I cannot tell.", DATES, "A", U),
    ("The answer is a date in December.", DATES, "A", U),
    ("The answer is: A date in December.", DATES, "A", U),
    ("A lot of days pass.", DATES, "A", U),
    ("The answer is a bird.", PEOPLE, "C", C),
    ("The answer is the red book.", PEOPLE, "A", C),
    ("It must be Alice.", PEOPLE, "B", C),
    # no commitment
    ("The answer is (A) or (B).", DATES, "A", U),
    ("The answer is either A or B", DATES, "B", U),
    ("\\boxed{A, B}", DATES, "A", U),
    ("\\boxed{E}", DATES, "A", U),
    ("", DATES, "A", U),
    ("<think>The answer is (B)", DATES, "B", U),
]  # fmt: skip


@pytest.mark.parametrize(("response", "choices", "gold", "verdict"), CHOICES)
def test_a_choice_is_graded_as_a_reader_would(response, choices, gold, verdict):
    assert grade(response, gold, choices).verdict == verdict


@pytest.mark.parametrize(
    ("response", "gold", "verdict"),
    [
        (" Paris, which lies on the Seine.", " Paris", C),
        (" Parisian", "Paris", W),
        ("paris", "Paris", C),
        ("7\nQ: 5+5=10", "7", C),
        ("8\nQ: 1+6=7", "7", W),
        ("70", "7", W),
        ("7.5", "7", W),
        ("7. Next", "7", C),
        ("Let us see ... the answer is 7.", "7", C),
        ("\\boxed{8}", "7", W),
        ("  ", "7", U),
        ("7</think>8", "7", W),
    ],
)
def test_a_continuation_is_right_when_it_begins_with_the_suffix_or_marks_it_as_the_answer(response, gold, verdict):
    assert grade_continuation(response, gold).verdict == verdict


def _forms(value: Decimal) -> dict[str, str]:
    sign, number = ("-" if value < 0 else ""), abs(value)
    fraction = Fraction(number)
    return {
        "plain": f"{value:f}",
        "commas": f"{value:,f}",
        "latex commas": f"{value:,f}".replace(",", "{,}"),
        "thin spaces": f"{value:,f}".replace(",", "\\,"),
        "two more decimals": f"{value:f}{'' if '.' in f'{value:f}' else '.'}00",
        "dollars": f"{sign}\\${number:,f}",
        "units": f"{value:,f} \\text{{ dollars}}",
        "words": f"{value:f} apples",
        "bold": f"**{value:f}**",
        "fraction": f"{sign}\\frac{{{fraction.numerator}}}{{{fraction.denominator}}}",
        "doubled fraction": f"{sign}\\dfrac{{{2 * fraction.numerator}}}{{{2 * fraction.denominator}}}",
        "slash": f"{sign}{fraction.numerator}/{fraction.denominator}",
        "unicode minus": f"{value:,f}".replace("-", "\u2212"),
        "percent": f"{value:f}\\%",
        "equation": f"x = {value:f}",
        "full stop": f"{value:f}.",
    }


PLACES = [
    "First \\boxed{{7777.77}}, no: \\boxed{{{}}}",
    "The answer is {}",
    "Answer: {}",
    "A: {}",
    "#### {}",
    "<think>\\boxed{{3}}</think>\n\\boxed{{{}}}",
]


@settings(max_examples=150, deadline=None)
@given(
    value=st.decimals(min_value=-(10**9), max_value=10**9, places=2) | st.integers(-(10**12), 10**12).map(Decimal),
    form=st.sampled_from(sorted(_forms(Decimal(1)))),
    place=st.sampled_from(PLACES),
)
def test_a_number_is_right_in_every_form_and_place_and_a_neighbour_is_wrong(value, form, place):
    written = _forms(value)[form]
    if place.startswith("####") and form in ("equation",):
        place = "Answer: {}"
    assert grade(place.format(written), f"{value:f}").verdict == C
    assert grade(place.format(written), f"{value + 1:f}").verdict != C or form == "percent"


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200), gold=st.sampled_from(["18", "\\frac{1}{2}", "yes", "0.5"]))
def test_any_text_gets_a_verdict(text, gold):
    if gold == "\\frac{1}{2}":
        text = text.replace("$", "").replace("\\", "")[:20]
    assert grade(text, gold).verdict in (C, W, U)


PIECES = [
    *(
        "3",
        "18",
        "0",
        "1,080",
        " ",
        "  ",
        "/",
        ".",
        ",",
        "-",
        "+",
        "=",
        "%",
        "$",
        "\\$",
        "e5",
        "*",
        "**",
        "\n",
        "\\frac",
        "{",
        "}",
        "(",
        ")",
    ),
    *("\\text{ eggs}", "#### ", "answer is ", "A: ", "or", "\\,", "{,}", "\\%", "^", "_", "x", " million", " km", "/h", "\u2212", "½"),
]


@settings(max_examples=1500, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=14))
def test_any_jumble_of_what_numbers_are_made_of_gets_a_verdict(pieces):
    assert grade("".join(pieces), "18").verdict in (C, W, U)


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=8), gold=st.sampled_from(["18", "x+1", "(1, 2)"]))
def test_any_jumble_in_a_box_gets_a_verdict_from_the_process_too(pieces, gold):
    assert grade("\\boxed{" + "".join(pieces) + "}", gold).verdict in (C, W, U)


def test_towers_and_deep_brackets_end_soon_and_are_never_correct():
    start = time.monotonic()
    deep = "(" * 3000 + "18" + ")" * 3000
    assert grade(f"\\boxed{{{deep}}}", "18").verdict == U
    assert grade("\\boxed{" * 3000 + "18" + "}" * 3000, "18").verdict == C
    assert grade("\\boxed{" + "{" * 3000, "18").verdict == U
    assert grade("\\boxed{" + "9" * 100_000 + "}", "18").verdict != C
    assert grade("9" * 100_000, "18").verdict != C
    assert grade("\\boxed{1e999999999}", "18").verdict != C
    assert grade("1e999999999", "18").verdict != C
    assert grade("answer " * 20_000, "18").verdict == U
    assert grade("\\text{" * 5_000 + "\\sqrt" * 5_000, "18").verdict == U
    assert grade("the answer is " * 20_000, "18").verdict == U
    assert grade("the answer is " * 20_000, "A", DATES).verdict == U
    assert time.monotonic() - start < 5
    assert grade("\\boxed{9^{9^{9^{9}}}}", "18").verdict == U
    assert time.monotonic() - start < 15


def test_a_long_response_costs_little():
    text = "We add 3 and 4, so x = 7 dollars. The answer may change. " * 2000 + "\n#### 18"
    start = time.monotonic()
    assert grade(text, "18").verdict == C
    assert time.monotonic() - start < 1


def test_the_answer_found_is_reported_in_plain_form():
    assert grade("\\boxed{\\$1{,}080.50}", "18").answer == "1080.5"
    assert grade("The answer is 1/3", "18").answer == "1/3"
    assert grade("The answer is (B)", "A", DATES).answer == "B"
    assert grade("", "18").answer is None


def test_a_gold_that_cannot_be_an_answer_is_refused():
    with pytest.raises(DataError, match="empty"):
        grade("18", " ")
    with pytest.raises(DataError, match="none of the 4 choices"):
        grade("B", "E", DATES)


def test_two_extracted_answers_are_the_same_as_text_as_numbers_as_words_or_as_mathematics():
    for first, second in (("B", "B"), ("1,080", "1080.0"), ("0.5", "1/2"), ("The Yes", "yes"), ("x + 1", "1+x"), ("$x^2$", "x^2")):
        assert same(first, second) and same(second, first), (first, second)
    for first, second in (("B", "C"), ("7", "8"), ("yes", "no"), ("x + 1", "x - 1"), ("p or q (unclear", "7")):
        assert not same(first, second) and not same(second, first), (first, second)


def test_second_opinion_agrees_with_the_number_path_on_well_behaved_answers():
    for response in ("So \\boxed{18}.", "The answer is $18$.", "\\boxed{1,080}"):
        for gold in ("18", "1080"):
            assert second_opinion(response, gold) == grade(response, gold).verdict


def test_every_gold_of_gsm8k_is_read_and_graded_right_when_repeated(shared_data):
    for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines():
        solution = line.rpartition("####")[2].strip().rstrip('"}')
        assert plain_number(solution) is not None
        assert grade(f"Some steps with 3 and 4.\n#### {solution}", solution).verdict == C
