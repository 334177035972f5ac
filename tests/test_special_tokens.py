"""Special tokens in texts: broken up and counted at every entrance, or kept at all of them."""

import json
import logging

import pytest
from conftest import build_model, build_tokenizer, length_reward
from datasets import Dataset
from test_preflight import Engine
from test_tools import INJECTION, Harbor, look_up, make  # noqa: F401  (a fixture)
from test_vocabularies import added
from trl import SFTConfig

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.chat import (
    escape_messages,
    escape_special_tokens,
    kept_token_problems,
    num_prompt_tokens,
    special_token_warnings,
)
from dgrpo_trl.checks import supervised_findings
from dgrpo_trl.config import DGRPOScriptArguments, LongBlocksArguments, SFTScriptArguments
from dgrpo_trl.models import Models
from dgrpo_trl.preflight import GPUS, preflight
from dgrpo_trl.text import broken
from dgrpo_trl.training_data import load_training_data


CTL, END = "<ctl_fr>", "<|im_end|>"
CPU = {"use_cpu": True, "bf16": False}


def user(text):
    return [{"role": "user", "content": text}]


# --- The rule


def test_kept_tokens_stay_and_others_are_broken_up():
    tokenizer = added(CTL, "<ctl_de>")
    text = f"{CTL} and <ctl_de> and {END}"
    assert escape_special_tokens(text, tokenizer) == f"{broken(CTL)} and {broken('<ctl_de>')} and {broken(END)}"
    assert escape_special_tokens(text, tokenizer, [CTL]) == f"{CTL} and {broken('<ctl_de>')} and {broken(END)}"
    assert escape_special_tokens(text, tokenizer, ["all"]) == text
    one, other = (num_prompt_tokens(user(CTL), tokenizer, keep_special_tokens=keep) for keep in ([CTL], []))
    assert one < other


def test_every_text_of_a_message_is_one_that_others_wrote(tokenizer):
    message = {"role": f"user{END}", "name": END, "content": [{"type": "text", "text": END}], "extra": {END: [END]}}
    (escaped,) = escape_messages([message], tokenizer)
    assert END not in json.dumps(escaped) and json.dumps(escaped, ensure_ascii=False).count(broken(END)) == 5
    answer = [{"role": "assistant", "content": END}]
    assert escape_messages(answer, tokenizer) == answer


def test_prompts_with_special_tokens_are_counted_by_token():
    tokenizer = added(CTL)
    prompts = [user(f"{CTL} {CTL}"), user(CTL + END), user("a < b"), f"{CTL} a text", user(broken(CTL))]
    prompts.append([*user("x"), {"role": "assistant", "content": CTL}])
    (warning,) = special_token_warnings(prompts, "rows", tokenizer)
    assert f"in 3 of 6 prompts special tokens stand in the text, by token: '{CTL}' (3), '{END}' (1)" in warning
    assert f"`keep_special_tokens: ['{CTL}']`" in warning
    (warning,) = special_token_warnings(prompts, "rows", tokenizer, [CTL])
    assert f"in 1 of 6 prompts special tokens stand in the text, by token: '{END}' (1)" in warning
    assert not special_token_warnings(prompts, "rows", tokenizer, ["all"])


def test_a_token_to_keep_is_one_that_there_is():
    tokenizer = added(CTL)
    assert not kept_token_problems([CTL], tokenizer) and not kept_token_problems(["all"], tokenizer)
    (problem,) = kept_token_problems([CTL, "<ctl_es>"], tokenizer)
    assert "names '<ctl_es>', which the student's tokenizer does not have as special tokens" in problem


@pytest.mark.parametrize("make_args", [lambda **o: DGRPOConfig("out", **CPU, **o), SFTScriptArguments])
def test_one_token_or_all_may_be_named_without_a_list(make_args):
    def args(**options):
        if make_args is SFTScriptArguments:
            options["dataset_name"] = "rows"
        return make_args(**options)

    assert args().keep_special_tokens == []
    assert args(keep_special_tokens="all").keep_special_tokens == ["all"]
    assert args(keep_special_tokens=[CTL]).keep_special_tokens == [CTL]


# --- The entrances


@pytest.mark.parametrize("keep", [[], [CTL], ["all"]], ids=str)
def test_prompts_of_both_models_keep_what_is_to_be_kept(make_model, tmp_path, keep, caplog):
    tokenizer = added(CTL)
    rows = [{"prompt": user(f"{CTL} Ship {i}?"), "teacher_prompt": user(f"{CTL} It is {i}.")} for i in range(4)]
    config = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 1}
    trainer = DGRPOTrainer(
        build_model(vocab_size=302),
        length_reward,
        DGRPOConfig(str(tmp_path), **CPU, **config, report_to="none", keep_special_tokens=keep),
        Dataset.from_list(rows),
        processing_class=tokenizer,
        teacher_model=build_model(seed=1, vocab_size=302),
    )
    assert ("`train_dataset`: in 4 of 4 prompts" in caplog.text) is (not keep)
    assert ("`train_dataset`, `teacher_prompt`: in 4 of 4 prompts" in caplog.text) is (not keep)
    read = {"student": [], "teacher": []}
    score = trainer.teacher.hidden_states
    generate = trainer._generate_single_turn
    trainer.teacher.hidden_states = lambda prompts, *a, **k: read["teacher"].extend(prompts) or score(prompts, *a, **k)
    trainer._generate_single_turn = lambda ids, *a, **k: read["student"].extend(ids) or generate(ids, *a, **k)
    trainer.train()
    for prompts in read.values():
        assert prompts and all((300 in prompt) is bool(keep) for prompt in prompts)


@pytest.mark.parametrize("keep", [[], [END]], ids=str)
def test_tools_environments_and_rollout_functions_follow_the_same_rule(make, keep, caplog):  # noqa: F811
    trainer = make(tools=[look_up], keep_special_tokens=keep)
    trainer.train()
    first, second = trainer.turns
    assert (f"42{END}" in second[0][len(first[0]) :]) is bool(keep)
    assert f"'{END}' (1)" in caplog.text if not keep else f"'{END}' (1)" not in caplog.text
    trainer = make(environment_factory=Harbor, call="sail", keep_special_tokens=keep)
    trainer.train()
    assert (f"Port: 42{END}" in trainer.turns[0][0]) is bool(keep)
    seen = []

    def rollout(prompts, trainer):
        seen.extend(prompt[0]["content"] for prompt in prompts)
        return {"prompt_ids": [[5, 6]] * 4, "completion_ids": [[8, 2]] * 4, "logprobs": None}

    make(rollout_func=rollout, rows=[{"prompt": user(INJECTION)}] * 4, keep_special_tokens=keep).train()
    assert seen and all((END in text) is bool(keep) for text in seen)


def test_what_tools_return_is_counted_once(make, caplog):  # noqa: F811
    make(tools=[look_up]).train()
    assert caplog.text.count("The result of a tool: in 1 of 1 prompts special tokens") == 1


def test_control_tokens_among_the_ids_of_a_rollout_function_are_counted(make, caplog):  # noqa: F811
    def rollout_of(env_mask):
        def rollout(prompts, trainer):
            output = {"prompt_ids": [[5, 6]] * 4, "completion_ids": [[8, 2, 9, 2]] * 4, "logprobs": None}
            return output | ({} if env_mask is None else {"env_mask": [env_mask] * 4})

        return rollout

    for env_mask in (None, [1, 1, 1, 1], [1, 1, 0, 1]):
        make(rollout_func=rollout_of(env_mask)).train()
    assert "`rollout_func` returned" not in caplog.text
    make(rollout_func=rollout_of([1, 0, 0, 1])).train()
    assert caplog.text.count("`rollout_func` returned 8 token ids of others") == 1
    assert "{'<|im_end|>': 4}" in caplog.text and "`dgrpo_trl.chat.escape_special_tokens`" in caplog.text


def test_a_stream_is_counted_as_it_comes(make_trainer, caplog):
    rows = Dataset.from_list([{"prompt": user(f"Ship {END}?")}] * 4).to_iterable_dataset()
    make_trainer(DGRPOTrainer, distill_coef=0.0, train_dataset=rows, max_steps=1).train()
    assert caplog.text.count("Prompts of this batch: in 4 of 4 prompts special tokens") == 1


@pytest.mark.parametrize("kind", ["prompts", "LongBlocks"])
@pytest.mark.parametrize("keep", [[], [CTL]], ids=str)
def test_data_of_the_commands_follow_the_same_rule(tmp_path, kind, keep):
    tokenizer = added(CTL)
    rows = [{"id": str(i), "document": f"{CTL} A ship.", "question": "Which?", "answer": "1"} for i in range(4)]
    if kind == "prompts":
        rows = [{"prompt": user(row["document"]), "answer": "1"} for row in rows]
    Dataset.from_list(rows).to_json(tmp_path / "rows.jsonl")
    options = {"keep_special_tokens": keep, "completion_column": "answer"}
    args = LongBlocksArguments(dataset_name=str(tmp_path / "rows.jsonl"))
    train, _ = load_training_data(args, tokenizer, **options)
    assert train[0]["prompt"][0]["content"].startswith(CTL if keep else broken(CTL))
    config = build_model().config
    sft = SFTConfig("out", **CPU)
    findings = supervised_findings(
        sft, Models(config, tokenizer, config), {"train_dataset": train}, keep_special_tokens=keep
    )
    assert len(findings.warnings) == (0 if keep else 1)
    assert (
        DGRPOScriptArguments(dataset_name="x").data_options(DGRPOConfig("out", **CPU, keep_special_tokens=keep))[
            "keep_special_tokens"
        ]
        == SFTScriptArguments(dataset_name="x", keep_special_tokens=keep).data_options(sft)["keep_special_tokens"]
    )


def test_the_dry_run_counts_tokens_and_prompts_by_the_same_rule(tmp_path, saved_teacher):
    tokenizer = added(CTL)
    rows = Dataset.from_list([{"prompt": user(CTL * 4)}] * 4)
    reports = []
    for keep in ([], [CTL], ["<ctl_es>"]):
        args = DGRPOConfig(
            str(tmp_path),
            **CPU,
            distill_coef=0.0,
            max_completion_length=8,
            keep_special_tokens=keep,
            num_generations=4,
        )
        reports.append(preflight(args, saved_teacher, rows, tokenizer, Engine(), GPUS["h100-80gb"]))
    broken_up, kept, unknown = reports
    assert "in 4 of 4 prompts special tokens" in broken_up.warnings[0] and not kept.warnings
    assert "names '<ctl_es>'" in unknown.problems[0]
    lengths = [dict(report.sections["Lengths in tokens"]) for report in (broken_up, kept)]
    assert lengths[0] != lengths[1]


def test_a_plain_text_is_taken_as_it_is(make_trainer, caplog):
    rows = Dataset.from_list([{"prompt": f"Ship {END}?"}] * 4)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            DGRPOTrainer,
            distill_coef=0.0,
            train_dataset=rows,
            reward_funcs=lambda completions, **kwargs: [float(len(text)) for text in completions],
        )
    assert build_tokenizer().convert_tokens_to_ids(END) in trainer._tokenize_prompts([f"Ship {END}?"])[0][0]
    assert "special tokens" not in caplog.text
