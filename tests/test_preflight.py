"""The dry run: arithmetic by hand, parameters as counted on real models, and the problems that it finds."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from conftest import ROOT, build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, Qwen3Config
from trl import SFTConfig

from dgrpo_trl import DGRPOConfig
from dgrpo_trl.cli import train_dgrpo, train_sft
from dgrpo_trl.config import PreflightArguments
from dgrpo_trl.preflight import (
    GPUS,
    Engine,
    Gpu,
    Shape,
    micro_batch_bytes,
    preflight,
    read_engine,
    without_gpu,
)


YARN = {
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1000000,
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Folders with a configuration and a tokenizer, and no weights."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    base = {**sizes, "head_dim": 8, "max_position_embeddings": 40960, "rope_theta": 1000000}
    for name, changes in {
        "student": {"vocab_size": 300, "hidden_size": 32},
        "teacher": {"vocab_size": 320, "hidden_size": 48},
        "short": {"vocab_size": 300, "hidden_size": 32, "max_position_embeddings": 64},
        "small_head": {"vocab_size": 100, "hidden_size": 32},
    }.items():
        Qwen3Config(**{**base, **changes}).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def rows(num_rows=32, words=4):
    prompts = [[{"role": "user", "content": "ship " * (words if i == 0 else 4)}] for i in range(num_rows)]
    return Dataset.from_dict({"prompt": prompts, "answer": ["1"] * num_rows})


def dry_run(models, tokenizer, tmp_path, dataset=None, engine=None, gpu=None, peft_config=None, **options):
    defaults = {
        "teacher_model_name_or_path": str(models / "teacher"),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": 16,
        "use_cpu": True,
        "bf16": True,
    }
    args = DGRPOConfig(str(tmp_path / "out"), **{**defaults, **options})
    return preflight(
        args,
        str(models / "student"),
        rows() if dataset is None else dataset,
        tokenizer,
        engine or Engine("zero3", 8),
        gpu or GPUS["h100-80gb"],
        peft_config=peft_config,
    )


def section(report, name):
    return dict(next(items for title, items in report.sections.items() if title.startswith(name)))


# --- Arithmetic


def test_batches_are_those_of_the_engine(models, tokenizer, tmp_path):
    report = dry_run(models, tokenizer, tmp_path, num_train_epochs=3)
    batches = section(report, "Batches")
    assert batches["an optimizer step"] == "8 processes x 8 x 2 = 128 completions = 32 prompts x 4"
    assert batches["a generation batch"] == "128 completions in 2 micro-batches"
    assert batches["steps"] == "3, 3.00 epochs of 32 prompts"
    assert batches["shared prefix"] == "on" and not report.problems and not report.warnings


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_counted_without_weights(tied):
    model = build_model(tie_word_embeddings=tied)
    shape = Shape.of(model.config)
    assert shape.num_parameters == shape.num_trainable == sum(p.numel() for p in model.parameters())
    assert shape.active() == sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)


def test_the_parameters_of_an_adapter_are_counted():
    model = build_model()
    config = LoraConfig(r=4, target_modules=["q_proj"])
    shape = Shape.of(model.config, config)
    assert shape.num_trainable == 2 * 4 * (32 + 32)  # two layers, A and B, 4 heads of 8
    assert shape.num_parameters == sum(p.numel() for p in model.parameters()) + shape.num_trainable


SHAPE = Shape(10**9, 10**9, 2, 8, 8, 4, 16, 100)


def test_operations_by_hand():
    assert SHAPE.active() == 2 * (8 * (16 + 8) + 3 * 8 * 16)
    dense, attention = 2 * SHAPE.active(), 4 * 2 * 8
    assert SHAPE.forward_flops([(3, 0)]) == 3 * dense + attention * (1 + 2 + 3)
    assert SHAPE.forward_flops([(3, 0), (2, 3)]) == SHAPE.forward_flops([(5, 0)])  # a prompt and its one completion
    assert SHAPE.head_flops(5) == 2 * 8 * 100 * 5


def test_activations_by_hand():
    layer = SHAPE.kept_by_layer(2)
    assert layer == 2 * 8 * 10 + 2 * (4 * 8 + 4 * 4) + 2 * 4 * 16
    states, gradient = 2 * 4 * 5 * 8, 4 * 100 * 8  # of those that are scored; of the head
    plain = micro_batch_bytes(SHAPE, SHAPE, 10, 5, 2, 4, False, "cuda")
    head = states + gradient + 4 * 100 * (4 * 5 + 8)  # four tiles of the whole small vocabulary, and the sum of one
    assert plain == 10 * (2 * layer + 2 * (2 * 16 + 2 * 8 + 8)) + head
    checkpointed = micro_batch_bytes(SHAPE, None, 10, 5, 2, 4, True, "cuda")
    head = states + gradient + 4 * 100 * (2 * 5 + 8)
    assert checkpointed == 10 * (4 * 2 * 8 + layer + 2 * (2 * 16 + 2 * 8 + 8)) + head
    frozen = replace(SHAPE, trains_head=False)
    assert checkpointed - micro_batch_bytes(frozen, None, 10, 5, 2, 4, True, "cuda") == gradient
    offloaded = micro_batch_bytes(SHAPE, None, 10, 5, 2, 4, True, "cuda", offloads=True)
    assert checkpointed - offloaded == 10 * 4 * (2 - 1) * 8  # one layer's input of two


def test_the_loss_counts_with_tiles_of_the_vocabulary():
    """Not with all 151,936 ids: 4 tiles of 4,096 tokens by 8,192 ids, and the gradient of 8,192 rows of 2,048."""
    shape = replace(SHAPE, vocab=151_936, hidden=2048, trains_head=False)
    small = replace(shape, vocab=8192)
    many, few = (micro_batch_bytes(s, SHAPE, 0, 16_384, 2, 4, True, "cuda") for s in (shape, small))
    assert many == few == 2 * 4 * 16_384 * 2048 + 4 * 8192 * (4 * 4096 + 2048)


def test_a_head_is_trained_unless_an_adapter_freezes_it():
    config = build_model().config
    assert Shape.of(config).trains_head
    assert not Shape.of(config, LoraConfig(r=4, target_modules=["q_proj"])).trains_head
    assert Shape.of(config, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])).trains_head


GIB = 2**30


@pytest.mark.parametrize(
    ("engine", "options", "expected"),
    [  # bytes per parameter of the student: weights, gradients, optimizer
        (Engine("zero3", 4), {}, (2 / 4, 2 / 4, 12 / 4)),
        (Engine("zero2", 4), {}, (2, 2 / 4, 12 / 4)),
        (Engine("ddp", 4), {}, (4, 4, 8)),
        (Engine("fsdp2", 4), {}, (1, 1, 2)),
        (Engine("single", 1), {"model_init_kwargs": {"dtype": "bfloat16"}}, (2, 2, 4)),
        (Engine("zero3", 4, offload_optimizer=True), {}, (2 / 4, 2 / 4, 0)),
        (Engine("ddp", 4), {"optim": "adamw_8bit"}, (4, 4, 2)),
        (Engine("ddp", 4), {"optim": "sgd"}, (4, 4, 0)),
    ],
    ids=str,
)
def test_bytes_per_parameter(models, tokenizer, tmp_path, engine, options, expected):
    report = dry_run(models, tokenizer, tmp_path, engine=engine, **options)
    number = Shape.of(AutoConfig.from_pretrained(models / "student")).num_parameters
    found = report.memory_gib["the student trains"]
    for name, per_parameter in zip(("weights", "gradients", "optimizer"), expected, strict=True):
        assert found.get(name, 0) * GIB == pytest.approx(per_parameter * number)


def test_the_teacher_is_sharded_and_may_be_offloaded(models, tokenizer, tmp_path):
    number = Shape.of(AutoConfig.from_pretrained(models / "teacher")).num_parameters

    def teacher(phase, **options):
        return dry_run(models, tokenizer, tmp_path, **options).memory_gib[phase]["teacher"] * GIB

    assert teacher("the student trains") == pytest.approx(2 * number / 8)
    assert teacher("the student trains", engine=Engine("zero2", 8)) == pytest.approx(2 * number)
    for dtype, size in ((None, 2), ("float32", 4)):  # bfloat16 with `bf16`, whatever the student's weights are
        options = {"model_init_kwargs": {"dtype": "float32"}, "teacher_model_init_kwargs": {"dtype": dtype}}
        assert teacher("the student trains", engine=Engine("ddp", 8), **options) == pytest.approx(size * number)
    offloaded = teacher("the student trains", teacher_offload="cpu")
    assert offloaded == pytest.approx(2 * 48 * 320 / 8)  # the LM head stays
    assert teacher("the teacher scores", teacher_offload="cpu") == pytest.approx(2 * number / 8)


def test_an_adapter_has_small_gradients_and_its_base_teaches_for_nothing(models, tokenizer, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    report = dry_run(models, tokenizer, tmp_path, peft_config=config, teacher_model_name_or_path="base")
    memory = report.memory_gib["the student trains"]
    assert memory["gradients"] * GIB == pytest.approx(2 * 512 / 8) and "teacher" not in memory


def test_checkpoints_on_the_host_leave_the_gpu(models, tokenizer, tmp_path):
    options = {"gradient_checkpointing": True, "per_device_train_batch_size": 8, "max_completion_length": 16}
    offloading = {"gradient_checkpointing_kwargs": {"offload": True}}
    kept = dry_run(models, tokenizer, tmp_path, **options)
    moved = dry_run(models, tokenizer, tmp_path, **options, **offloading)
    split = dry_run(models, tokenizer, tmp_path, **options, **offloading, max_tokens_per_micro_batch=1)
    shape = Shape.of(AutoConfig.from_pretrained(models / "student"))
    on_host = moved.host_gib["checkpoints"] * GIB
    saved = (phase["activations"] for phase in (r.memory_gib["the student trains"] for r in (kept, moved)))
    assert on_host * (1 - 1 / shape.num_layers) == pytest.approx(GIB * (next(saved) - next(saved)))
    # Two groups of four; in parts, each of the eight rows has the prompt
    per_token = 2 * shape.num_layers * shape.hidden
    prompt = (on_host / per_token - 8 * 16) / 2
    assert split.host_gib["checkpoints"] * GIB == pytest.approx(per_token * 8 * (prompt + 16))
    assert "of the host, for checkpoints" in str(moved) and not kept.host_gib
    assert "`gradient_checkpointing_kwargs: {offload: true}`" in str(
        dry_run(models, tokenizer, tmp_path, gpu=Gpu(0.001, 1, 1), **options)
    )


def test_sharing_a_prompt_saves_what_it_should(models, tokenizer, tmp_path):
    dataset = rows(words=1000)
    shared = dry_run(models, tokenizer, tmp_path, dataset)
    plain = dry_run(models, tokenizer, tmp_path, dataset, shared_prefix="off")
    bounded = dry_run(models, tokenizer, tmp_path, dataset, max_tokens_per_micro_batch=1)
    sizes = [report.memory_gib["the student trains"]["activations"] for report in (plain, shared, bounded)]
    assert 3 < sizes[0] / sizes[1] < 4  # G = 4 completions, much shorter than the prompt
    assert sizes[2] < sizes[1]
    assert shared.step_seconds["plain"] > shared.step_seconds["shared"] > shared.step_seconds["decode"] > 0


def test_the_hours_are_less_where_a_schedule_ends_the_teacher(models, tokenizer, tmp_path):
    def time(**options):
        report = dry_run(models, tokenizer, tmp_path, rows(words=1000), max_steps=100, **options)
        return {name: values for name, values in section(report, "Time").items()}, report

    switch = {"distill_scheduler_type": "switch"}
    (always, report), (quarter, _) = time(), time(distill_scheduler_kwargs={"at": 0.25}, **switch)
    assert report.step_seconds and "the teacher ends" not in always
    assert quarter["the teacher ends"] == "after 25 of 100 steps"
    never, _ = time(distill_scheduler_type="plateau")
    assert never["the teacher ends"].startswith("when its metric stops rising")
    assert never["hours of the run"] == always["hours of the run"]
    _, late = time(distill_scheduler_kwargs={"at": 200}, **switch)
    assert any("`at` is step 200 of a run that has 100" in problem for problem in late.problems)


def test_what_does_not_fit_is_reported_with_what_to_change(models, tokenizer, tmp_path):
    report = dry_run(models, tokenizer, tmp_path, gpu=Gpu(0.001, 1, 1), engine=Engine("ddp", 2))
    (warning,) = report.warnings
    assert "exceeds the 0.0 that can be used" in warning and not report.problems
    order = ["max_tokens_per_micro_batch", "per_device_train_batch_size", "teacher_offload", "zero3.yaml", "LoRA"]
    places = [warning.index(name) for name in order]
    assert places == sorted(places)
    text = str(report)
    assert "Warnings" in text and "while the student trains" in text


# --- Problems


def test_long_prompts_need_positions_and_yarn_gives_them(models, tokenizer, tmp_path):
    dataset = rows(words=34_000)  # 34,000 tokens: within the 40,960 that are stated, beyond the 32,768 that are native
    report = dry_run(models, tokenizer, tmp_path, dataset)
    with pytest.raises(ValueError, match="more than the 32,768 positions of the student.*rope_type: yarn"):
        report.raise_for_problems()
    report = dry_run(models, tokenizer, tmp_path, dataset, model_init_kwargs=YARN, teacher_model_init_kwargs=YARN)
    report.raise_for_problems()
    assert "'factor': 4.0" in section(report, "Positions")["the teacher"]


def test_student_and_teacher_should_scale_positions_alike(models, tokenizer, tmp_path):
    report = dry_run(models, tokenizer, tmp_path, model_init_kwargs=YARN)
    (warning,) = report.warnings
    assert re.search("positions are scaled by .*yarn.*the teacher's by nothing", warning) and not report.problems
    other = {**YARN, "rope_parameters": {**YARN["rope_parameters"], "factor": 2.0}}
    report = dry_run(models, tokenizer, tmp_path, model_init_kwargs=YARN, teacher_model_init_kwargs=other)
    assert len(report.warnings) == 1
    report = dry_run(models, tokenizer, tmp_path, model_init_kwargs=YARN, teacher_model_init_kwargs=YARN)
    assert not report.warnings


def test_vllm_must_see_the_positions_too(models, tokenizer, tmp_path):
    yarn = {"model_init_kwargs": YARN, "teacher_model_init_kwargs": YARN, "use_vllm": True}
    report = dry_run(models, tokenizer, tmp_path, **yarn)
    with pytest.raises(ValueError, match="its own configuration says nothing, which is what vLLM reads"):
        report.raise_for_problems()
    AutoConfig.from_pretrained(models / "student", **YARN).save_pretrained(tmp_path / "saved")
    args = DGRPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=True, distill_coef=0.0, use_vllm=True)
    engine, gpu = Engine("zero3", 8), GPUS["h100-80gb"]
    preflight(args, str(tmp_path / "saved"), rows(), tokenizer, engine, gpu).raise_for_problems()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"teacher_model_name_or_path": "short", "words": 100}, "more than the 64 positions of the teacher"),
        ({"teacher_model_name_or_path": "small_head"}, "Both must have a row for every id"),
        ({"use_vllm": True, "vllm_max_model_length": 40, "words": 100}, "more than `vllm_max_model_length` .40."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_problems_are_found(models, tokenizer, tmp_path, options, match):
    options = dict(options)
    dataset = rows(words=options.pop("words", 4))
    if "teacher_model_name_or_path" in options:
        options["teacher_model_name_or_path"] = str(models / options["teacher_model_name_or_path"])
    report = dry_run(models, tokenizer, tmp_path, dataset, **options)
    with pytest.raises(ValueError, match=match):
        report.raise_for_problems()


def test_groups_that_micro_batches_split_are_warned_of(models, tokenizer, tmp_path):
    options = {"per_device_train_batch_size": 6, "engine": Engine("ddp", 3)}  # 36 completions, micro-batches of 6
    report = dry_run(models, tokenizer, tmp_path, **options)
    assert not report.problems and "groups are split over micro-batches" in report.warnings[0]
    assert not dry_run(models, tokenizer, tmp_path, **options, shared_prefix="off").warnings


def test_a_generation_batch_needs_enough_rows(models, tokenizer, tmp_path):
    report = dry_run(models, tokenizer, tmp_path, rows(31))
    with pytest.raises(ValueError, match="has 31 rows, and a generation batch takes 32 prompts"):
        report.raise_for_problems()


def test_a_teacher_is_needed_as_in_training(models, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="there is no teacher"):
        dry_run(models, tokenizer, tmp_path, teacher_model_name_or_path=None)


def test_a_stream_is_refused(models, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="a stream has no end"):
        dry_run(models, tokenizer, tmp_path, rows().to_iterable_dataset())


# --- SFT


def test_supervised_fine_tuning(models, tokenizer, tmp_path):
    completion = [[{"role": "assistant", "content": "the number"}]] * 32
    dataset = rows(words=100).add_column("completion", completion)
    args = SFTConfig(
        str(tmp_path / "out"), per_device_train_batch_size=2, max_length=None, use_cpu=True, bf16=True, packing=False
    )
    common = (tokenizer, Engine("zero3", 8), GPUS["a100-80gb"])
    report = preflight(args, str(models / "student"), dataset, *common)
    assert section(report, "Batches")["an optimizer step"] == "8 processes x 2 x 1 = 16 rows"
    assert section(report, "Batches")["steps"] == "6, 3.00 epochs of 32 rows"
    assert not report.problems and report.step_seconds["plain"] > 0
    long = rows(words=34_000).add_column("completion", completion)
    with pytest.raises(ValueError, match="more than the 32,768 positions of the student"):
        preflight(args, str(models / "student"), long, *common).raise_for_problems()


# --- Engines, command lines


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", Engine("single", 1)),
        ("cpu_zero3", Engine("zero3", 2)),
        ("cpu_fsdp2", Engine("fsdp2", 2)),
        ("single_gpu", Engine("single", 1)),
        ("zero2", Engine("zero2", 8)),
        ("zero3", Engine("zero3", 8)),
        ("zero3_offload", Engine("zero3", 8, offload_optimizer=True)),
        ("zero3_multinode", Engine("zero3", 16)),
        ("fsdp2", Engine("fsdp2", 8)),
    ],
)
def test_every_accelerate_configuration_is_understood(name, expected):
    assert read_engine(ROOT / "recipes" / "accelerate_configs" / f"{name}.yaml") == expected


def test_a_deepspeed_file_is_read(tmp_path):
    zero = {"stage": 3, "offload_param": {"device": "cpu"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    config = {"distributed_type": "DEEPSPEED", "num_processes": 4}
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "ds.json")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_engine(tmp_path / "config.yaml") == Engine("zero3", 4, offload_params=True)
    with pytest.raises(ValueError, match="accelerate configuration .* cannot be read"):
        read_engine(tmp_path / "missing.yaml")


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="`gpu` is 'abacus'"):
        PreflightArguments(gpu="abacus")
    with pytest.raises(ValueError, match="`mfu` is 2"):
        PreflightArguments(mfu=2)
    assert without_gpu(["--dry_run"]) == ["--dry_run", "--use_cpu", "true"] and without_gpu(["a"]) == ["a"]


@pytest.mark.parametrize("command", [train_dgrpo, train_sft], ids=["train_dgrpo", "train_sft"])
def test_a_dry_run_of_a_recipe_needs_no_weights(models, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    rows().to_parquet("rows.parquet")
    method = "sft" if command is train_sft else "dgrpo"
    command.main(
        [
            *("--config", str(ROOT / "recipes" / "qwen3-1.7b" / method / "32k.yaml"), "--short_share", "0"),
            *("--model_name_or_path", str(models / "student"), "--dataset_name", "rows.parquet"),
            *(["--teacher_model_name_or_path", str(models / "teacher")] if method == "dgrpo" else []),
            *("--dry_run", "--accelerate_config", str(ROOT / "recipes" / "accelerate_configs" / "zero3.yaml")),
        ]
    )
    printed = capsys.readouterr().out
    assert "8 processes x" in printed and "hours of the run" in printed
    assert not (tmp_path / "outputs").exists()


def test_a_student_that_does_not_exist_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = str(ROOT / "recipes" / "qwen3-1.7b" / "dgrpo" / "32k.yaml")
    with pytest.raises(ValueError, match="The student 'outputs/qwen3-1.7b/sft/32k' cannot be read"):
        train_dgrpo.main(["--dry_run", "--config", recipe])


def test_sft_refuses_rows_beyond_the_positions(models, tmp_path):
    rows(words=100).rename_column("answer", "response").to_parquet(tmp_path / "rows.parquet")
    recipe = str(ROOT / "recipes" / "qwen3-1.7b" / "sft" / "32k.yaml")
    with pytest.raises(ValueError, match="1 of 32 rows are too long: .* the 64 positions of the student"):
        train_sft.main(
            [
                *("--config", recipe, "--short_share", "0", "--completion_column", "response", "--use_cpu", "true"),
                *("--model_name_or_path", str(models / "short"), "--dataset_name", str(tmp_path / "rows.parquet")),
                *("--output_dir", str(tmp_path / "out")),
            ]
        )
