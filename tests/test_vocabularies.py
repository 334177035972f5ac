"""Student and teacher with tokens that the other lacks: what is refused, and what is compared where they are not."""

import copy

import pytest
import reference
import torch
from conftest import build_model, build_tokenizer, length_reward
from datasets import Dataset
from test_losses import DIVERGENCES, make_case, weighted_sum
from test_preflight import Engine
from transformers import AddedToken

from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.losses import Distillation, TokenTerms, token_terms
from dgrpo_trl.preflight import GPUS, preflight
from dgrpo_trl.vocabularies import unreadable_problems, unshared_ids, vocabulary_problems, vocabulary_warnings


VOCAB = {"a": 0, "b": 1, "c": 2}


def test_vocabularies_by_hand():
    assert not vocabulary_problems(VOCAB, VOCAB, 3, 4) and not vocabulary_problems(VOCAB, None, 3, 3)
    (problem,) = vocabulary_problems(VOCAB, {"a": 0, "b": 2, "c": 1}, 3, 3)
    assert "the first of 2 differing tokens, 'b', has id 1 for the student and 2 for the teacher" in problem
    (problem,) = vocabulary_problems(VOCAB, {"a": 0, "b": 1}, 3, 3)  # 'c' comes out of ordinary text
    assert "'c', has id 2 for the student and none for the teacher" in problem
    (problem,) = vocabulary_problems(VOCAB, VOCAB, 3, 2)
    assert "ids up to 2, but the LM heads have 3 (student) and 2 (teacher) rows" in problem


@pytest.mark.parametrize(
    ("student", "teacher", "num_problems", "unshared"),
    [
        ({"<x>": 3}, {}, 0, (3,)),
        ({}, {"<x>": 3}, 0, (3,)),
        ({"<x>": 3, "<y>": 4}, {"<x>": 3}, 0, (4,)),
        ({"<x>": 3}, {"<y>": 4}, 0, (3, 4)),
        ({"<x>": 3}, {"<y>": 3}, 1, ()),  # an id that means two strings
        ({"<x>": 3}, {"<x>": 4}, 1, ()),  # a string that has two ids
    ],
    ids=str,
)
def test_tokens_may_be_added_to_either(student, teacher, num_problems, unshared):
    both = VOCAB | student, VOCAB | teacher
    assert len(vocabulary_problems(*both, 5, 5, set(student))) == num_problems
    if num_problems == 0:
        assert unshared_ids(*both) == unshared
        text = " ".join(vocabulary_warnings(*both))
        assert all(f"'{token}'" in text for token, i in (student | teacher).items() if i in unshared)


def test_a_token_needs_a_row_in_the_head_of_the_model_that_has_it():
    student = {**VOCAB, "<x>": 3}
    assert not vocabulary_problems(student, VOCAB, 4, 3, {"<x>"})
    assert len(vocabulary_problems(student, VOCAB, 3, 3, {"<x>"})) == 1
    assert not vocabulary_problems(VOCAB, student, 3, 4)


# --- The divergence


@pytest.mark.parametrize("unshared", [(0,), (49,), (20, 21, 22, 30), tuple(range(16, 32))], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
def test_values_and_gradients_are_those_of_the_shared_ids_renormalized(kind, unshared):
    hidden, head, targets, teacher = make_case(50, 47)
    targets[0] = unshared[0]  # a token that the teacher lacks, whose log-probability is over the whole head
    terms = token_terms(hidden, head, targets, 0.9, Distillation(*teacher, kind, 0.3, unshared))

    def logits(states, head):
        return reference.logits(states, head.weight, head.bias, temperature=0.9)

    shared = [i for i in range(47) if i not in unshared]
    policy, taught = logits(hidden, head), logits(*teacher)[:, shared]
    log_p, t = policy.log_softmax(-1), taught.softmax(-1)
    expected = TokenTerms(
        log_p[torch.arange(len(targets)), targets],
        -(log_p.exp() * log_p).sum(-1),
        reference.divergence(policy[:, shared], taught, kind, 0.3),
        -torch.xlogy(t, t).sum(-1),
        (policy[:, shared].argmax(-1) == taught.argmax(-1)).double(),
    )
    for got, want in zip(terms, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    got = torch.autograd.grad(weighted_sum(terms), (hidden, head.weight))
    want = torch.autograd.grad(weighted_sum(expected), (hidden, head.weight))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11)
    everything = token_terms(hidden, head, targets, 0.9, Distillation(*teacher, kind, 0.3)).divergences
    assert torch.allclose(everything, terms.divergences) == (unshared == (49,))  # which the smaller head lacks anyway


# --- A run


def added(*tokens, special=True):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=special) for token in tokens], special_tokens=special)
    return tokenizer


ROWS = [{"prompt": [{"role": "user", "content": f"Ship {i}?"}]} for i in range(8)]


@pytest.fixture
def make(tmp_path):
    def make(student_tokens, teacher_tokens, sizes=(302, 302), rows=ROWS, tokenizer=None, **options):
        build_model(seed=1, vocab_size=sizes[1]).double().save_pretrained(tmp_path / "teacher")
        added(*teacher_tokens).save_pretrained(tmp_path / "teacher")
        config = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 8, "max_steps": 1}
        return DGRPOTrainer(
            build_model(vocab_size=sizes[0]).double(),
            length_reward,
            DGRPOConfig(
                str(tmp_path / "out"),
                **{**config, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", **options},
                gradient_checkpointing=False,
                teacher_model_init_kwargs={"dtype": "auto"},
            ),
            Dataset.from_list(rows),
            processing_class=tokenizer or added(*student_tokens),
            teacher_model=str(tmp_path / "teacher"),
        )

    return make


@pytest.mark.parametrize("sizes", [(302, 300), (302, 302), (302, 320)], ids=str)
@pytest.mark.parametrize("shared_prefix", ["on", "off"])
def test_the_teacher_never_reads_what_it_lacks(make, sizes, shared_prefix, caplog):
    trainer = make(["<ctl_fr>", "<ctl_de>"], [], sizes, shared_prefix=shared_prefix)
    assert "The teacher lacks 2 tokens ('<ctl_fr>' (id 300), '<ctl_de>' (id 301))" in caplog.text
    embedding, read = trainer.teacher.model.get_input_embeddings(), []
    embedding.register_forward_hook(lambda module, args, output: read.append(args[0]))
    generate = trainer._generate_single_turn

    def with_added_tokens(*args, **kwargs):
        ids, logps = generate(*args, **kwargs)
        return [[row[0], 300, 301, *row[3:]] for row in ids], logps

    trainer._generate_single_turn = with_added_tokens
    trainer.train()
    assert read and all((ids < 300).all() for ids in read)
    losses = [entry["distill/divergence"] for entry in trainer.state.log_history if "distill/divergence" in entry]
    assert len(losses) == 1 and 0 < losses[0] < 50


@pytest.mark.parametrize("student_tokens", [[], ["<ctl_fr>"]], ids=str)
def test_a_teacher_may_have_more_tokens(make, student_tokens, caplog):
    trainer = make(student_tokens, ["<ctl_fr>", "<ctl_de>"])
    assert f"The student lacks {2 - len(student_tokens)} tokens" in caplog.text
    assert trainer.teacher.unshared_ids == ((301,) if student_tokens else (300, 301))
    trainer.train()


def test_a_loss_of_a_run_leaves_the_unshared_ids_out(make):
    trainer = make(["<ctl_fr>"], ["<ctl_fr>", "<ctl_de>"])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    teacher = copy.deepcopy(trainer.teacher.model)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    kept = inputs["completion_mask"].bool()
    start, stop = inputs["prompt_ids"].size(1) - 1, -1
    student, taught = (
        model(input_ids=ids, attention_mask=mask).logits[:, start:stop][kept][:, :301]
        for model in (trainer.model, teacher)
    )
    with torch.no_grad():
        trainer.compute_loss(trainer.model, inputs)
    logged = trainer._metrics["train"]["distill/divergence"][-1]
    assert logged == pytest.approx(reference.divergence(student, taught, "reverse_kl").mean().item(), rel=1e-6)


def test_padding_that_only_the_student_has_is_not_read(make):
    tokenizer = added("<pad>")
    tokenizer.pad_token = "<pad>"
    trainer = make([], [], (302, 300), tokenizer=tokenizer)
    read = []
    trainer.teacher.model.get_input_embeddings().register_forward_hook(lambda module, args, _: read.append(args[0]))
    trainer.train()
    assert read and all((ids < 300).all() for ids in read)


def test_prompts_with_a_token_that_the_teacher_lacks_are_refused(make):
    text = [{"prompt": f"<ctl_fr> Ship {i}?"} for i in range(8)]
    with pytest.raises(
        ValueError, match="8 rows, first in row 0 .* a token that the teacher does not have .'<ctl_fr>'"
    ):
        make(["<ctl_fr>"], [], rows=text)
    own = [{**row, "teacher_prompt": "Ship?"} for row in text]
    make(["<ctl_fr>"], [], rows=own)
    messages = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in text]
    make(["<ctl_fr>"], [], rows=messages)  # text of a message stays text
    tokenizer = added("<start>")
    tokenizer.chat_template = "<start>" + tokenizer.chat_template
    with pytest.raises(ValueError, match="in every row, by the chat template, the prompt has a token"):
        make([], [], tokenizer=tokenizer)


def test_a_stream_of_them_is_refused_as_it_comes(make):
    trainer = make(["<ctl_fr>"], [], rows=[{"prompt": "Ship?"}] * 8)
    ids = torch.ones(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"in row 0 the prompt has a token that the teacher does not have \(300\)"):
        trainer.teacher.hidden_states([[5, 300]], ids, ids, 0, 1)


def test_tokens_that_are_not_special_are_no_less_unknown():
    tokenizer = added("<ctl_fr>", special=False)
    prompts = [[{"role": "user", "content": "<ctl_fr> Ship?"}]]
    assert unreadable_problems(prompts, "rows", tokenizer, {"<ctl_fr>": 300})
    assert not unreadable_problems(prompts, "rows", added("<ctl_fr>"), {"<ctl_fr>": 300})


def test_the_dry_run_says_the_same(tmp_path):
    for name, tokens in (("student", ["<ctl_fr>"]), ("teacher", [])):
        build_model(vocab_size=302).config.save_pretrained(tmp_path / name)
        added(*tokens).save_pretrained(tmp_path / name)
    args = DGRPOConfig(
        str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        max_completion_length=8,
        teacher_model_name_or_path=str(tmp_path / "teacher"),
    )
    arguments = (added("<ctl_fr>"), Engine(), GPUS["h100-80gb"])
    report = preflight(args, str(tmp_path / "student"), Dataset.from_list(ROWS), *arguments)
    assert not report.problems and "The teacher lacks 1 tokens" in report.warnings[0]
    rows = Dataset.from_list([{"prompt": "<ctl_fr> Ship?"}] * 8)
    report = preflight(args, str(tmp_path / "student"), rows, *arguments)
    assert "a token that the teacher does not have" in report.problems[0]
