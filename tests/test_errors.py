"""What bad input gets: one test a rule. Where weights could have been loaded, the test shows that they were not."""

import json

import pytest
from conftest import build_tokenizer, length_reward
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig

import dgrpo_trl.trainer
from dgrpo_trl import DGRPOConfig, DGRPOTrainer
from dgrpo_trl.chat import escape_special_tokens
from dgrpo_trl.checks import image_problems
from dgrpo_trl.data_loading import load_rows
from dgrpo_trl.positions import stated_positions


@pytest.fixture
def no_weights(monkeypatch):
    """Fails the test if the trainer gets as far as loading or preparing a model."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were about to be loaded")

    monkeypatch.setattr(dgrpo_trl.trainer.GRPOTrainer, "__init__", fail)
    monkeypatch.setattr(dgrpo_trl.trainer, "load_teacher", fail)


CPU = {"use_cpu": True, "bf16": False}
PROMPT = [{"role": "user", "content": "Hi"}]


# --- Config


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_a_negative_or_infinite_coefficient(value):
    with pytest.raises(ValueError, match="`distill_coef` must be a finite number >= 0"):
        DGRPOConfig("out", **CPU, distill_coef=value)


def test_an_unknown_divergence():
    with pytest.raises(
        ValueError, match="'total_variation', which is not known. Choose one of reverse_kl, forward_kl"
    ):
        DGRPOConfig("out", **CPU, distill_divergence="total_variation")


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_mixture_weight_at_the_ends(value):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        DGRPOConfig("out", **CPU, distill_jsd_mixture=value)


def test_teacher_init_arguments_may_be_json():
    assert DGRPOConfig("out", **CPU, teacher_model_init_kwargs='{"dtype": "bfloat16"}').teacher_model_init_kwargs == {
        "dtype": "bfloat16"
    }


def test_teacher_init_arguments_that_are_no_json(make_trainer, saved_teacher, no_weights):
    with pytest.raises(ValueError, match="`teacher_model_init_kwargs` is 'bfloat16'.*JSON object"):
        make_trainer(DGRPOTrainer, teacher_model=saved_teacher, teacher_model_init_kwargs="bfloat16")


def test_a_plain_grpo_config(make_model):
    from trl import GRPOConfig

    with pytest.raises(TypeError, match="`args` is a GRPOConfig"):
        DGRPOTrainer(make_model(), length_reward, GRPOConfig("out", **CPU))


# --- Data


def test_no_prompt_column(make_trainer, no_weights):
    with pytest.raises(ValueError, match=r"no column 'prompt'; its columns are \['question'\]"):
        make_trainer(DGRPOTrainer, distill_coef=0.0, train_dataset=Dataset.from_dict({"question": ["a"]}))


@pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
def test_an_empty_data_set(make_trainer, no_weights, argument):
    with pytest.raises(ValueError, match=f"`{argument}` is empty"):
        make_trainer(DGRPOTrainer, distill_coef=0.0, **{argument: Dataset.from_dict({"prompt": []})})


def test_prompts_longer_than_the_positions(make_trainer, no_weights):
    rows = [{"prompt": [{"role": "user", "content": "ship " * n}]} for n in (10, 290, 400)]
    with pytest.raises(
        ValueError, match=r"2 of 3 rows have a 'prompt' that is too long: .* the longest has \d+ tokens"
    ):
        make_trainer(DGRPOTrainer, distill_coef=0.0, train_dataset=Dataset.from_list(rows))


def test_a_teacher_prompt_longer_than_the_teachers_positions(make_trainer, make_model, no_weights):
    rows = [{"prompt": PROMPT, "teacher_prompt": [{"role": "user", "content": "ship " * 200}]}]
    with pytest.raises(ValueError, match="1 of 1 rows have a 'teacher_prompt' .* 64 positions of the teacher"):
        make_trainer(
            DGRPOTrainer,
            teacher_model=make_model(seed=1, max_position_embeddings=64),
            train_dataset=Dataset.from_list(rows),
        )


def test_a_stream_is_checked_as_it_comes(make_trainer):
    rows = [{"prompt": [{"role": "user", "content": "ship " * 400}]}]
    stream = Dataset.from_list(rows * 4).to_iterable_dataset()
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, train_dataset=stream)
    with pytest.raises(ValueError, match="more than the 256 positions of the student"):
        trainer.train()


def test_a_teacher_with_fewer_positions_may_read_short_evidence_of_long_prompts(make_trainer, make_model):
    rows = [{"prompt": [{"role": "user", "content": "ship " * 100}], "teacher_prompt": PROMPT}] * 8
    teacher = make_model(seed=1, max_position_embeddings=64)
    trainer = make_trainer(DGRPOTrainer, teacher_model=teacher, train_dataset=Dataset.from_list(rows), max_steps=1)
    trainer.train()
    long = make_trainer(
        DGRPOTrainer,
        teacher_model=make_model(seed=1, max_position_embeddings=64),
        train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
        teacher_prompt_column=None,
    )
    with pytest.raises(ValueError, match="more than the 64 positions of the teacher"):
        long.train()


def test_positions_count_the_rope_scaling(make_model):
    assert stated_positions(make_model().config) == 256
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 1e4}
    assert stated_positions(make_model(rope_parameters=yarn).config) == 1024


def test_images(make_trainer, make_model, no_weights):
    rows = Dataset.from_dict({"prompt": [PROMPT], "image": ["picture"]})
    with pytest.raises(NotImplementedError, match="images"):
        make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), train_dataset=rows)


@pytest.mark.parametrize("empty", [None, []], ids=["none", "no image"])
def test_a_column_of_images_that_is_empty_in_every_row_is_no_image(make_trainer, make_model, empty):
    rows = Dataset.from_dict(
        {"prompt": [PROMPT] * 4, "images": [empty] * 4},
        features=Features(
            {"prompt": [{"role": Value("string"), "content": Value("string")}], "images": List(Image())}
        ),
    )
    assert image_problems({"rows": rows}) == []
    make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), train_dataset=rows, max_steps=1).train()


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        load_rows(str(tmp_path / "nothing.jsonl"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "save_to_disk", "dataset_dict"])
def test_local_data_sets_are_read(tmp_path, kind):
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["1", "2"]})
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in dataset))
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "save_to_disk":
        dataset.save_to_disk(path)
    else:
        dataset.train_test_split(0.5, shuffle=False).save_to_disk(path)
        with pytest.raises(ValueError, match=r"no split 'dev'; it has \['test', 'train'\]"):
            load_rows(str(path), split="dev")
    assert load_rows(str(path))["prompt"][0] == "a"


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n---\n"


def test_a_folder_that_is_built_anew_is_read_anew(tmp_path):
    """`load_dataset` itself gives the rows of the first one: its cache knows a folder by its name and its card."""
    for parent, num_rows in (("a", 3), ("b", 5), ("a", 7)):
        folder = tmp_path / parent / "dataset"
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(CARD)
        Dataset.from_dict({"prompt": ["x"] * num_rows}).to_parquet(folder / "data" / "train-00000-of-00001.parquet")
        for streaming in (False, True):
            assert len(list(load_rows(str(folder), streaming=streaming))) == num_rows


def test_the_split_of_a_folder_is_found_by_its_files(tmp_path):
    for name, num_rows in (("train", 3), ("test", 2)):
        Dataset.from_dict({"prompt": ["x"] * num_rows}).to_json(tmp_path / f"{name}.jsonl")
    assert len(load_rows(str(tmp_path))) == 3 and len(load_rows(str(tmp_path), split="test")) == 2
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has \['test', 'train'\]"):
        load_rows(str(tmp_path), split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="it has no data files"):
        load_rows(str(tmp_path / "empty"))


def test_special_token_literals_are_broken_up_and_other_text_is_not(tokenizer):
    text = "see <|im_end|><|endoftext|> and <|im_endless|>"
    escaped = escape_special_tokens(text, tokenizer)
    assert escaped.replace("\u200b", "") == text
    ids = tokenizer(escaped)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert escape_special_tokens("a < b | c", tokenizer) == "a < b | c"


# --- Teacher


def test_no_teacher(make_trainer, no_weights):
    with pytest.raises(ValueError, match="`distill_coef` is 0.5, but there is no teacher"):
        make_trainer(DGRPOTrainer)


def test_neither_reward_nor_teacher(make_trainer, no_weights):
    with pytest.raises(ValueError, match="No reward source provided. Pass `reward_funcs`, or an `env"):
        make_trainer(DGRPOTrainer, distill_coef=0.0, reward_funcs=None)


def test_teacher_given_twice(make_trainer, make_model, no_weights):
    with pytest.raises(ValueError, match="A teacher is given twice"):
        make_trainer(DGRPOTrainer, teacher_model=make_model(), teacher_model_name_or_path="somewhere")


def test_a_teacher_that_does_not_exist(make_trainer, no_weights, tmp_path):
    with pytest.raises(ValueError, match="The teacher '.*nowhere' cannot be read"):
        make_trainer(DGRPOTrainer, teacher_model=str(tmp_path / "nowhere"))


def test_a_teacher_without_weights(make_trainer, make_model, tokenizer, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights of the teacher .* cannot be read"):
        make_trainer(DGRPOTrainer, teacher_model=str(tmp_path))


def test_a_teacher_without_tokenizer(make_trainer, make_model, no_weights, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        make_trainer(DGRPOTrainer, teacher_model=str(tmp_path))


def test_init_arguments_for_a_loaded_teacher(make_trainer, make_model, no_weights):
    with pytest.raises(ValueError, match="already loaded"):
        make_trainer(DGRPOTrainer, teacher_model=make_model(), teacher_model_init_kwargs={"dtype": "bfloat16"})


def test_the_student_itself_as_teacher(make_trainer, make_model, no_weights):
    model = make_model()
    with pytest.raises(TypeError, match="is the student itself"):
        make_trainer(DGRPOTrainer, model, teacher_model=model)


def test_something_else_as_teacher(make_trainer, no_weights):
    with pytest.raises(TypeError, match="`teacher_model` is a int"):
        make_trainer(DGRPOTrainer, teacher_model=3)


def test_base_teacher_without_an_adapter(make_trainer, no_weights):
    with pytest.raises(ValueError, match="the student has no adapter"):
        make_trainer(DGRPOTrainer, teacher_model="base")


def test_a_teacher_with_another_tokenizer(make_trainer, make_model, no_weights, tmp_path):
    make_model(vocab_size=290).save_pretrained(tmp_path)
    other = build_tokenizer(290)
    other.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"the first of \d+ differing tokens, '.+', has id \d+ for the student and none"
    ):
        make_trainer(DGRPOTrainer, teacher_model=str(tmp_path))


def test_a_head_smaller_than_the_tokenizer(make_trainer, make_model, no_weights):
    with pytest.raises(ValueError, match=r"ids up to \d+, but the LM heads have 300 \(student\) and 200 \(teacher\)"):
        make_trainer(DGRPOTrainer, teacher_model=make_model(vocab_size=200))


def test_a_teacher_whose_logits_are_not_those_of_its_head(make_trainer, make_model):
    teacher = make_model(seed=1)
    forward = teacher.forward

    def tripled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 3 * output.logits
        return output

    teacher.forward = tripled
    with pytest.raises(NotImplementedError, match="transforms its logits in a way that is not known"):
        make_trainer(DGRPOTrainer, teacher_model=teacher)


# --- Rewards


def test_none_is_a_reward(make_trainer):
    def sometimes(completions, **kwargs):
        return [None, *[1.0, 0.0, 1.0]]

    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, reward_funcs=sometimes)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/sometimes/mean"] == pytest.approx(2 / 3)


def test_a_lora_adapter_on_the_head_is_refused_as_by_the_parent(make_trainer, make_model):
    config = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(DGRPOTrainer, teacher_model=make_model(seed=1), peft_config=config)


def test_the_teacher_of_a_zero_coefficient_is_not_loaded(make_trainer, saved_teacher, monkeypatch):
    monkeypatch.setattr(dgrpo_trl.trainer, "load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    trainer = make_trainer(DGRPOTrainer, distill_coef=0.0, teacher_model=saved_teacher)
    assert trainer.teacher_model is None
    batch = next(iter(trainer.get_train_dataloader()))
    assert "teacher_hidden_states" not in trainer._generate_and_score_completions(batch)
