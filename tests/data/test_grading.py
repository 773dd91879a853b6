"""Answers by value and by name: a table of hard cases, each with its verdict."""

from fractions import Fraction

import pytest

from fedsb.data.grading.verdict import after_hashes, as_number, grade_choice, grade_number, last_answer, last_boxed

NUMBERS = {
    "72": 72,
    "-5": -5,
    "+5": 5,
    "12.": 12,
    "12.0": 12,
    "12.40": Fraction(62, 5),
    ".5": Fraction(1, 2),
    "-.5": Fraction(-1, 2),
    "007": 7,
    # thousands
    "1,080": 1080,
    "1,234,567": 1234567,
    "1,234,567.5": Fraction(2469135, 2),
    "1{,}234": 1234,
    "1\\,000": 1000,
    "1\\,000\\,000": 1000000,
    # currency, units, percent, words
    "$18": 18,
    "\\$18": 18,
    "$18.00.": 18,
    "$ 1,080.50 a day.": Fraction(2161, 2),
    "-$5": -5,
    "$-5": -5,
    "$-5$": -5,
    "- $5": -5,
    "€20": 20,
    "18 dollars": 18,
    "72 cm^2": 72,
    "72 m²": 72,
    "7 km/h": 7,
    "$5/hour": 5,
    "90^\\circ": 90,
    "50%": 50,
    "50\\%": 50,
    "1.2 million": 1200000,
    "3 Thousand": 3000,
    "2 hundred": 200,
    "1.5 billion": 1_500_000_000,
    "2 trillions": 2_000_000_000_000,
    "\n5\n6": 5,
    "x = -5": -5,
    "about 12": 12,
    "(12)": 12,
    "the temperature is -5 degrees": -5,
    "12, I think": 12,
    "**72**": 72,
    "$72$": 72,
    "\\(72\\)": 72,
    "\\boxed{72}": 72,
    "\\text{72 clips}": 72,
    "\u22125": -5,
    # fractions
    "3/4": Fraction(3, 4),
    "-3/4": Fraction(-3, 4),
    "3 / 4 of a cup": Fraction(3, 4),
    "1 1/2": Fraction(3, 2),
    "-1 1/2": Fraction(-3, 2),
    "\\frac{3}{4}": Fraction(3, 4),
    "\\dfrac{-3}{4}": Fraction(-3, 4),
    "-\\frac{3}{4}": Fraction(-3, 4),
    "$-\\frac{3}{4}$": Fraction(-3, 4),
    "\\frac34": Fraction(3, 4),
    "1\\frac{1}{2}": Fraction(3, 2),
    "½": Fraction(1, 2),
    "1½": Fraction(3, 2),
    # not one number
    "": None,
    "none": None,
    "twelve": None,
    "12,34": None,
    "1,2345": None,
    "12345,678": None,
    "1.234.567": None,
    "1.234,5": None,
    "20 or 30": None,
    "5 out of 10": None,
    "3:30": None,
    "12 hours and 30 minutes": None,
    "x - 5": None,
    "10-5": None,
    "2*3": None,
    "2\\times 3": None,
    "8 + 1": None,
    "2 = 8/4": None,
    "2^10": None,
    "10^2": None,
    "5²": None,
    "5!": None,
    "3\\pi": None,
    "\\sqrt{2}": None,
    "> 5": None,
    "±5": None,
    "v5": None,
    "5k": None,
    "1e3": None,
    "1/0": None,
    "1/2/3": None,
    "９": None,
    "9" * 200: 10**200 - 1,
    "9" * 201: None,
}


@pytest.mark.parametrize(("text", "value"), NUMBERS.items(), ids=[repr(text)[:30] for text in NUMBERS])
def test_numbers_by_value(text, value):
    assert as_number(text) == value


@pytest.mark.parametrize(
    ("gold", "written", "right", "extracted"),
    [
        ("72", "48 + 24 = 72.\nThe answer is: 72", True, "72"),
        ("72", "The answer is: 71. No. The answer is: 72", True, "72"),  # the last one
        ("72", "The answer is: 72. No. The answer is: 71", False, "71"),
        ("1,080", "The answer is: $1080.00.", True, "$1080.00."),
        ("1080", "The answer is: 1,080 dollars", True, "1,080 dollars"),
        ("12", "The answer is: 12.4", False, "12.4"),
        ("12", "The answer is: 11.9999999", False, "11.9999999"),
        ("50", "The answer is: 50%", True, "50%"),
        ("50", "The answer is: 0.5", False, "0.5"),  # never x 100
        ("50", "The answer is: 5000", False, "5000"),
        ("0.5", "The answer is: 50%", False, "50%"),  # never / 100
        ("0.5", "The answer is: 1/2", True, "1/2"),
        ("5", "The answer is: -5", False, "-5"),
        ("1234567", "The answer is: 1,234,567", True, "1,234,567"),
        ("12", "The answer is:\n12 \nThe end", True, "12"),
        ("12", "The answer is:\n\n12 \n\nThe end", True, "12"),
        ("12", "The answer is: 12\n\n### Instruction:\nThe answer is", True, "12"),
        ("72", "The answer is: 48 + 24 = 72", False, "48 + 24 = 72"),  # a formula is no number
        ("72", "48 + 24 = 72", False, None),
        ("72", "#### 72", False, None),  # not what was trained
        ("72", "The answer is: 7", False, "7"),  # cut off
        ("72", "The answer is:", False, None),
        ("72", "The answer is", False, None),
        ("72", "", False, None),
    ],
)
def test_gsm8k_by_value(gold, written, right, extracted):
    verdict = grade_number(gold, written)
    assert (verdict.right, verdict.extracted, verdict.fault) == (right, extracted, None)


def test_a_gold_that_is_no_number():
    with pytest.raises(ValueError, match="'x' is not a single number"):
        grade_number("x", "The answer is: 3")


ANSWERS, TRUTH = ("answer1", "answer2", "answer3", "answer4", "answer5"), ("true", "false")


@pytest.mark.parametrize(
    ("gold", "written", "names", "right", "extracted"),
    [
        ("answer2", "the correct answer is answer2", ANSWERS, True, "answer2"),
        ("answer2", "Answer2: a cat", ANSWERS, True, "answer2"),
        ("answer2", "answer1, or answer2", ANSWERS, False, "answer1"),  # the first
        ("answer1", "the correct answer is answer12", ANSWERS, False, None),
        ("answer1", "the correct answer is", ANSWERS, False, None),
        ("answer3", "answer5", ANSWERS, False, "answer5"),
        ("true", "the correct answer is true", TRUTH, True, "true"),
        ("true", "True.", TRUTH, True, "true"),
        ("true", "untrue", TRUTH, False, None),
        ("false", "false, not true", TRUTH, True, "false"),
        ("false", "", TRUTH, False, None),
    ],
)
def test_choices_by_name(gold, written, names, right, extracted):
    verdict = grade_choice(gold, written, names)
    assert (verdict.right, verdict.extracted) == (right, extracted)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("so $\\boxed{2}$.", "2"),
        ("\\boxed{1} then \\boxed{\\frac{1}{\\sqrt{2}}} and no more", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed{\\left\\{1, 2\\right\\}}", "\\left\\{1, 2\\right\\}"),
        ("\\boxed{\\{1\\}}", "\\{1\\}"),
        ("\\boxed{\\{1, 2}", "\\{1, 2"),
        ("\\boxed{a \\\\ b}", "a \\\\ b"),
        ("\\boxed{\\frac{1}{2}", None),  # cut off
        ("\\boxed{}", None),
        ("\\boxed{ 2 }", "2"),
        ("2", None),
        ("no box but {one brace} more}", None),
    ],
)
def test_the_last_box(text, boxed):
    assert last_boxed(text) == boxed


def test_what_follows_the_marks():
    assert after_hashes("48 #### 1\n#### 1,080 ") == "1,080"
    assert after_hashes("1,080") is None and after_hashes("####") is None
    assert last_answer("The answer is: a\nb\n\nc") == "a\nb"
