"""The rule rewards: worked cases, one test per known hole, and properties that hold for any text."""

import asyncio
import pickle
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, build_tokenizer
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.utils import get_callable_name, is_async_callable

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.files import read_table
from dgrpo_trl.longblocks.questions.languages import LANGUAGES
from dgrpo_trl.rewards import (
    contains_answer_reward,
    exact_match_reward,
    extract_answer,
    get_contains_answer_reward,
    normalize_answer,
    numeric_reward,
    token_f1_reward,
)
from dgrpo_trl.rewards.rules import References


RULES = [exact_match_reward, contains_answer_reward, token_f1_reward, numeric_reward]
# F1 is partial credit by design: it is left out where a hole must give exactly 0
STRICT_RULES = [exact_match_reward, contains_answer_reward]


def score(reward, prediction, reference):
    """One row, called with everything that `GRPOTrainer` passes."""
    (value,) = reward(
        prompts=["Which one?"],
        completions=[prediction],
        completion_ids=[[1, 2]],
        answer=[reference],
        source=["some column"],
        trainer_state=None,
        log_extra=lambda *args: None,
        log_metric=lambda *args: None,
    )
    return value


# The table


TABLE = yaml.safe_load((Path(__file__).parent / "rewards_table.yaml").read_text(encoding="utf-8"))
REWARDS = {"numeric": numeric_reward, "exact": exact_match_reward}


def test_the_table_is_large_and_has_no_row_twice():
    rows = [tuple(row[:3]) for rows in TABLE.values() for row in rows]
    assert len(rows) == len(set(rows)) >= 250


@pytest.mark.parametrize(
    ("name", "completion", "reference", "right", "missed"),
    [(*row[:4], len(row) > 4) for rows in TABLE.values() for row in rows],
)
def test_rewards_say_what_a_sensible_grader_says_but_for_the_rows_that_are_counted(
    name, completion, reference, right, missed
):
    assert (score(REWARDS[name], completion, reference) != right) == missed


def test_the_page_counts_the_rows_of_the_table_and_the_misses_by_kind():
    page = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
    counted = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \| (\d+) \|$", page, re.M)
    expected = []
    for kind, rows in TABLE.items():
        missed = [row[3] for row in rows if len(row) > 4]
        expected.append((kind, str(len(rows)), str(missed.count(0)), str(missed.count(1))))
    assert counted == expected


def test_every_language_of_the_builder_announces_answers():
    table = read_table("dgrpo_trl.rewards", "announcements.yaml")
    assert set(table) == set(LANGUAGES)
    for language, words in table.items():
        text = f"{words['noun'][0]}: XYZ"
        assert extract_answer(text) == extract_answer(f"-\n\n**{text}**").strip("*") == "XYZ", language


# Thinking that the prompt has opened

R1_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
QWEN3_TEMPLATE = R1_TEMPLATE.replace(
    "<think>\n{% endif %}",
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


@pytest.mark.parametrize("rule", RULES)
def test_a_completion_that_is_cut_off_in_the_thinking_of_its_prompt_has_no_answer(rule):
    prompts = ["Q<think>\n", "Q<think>\n", "Q<think>\n\n</think>\n\n", "Q"]
    completions = ["The answer: 5", "6?</think>5", "5", "5"]
    assert rule(prompts=prompts, completions=completions, answer=["5"] * 4) == [0.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("template", "kwargs", "opens"),
    [(R1_TEMPLATE, {}, True), (QWEN3_TEMPLATE, {}, False), (QWEN3_TEMPLATE, {"enable_thinking": False}, False)],
    ids=["r1", "qwen3", "qwen3 without thinking"],
)
def test_in_the_trainer_a_template_that_opens_the_thinking_is_seen(make_trainer, template, kwargs, opens):
    seen = []

    def other(completions, **kwargs):
        seen.append(completions)
        return [0.0] * len(completions)

    async def judging(completions, answer: list[References], **kwargs):
        return [float(extract_answer(completion[0]["content"]) == "5") for completion in completions]

    tokenizer = build_tokenizer()
    tokenizer.chat_template = template
    trainer = make_trainer(
        DGRPOTrainer,
        distill_coef=0.0,
        reward_funcs=[exact_match_reward, judging, other],
        chat_template_kwargs=kwargs,
    )
    trainer.processing_class = tokenizer
    prompt = [{"role": "user", "content": "Q"}]
    completions = [[{"role": "assistant", "content": text}] for text in ("5", "6?</think>5")]
    rows = [{"prompt": prompt, "answer": "5"}] * 2
    rewards = trainer._calculate_rewards(rows, [prompt] * 2, completions, [[1], [1]])
    assert rewards[:, 0].tolist() == rewards[:, 1].tolist() == [float(not opens), 1.0]
    assert seen == [completions], "functions of others get what TRL gives them"


# Rows that cannot be scored


def test_references_that_cannot_be_scored_are_counted_before_training(make_trainer, caplog):
    rows = [{"prompt": [{"role": "user", "content": "Q"}], "answer": answer} for answer in ("5", "between 4 and 6")]
    rewards = {"reward_funcs": [exact_match_reward, numeric_reward], "distill_coef": 0.0}
    make_trainer(DGRPOTrainer, train_dataset=Dataset.from_list(rows * 4), **rewards)
    assert (
        "in 4 of 8 rows, first in row 1 (from 0), `numeric_reward` cannot compare the `answer` 'between" in caplog.text
    )
    assert "`exact_match_reward` cannot compare" not in caplog.text


# Extraction


@pytest.mark.parametrize(
    "text, answer",
    [
        ("Paris", "Paris"),
        ("  Paris\n", "Paris"),
        ("", ""),
        ("<think>London?</think>Paris", "Paris"),
        ("London?</think>Paris", "Paris"),  # the chat template wrote `<think>` into the prompt
        ("<think>a</think>London<think>b</think>Paris", "Paris"),
        (r"So the answer: \boxed{Paris}. Done.", "Paris"),
        (r"\boxed {Paris}", "Paris"),
        (r"\boxed{\text{New York}}", "New York"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{50\%}", "50%"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{Paris} as said, \boxed{paris}", "paris"),
        (r"<think>\boxed{London}</think>\boxed{Paris}", "Paris"),
        ("Reasons first.\nAnswer: Paris", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("The answer is: Paris", "Paris"),
        ("Answer: London. No. Answer: Paris", "Paris"),
        ("最终答案：東京", "東京"),
        ("答え: 東京", "東京"),
        ("정답: 서울", "서울"),
        ("Die Antwort: Paris", "Paris"),
        ("Ответ: Париж", "Париж"),
        ("the prayer: Paris", "the prayer: Paris"),
    ],
)
def test_the_final_answer_is_cut_out(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "<think>It must be Paris",
        "<think>a</think>Paris<think>or not",
        r"\boxed{Paris",
        r"\boxed{Paris} \boxed{London}",
        r"\boxed{Paris} \boxed{}",
        r"\boxed{\boxed{Paris} \boxed{London}}",
        r"\boxed{\frac{1}{2}} \boxed{\frac{1}{3}}",
        r"\boxed{}",
        "Answer:",
    ],
)
def test_a_completion_that_commits_to_no_single_answer_has_none(text):
    assert extract_answer(text) == ""
    for rule in RULES:
        assert score(rule, text, "1/2" if rule is numeric_reward else "Paris") == 0.0


def test_the_last_assistant_message_counts():
    messages = [
        {"role": "assistant", "content": "London"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "tool", "content": "London"},
    ]
    assert score(exact_match_reward, messages, "Paris") == 1.0
    assert score(exact_match_reward, messages, "London") == 0.0


@pytest.mark.parametrize(
    "messages, reward",
    [
        ([], 0.0),
        ([{"role": "user", "content": "Paris"}], 0.0),
        ([{"role": "assistant", "content": None, "tool_calls": []}], 0.0),
        ([{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "Paris"}]}], 1.0),
    ],
)
def test_messages_without_text_score_zero_and_parts_are_read(messages, reward):
    assert score(exact_match_reward, messages, "Paris") == reward


# Normalization


@pytest.mark.parametrize(
    "text, same",
    [
        ("東京。", "東京"),
        ("「東京」", "東 京"),
        ("Ｔｏｋｙｏ　１２", "tokyo 12"),
        ("STRASSE", "straße"),
        ("Cafe\u0301", "CAFÉ"),
        ("¿Madrid?", "Madrid"),
        ("مرحبا؟", "مرحبا"),
        ("١٢٣", "123"),
        ("१२३", "123"),
        ("The Beatles", "Beatles"),
        ("a dog", "Dog."),
        ("1,000", "1000"),
        ("12,34,567", "1234567"),
        ("١٬٠٠٠٫٥", "1000.5"),
        (".5", "0.5"),
        ("U.S.A.", "USA"),
        ("J. K. Rowling", "J.K. Rowling"),
        ("well-known", "well known"),
        ("2019\u20132021", "2019-2021"),
        ("Pa\u200bris\ufeff", "Paris"),
        ("`Paris`", "**Paris**"),
        ("−3", "-3"),
    ],
)
def test_writings_of_one_answer_are_equal(text, same):
    assert normalize_answer(text) == normalize_answer(same) != ""
    assert score(exact_match_reward, text, same) == 1.0


@pytest.mark.parametrize(
    "text, other",
    [
        ("1.5", "15"),
        ("1,5", "15"),
        ("-3", "3"),
        ("–3", "3"),
        ("約-3度", "約3度"),
        ("10²", "102"),
        ("1½", "11/2"),
        ("25%", "25"),
        ("$5", "€5"),
        ("C++", "C"),
        ("C#", "C"),
        ("Vitamin A", "Vitamin"),
        ("1987", "21987"),
        ("1,0000", "10000"),
        ("résumé", "resume"),
        ("がん", "かん"),
        ("ป่า", "ปา"),
    ],
)
def test_different_answers_stay_different(text, other):
    assert normalize_answer(text) != normalize_answer(other)
    assert score(exact_match_reward, text, other) == 0.0


def test_articles_are_never_dropped_to_nothing():
    assert normalize_answer("The") == "the"
    assert normalize_answer("the a") == "a"
    assert normalize_answer("The Who") == "who"


@pytest.mark.parametrize("text", ["", "   ", "...", "。！？", "—", "\u200b", "\x00", "؟"])
def test_text_without_content_normalizes_to_nothing(text):
    assert normalize_answer(text) == ""


# The holes of shared rewards, one by one


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reference", ["The Hague", "the The Hague", "Paris", "1987", "in the year 1987"])
def test_the_word_the_is_no_answer(rule, reference):
    assert not score(rule, "the", reference)
    assert not score(rule, "The the THE", reference)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("prediction", ["...", "", " ", "。", "-", "\u200b", r"\boxed{...}", "Answer: ."])
def test_punctuation_is_no_answer(rule, prediction):
    assert score(rule, prediction, "1987") == 0.0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reference", [None, "", "  ", "...", "。", [], [None], ["", "..."]])
@pytest.mark.parametrize("prediction", ["", "...", "the", "Paris"])
def test_a_reference_without_content_cannot_be_scored(rule, reference, prediction):
    assert score(rule, prediction, reference) is None


@pytest.mark.parametrize("rule", RULES)
def test_a_reference_that_is_an_article_matches_nothing_else(rule):
    for prediction in ("", "...", "the cat", "Paris", "The answer is Paris."):
        assert not score(rule, prediction, "The")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("prediction", ["1", "7", "19", "987", "198", "-1987", "19871", "21987", "1,987.1", "1.987"])
def test_a_piece_of_a_number_is_not_the_number(rule, prediction):
    assert score(rule, prediction, "1987") == 0.0
    assert score(rule, "1987", prediction) == 0.0


def test_containment_is_one_way():
    assert score(contains_answer_reward, "Paris", "Paris in Texas") == 0.0
    assert score(contains_answer_reward, "In Paris", "Paris") == 1.0


@pytest.mark.parametrize("rule", STRICT_RULES)
@pytest.mark.parametrize(
    "prediction",
    [
        "Paris or London or Rome",
        "Paris, London, Rome",
        "Paris/London",
        "paris london",
        "PARIS LONDON",
        "Paris\nLondon",
        "- Paris\n- London",
        "either Paris or London",
        "Paris and London",
        "Paris (or London)",
        "The answer is Paris or maybe not.",
        "not Paris",
        "It isn't Paris",
        "Paris?London?",
        "The answer is in Paris London Rome Berlin Madrid.",
        r"\boxed{Paris or London}",
        "Answer: Paris, London",
    ],
)
def test_listing_candidates_scores_zero(rule, prediction):
    assert score(rule, prediction, "Paris") == 0.0


@pytest.mark.parametrize(
    "prediction, reference",
    [
        ("A, B, C, D", "B"),
        ("A B", "A"),
        ("A B", "B"),
        ("yes no", "no"),
        ("no, yes", "yes"),
        ("he she", "she"),
        ("1986 1987 1988", "1987"),
        ("東京、大阪", "東京"),
        ("東京か大阪", "東京"),
        ("不是", "是"),
        ("東京都", "京都"),
        ("東京", "東"),
        ("World War I World War II", "World War II"),
        ("ปารีสลอนดอน", "ปารีส"),
    ],
)
def test_listing_short_candidates_scores_zero_too(prediction, reference):
    assert score(contains_answer_reward, prediction, reference) == 0.0


@pytest.mark.parametrize("prediction", ["between 1986 and 1988", "1987 or 1988", "1986, 1987, 1988", "1987/1988/1989"])
def test_listing_numbers_scores_zero(prediction):
    for reference in ("1986", "1987", "1988"):
        assert score(numeric_reward, prediction, reference) == 0.0


@pytest.mark.parametrize("rule", STRICT_RULES + [numeric_reward])
def test_copying_the_document_scores_zero(rule):
    document = "The bridge was built in 1987 by the city. " * 500 + "It cost 12 million."
    assert score(rule, document, "1987") == 0.0


def test_framing_words_alone_cannot_be_piled_up():
    assert score(contains_answer_reward, "it was " * 6 + "1987", "1987") == 1.0
    assert score(contains_answer_reward, "it was " * 7 + "1987", "1987") == 0.0


@pytest.mark.parametrize("rule", RULES)
def test_several_boxes_with_different_answers_score_zero(rule):
    assert score(rule, r"\boxed{1986} \boxed{1987}", "1987") == 0.0
    assert score(rule, r"\boxed{1987} \boxed{1986}", "1987") == 0.0
    assert score(rule, r"\boxed{1987}, that is \boxed{1987}", "1987") == 1.0


@pytest.mark.parametrize("rule", RULES)
def test_a_guess_inside_the_reasoning_earns_nothing(rule):
    assert score(rule, "<think>1987", "1987") == 0.0
    assert score(rule, r"<think>\boxed{1987}</think>1986", "1987") == 0.0


@pytest.mark.parametrize(
    "code",
    ["__import__('os').system('touch {path}')", "open('{path}', 'w')", "$open('{path}','w')$", r"\open('{path}')"],
)
def test_numbers_are_never_run_as_code(code, tmp_path):
    path = tmp_path / "written"
    for text in (code.format(path=path), r"\boxed{" + code.format(path=path) + "}"):
        assert score(numeric_reward, text, "3") == 0.0
        assert score(numeric_reward, "3", text) in (None, 0.0)
    assert not path.exists()


# Containment


@pytest.mark.parametrize(
    "prediction, reference",
    [
        ("Paris", "Paris"),
        ("The answer is Paris.", "Paris"),
        ("It was written in 1987.", "1987"),
        ("He was born in New York.", "new york"),
        ("It is a dog.", "dog"),
        ("The answer is B.", "B"),
        ("The answer is A.", "A"),
        ("Paris. The answer is Paris.", "Paris"),
        ("答案是東京。", "東京"),
        ("東京です。", "東京"),
        ("1987年", "1987"),
        ("La réponse est Paris.", "Paris"),
        ("The final answer is -3.", "-3"),
    ],
)
def test_a_short_sentence_around_the_reference_counts(prediction, reference):
    assert score(contains_answer_reward, prediction, reference) == 1.0


def test_extra_tokens_are_counted_one_by_one():
    prediction = "Paris is the capital of France"  # beside framing words: capital, France
    assert [score(get_contains_answer_reward(n), prediction, "Paris") for n in (0, 1, 2)] == [0.0, 0.0, 1.0]


def test_a_parameterised_containment_has_a_name_and_can_be_pickled():
    reward = get_contains_answer_reward(2)
    assert get_callable_name(reward) == "contains_answer_reward"
    assert not is_async_callable(reward)
    assert score(pickle.loads(pickle.dumps(reward)), "Paris in France", "Paris") == 1.0


def test_a_negative_number_of_extra_tokens_raises():
    with pytest.raises(ValueError, match="`max_extra_tokens` must be >= 0, got -1"):
        get_contains_answer_reward(-1)


# F1


@pytest.mark.parametrize(
    "prediction, reference, f1",
    [
        ("cat dog", "dog", 2 * 1 / (2 + 1)),
        ("red fox runs", "red dog runs fast", 2 * 2 / (3 + 4)),
        ("x x x", "x", 2 * 1 / (3 + 1)),  # a repeated token counts once
        ("東京都", "東京", 2 * 2 / (3 + 2)),
        ("ไป", "ไ", 2 * 1 / (2 + 1)),
        ("ป่า", "ปา", 2 * 1 / (2 + 2)),  # the tone mark belongs to its consonant
        ("GPT4は強い", "GPT4が強い", 2 * 3 / (4 + 4)),
        ("London", "Paris", 0.0),
        ("1987", "1", 0.0),
    ],
)
def test_f1_is_worked_by_hand(prediction, reference, f1):
    assert score(token_f1_reward, prediction, reference) == pytest.approx(f1)
    assert score(token_f1_reward, reference, prediction) == pytest.approx(f1)


# Numbers


@pytest.mark.parametrize(
    "prediction, reference",
    [
        ("1,000", "1000"),
        ("1000.0", "1000"),
        ("It cost $1,000.", "1000"),
        (r"\boxed{\$1,000}", "1000"),
        ("-3", "−3"),
        ("1/4", "0.25"),
        (r"\frac{1}{4}", "0.25"),
        (r"The answer is $\frac{1}{4}$.", "1/4"),
        ("25%", "0.25"),
        (r"\boxed{25\%}", "1/4"),
        ("3e5", "300,000"),
        (r"3 \times 10^{5}", "300000"),
        ("3 × 10^5", "300000"),
        ("10^12", "1,000,000,000,000"),
        ("5 million", "5,000,000"),
        ("12万", "120000"),
        ("１２", "12"),
        ("١٢", "12"),
        ("1987年", "1987"),
        ("5 kg", "5"),
        ("x = 3", "3"),
        (r"\sqrt{4}", "2"),
        ("1/3", "0.333333"),
        ("5, I repeat, 5", "5"),
        ("-1/4", "-0.25"),
    ],
)
def test_equal_numbers_are_equal(prediction, reference):
    assert score(numeric_reward, prediction, reference) == 1.0


@pytest.mark.parametrize(
    "prediction, reference",
    [
        ("-3", "3"),
        ("1.5", "15"),
        ("1,5", "15"),
        ("1,5", "1.5"),
        ("5 million", "5"),
        ("1.2.3", "1.2"),
        ("1980s", "1980"),
        ("12/5/1987", "1987"),
        ("12:30", "12"),
        ("1987-05-03", "1987"),
        ("1990-3", "1987"),
        ("0.33", "1/3"),
        ("0.0000001", "0.0000002"),
        (r"\frac{1}{0}", "1"),
        ("3 + 4", "7"),
        ("5, or 1.2.3", "5"),
        ("5 (in the 1980s)", "5"),
        ("Paris", "3"),
        ("x", "3"),
        ("10²", "102"),
        (r"\infty", "3"),
        ("nan", "3"),
    ],
)
def test_other_numbers_and_several_numbers_are_not_equal(prediction, reference):
    assert score(numeric_reward, prediction, reference) == 0.0


@pytest.mark.parametrize(
    "reference", ["Paris", "between 1 and 2", "1987-05-03", "1.2.3", "x", "nan", r"\infty", "1,5"]
)
def test_a_reference_that_is_not_one_number_cannot_be_scored(reference):
    assert score(numeric_reward, "3", reference) is None


@pytest.mark.parametrize(
    "prediction",
    [
        "9^{9^{9^{9}}}",
        "9^9^9^9",
        "((9^{99})^{99})^{99}",
        "10^{999999999}",
        "99999!!!",
        "(" * 90 + "1^1" + ")" * 90,
        r"\binom{99999999}{4999999}",
        "9**9**9**9",
    ],
)
def test_a_number_too_big_to_compute_scores_zero_at_once(prediction):
    start = time.monotonic()
    for text in (prediction, f"${prediction}$", r"\boxed{" + prediction + "}"):
        assert score(numeric_reward, text, "3") == 0.0
        assert score(numeric_reward, "3", text) in (None, 0.0)
    assert time.monotonic() - start < 2.0


def test_powers_are_bounded_by_the_size_of_their_value():
    assert score(numeric_reward, "2^{10}", "1024") == 1.0
    assert score(numeric_reward, "(2^{25})^{40}", "(2^{40})^{25}") == 1.0
    assert score(numeric_reward, "2^{1000}+1", "2^{1000}") == 0.0
    assert score(numeric_reward, "3", "(2^{26000})^{40}") is None


ALGEBRA = r"(\sqrt2+\sqrt3+\sqrt5+\sqrt7)^{500}"


@pytest.mark.parametrize(
    "text",
    [
        ALGEBRA,
        rf"\frac{{{ALGEBRA}}}{{{ALGEBRA}}}",
        r"\sqrt{" * 18 + "2" + "}" * 18,
        r"(1+\sqrt2)^{9999}",
        r"((\sqrt2+\sqrt3)^{99})^{99}",
        "^".join("9" * 140),
        r"\pi^{\pi^{\pi^{\pi}}}",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_algebra_ends_at_once_on_any_thread(text):
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        for pair in ((text, "3"), ("3", text), (text, text)):
            assert pool.submit(score, numeric_reward, *pair).result(timeout=5) in (None, 0.0, 1.0)
    assert time.monotonic() - start < 1.0


def test_irrational_numbers_are_equal_only_to_themselves_and_outside_the_main_thread():
    other = r"(\sqrt7+\sqrt5+\sqrt3+\sqrt2)^{500}"
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score, numeric_reward, ALGEBRA, other).result() == 1.0
        assert pool.submit(score, numeric_reward, ALGEBRA.replace("500", "499"), other).result() == 0.0


def test_rules_load_neither_torch_nor_a_client_of_servers_nor_computer_algebra():
    code = (
        "import sys; from dgrpo_trl.rewards import exact_match_reward, numeric_reward\n"
        "assert exact_match_reward(['a'], ['a']) == [1.0]\n"
        "sys.exit(bool({'torch', 'trl', 'transformers', 'openai', 'sympy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# References, arguments


@pytest.mark.parametrize("rule", RULES)
def test_the_best_of_several_references_counts(rule):
    assert score(rule, "1987", ["1986", "1987", "..."]) == 1.0
    assert score(rule, "1985", ["1986", "1987"]) == 0.0


def test_numeric_ignores_references_that_are_no_number():
    assert score(numeric_reward, "5", ["five", "5"]) == 1.0
    assert score(numeric_reward, "five", ["five"]) is None


@pytest.mark.parametrize("rule", RULES)
def test_rows_are_scored_one_by_one_and_in_order(rule):
    assert rule(completions=["1", "2", "3", "4"], answer=["1", None, "2", "4"]) == [1.0, None, 0.0, 1.0]
    assert rule(completions=[], answer=[]) == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "completions, answer, error, match",
    [
        (["a", "b"], ["a"], ValueError, "`answer` has 1 entries but `completions` has 2"),
        (["a"], "a", TypeError, "`answer` is a str"),
        (["a"], [1987], TypeError, "An entry of `answer` is a int: 1987"),
        (["a"], [["a", 1987]], TypeError, "An entry of `answer` is a list"),
        ([None], ["a"], TypeError, "A completion is a NoneType"),
        ([["a"]], ["a"], TypeError, "A completion is a list"),
    ],
)
def test_wrong_arguments_raise_with_their_value(rule, completions, answer, error, match):
    with pytest.raises(error, match=match):
        rule(completions=completions, answer=answer)


@pytest.mark.parametrize("rule", RULES)
def test_trl_sees_a_synchronous_reward_with_its_own_name(rule):
    assert not is_async_callable(rule)
    assert get_callable_name(rule).endswith("_reward")
    assert not asyncio.iscoroutine(rule(completions=["a"], answer=["a"]))


@pytest.mark.parametrize(
    "text",
    [
        "1" + ",000" * 30_000 + ",00",
        "1" + ",00" * 40_000 + ",0",
        r"\boxed{" * 20_000,
        r"\boxed{" * 20_000 + "}" * 20_000,
        r"\(" * 60_000,
        "answer " * 20_000,
        "a." * 60_000,
        "the " * 40_000,
        "-" * 100_000,
        " " * 100_000 + "1",
        "1" + " " * 100_000 + "x",
        "<think>" * 20_000,
        "$" * 100_000,
        "1" * 100_000,
        "1." * 60_000,
        "^" * 100_000,
        r"\text{" * 20_000,
        "\n" * 100_000 + "x",
        "\n \n" * 33_000,
        "The answer is " * 8_000,
        "答案是" * 33_000,
        "<answer>" * 15_000,
        "#### a\n" * 15_000,
        "so " * 33_000,
        "1\u2009000" * 20_000,
        "ال" * 50_000,
        "$ a" * 33_000,
        r"\boxed" * 16_000,
    ],
    ids=lambda text: repr(text[:8]),
)
def test_a_degenerate_completion_is_scored_in_linear_time(text):
    start = time.monotonic()
    for rule in RULES:
        assert score(rule, text, "3") == 0.0
    assert time.monotonic() - start < 4.0  # for four rewards


# Properties

PIECES = [
    *"the a 1,000 -3 .5 3.5kg 東京 ป่า 𝟙 ½ U.S. } { <think> </think> answer: $ % # - . , Paris ﬁ İ ǅ ^2 1/0 e9".split(),
    *["million", r"\boxed{", r"\frac{1}{2}", r"\(", r"\)", "\\", " ", "\n", "\u200d", "\u0301", "\ud800"],
]
ANY_TEXT = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)
WORDS = st.lists(st.sampled_from("cat dog paris 1987 -3 1.5 東京 fox".split()), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_any_text_scores_none_or_between_zero_and_one(prediction, reference):
    for rule in RULES:
        value = score(rule, prediction, reference)
        assert value is None or (isinstance(value, float) and 0.0 <= value <= 1.0)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_normalization_is_idempotent(text):
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT)
def test_an_answer_in_a_box_matches_itself(text):
    boxed = r"\boxed{" + text + "}"
    answer = extract_answer(boxed)
    if not normalize_answer(answer) or extract_answer(answer) != answer:
        return
    for rule in (exact_match_reward, contains_answer_reward, token_f1_reward):
        assert score(rule, boxed, answer) == 1.0


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_exact_match_and_f1_are_symmetric(a, b):
    if extract_answer(a) != a or extract_answer(b) != b or not normalize_answer(a) or not normalize_answer(b):
        return
    for rule in (exact_match_reward, token_f1_reward):
        assert score(rule, a, b) == score(rule, b, a)


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_exact_match_implies_containment_and_full_f1(prediction, reference):
    if score(exact_match_reward, prediction, reference) == 1.0:
        assert score(contains_answer_reward, prediction, reference) == 1.0
        assert score(token_f1_reward, prediction, reference) == 1.0


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS, st.randoms(use_true_random=False))
def test_f1_ignores_the_order_of_words(prediction, reference, random):
    shuffled = random.sample(prediction, len(prediction))
    before = score(token_f1_reward, " ".join(prediction), " ".join(reference))
    assert score(token_f1_reward, " ".join(shuffled), " ".join(reference)) == before


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_added_words_end_an_exact_match(reference, added):
    reference = " ".join(reference)
    longer = f"{reference} {' '.join(added)}"
    assert score(exact_match_reward, longer, reference) == 0.0
    assert score(token_f1_reward, longer, reference) < 1.0


@settings(max_examples=100, deadline=None)
@given(WORDS, WORDS)
def test_added_words_never_make_a_wrong_answer_exact(prediction, reference):
    prediction, reference = " ".join(prediction), " ".join(reference)
    if score(exact_match_reward, prediction, reference) == 0.0:
        assert score(exact_match_reward, f"{prediction} {reference}", reference) == 0.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from("london rome berlin madrid oslo vienna".split()), min_size=1), st.sampled_from(" ,;/\n|")
)
def test_no_list_of_other_candidates_contains_the_answer(others, separator):
    for position in (0, len(others)):
        candidates = [*others[:position], "paris", *others[position:]]
        assert score(contains_answer_reward, separator.join(candidates), "Paris") == 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_are_equal_only_to_themselves(a, b):
    assert score(numeric_reward, f"It is {a:,}.", str(a)) == 1.0
    assert score(numeric_reward, str(a), str(b)) == float(a == b)
    assert score(numeric_reward, f"{a} or {b}", str(a)) == 0.0
    assert score(numeric_reward, f"{a}. So: {b}", str(a)) == float(a == b)
