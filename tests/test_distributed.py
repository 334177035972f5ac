"""Two real processes against one, on the same global batch: DDP, FSDP2 and DeepSpeed ZeRO-3, all on the CPU.

The one process is that of the tests. The two run all cases of an engine in one launch, see `distributed_runs`.
"""

import json
import math
import re

import pytest
import torch
from collectives import assert_same_calls, count_by_phase
from conftest import ROOT, build_model
from distributed_runs import Outcome, launch_cases, needs_deepspeed
from distributed_training import train
from transformers import AutoModelForCausalLM

from dgrpo_trl.cli import train_sft


pytestmark = pytest.mark.distributed

# Options of `distributed_training`, and `teacher`; by engine and name
SPLIT = {"max_tokens_per_micro_batch": 40}
CUT_GROUPS = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 1, "num_generations": 2}
# No pair to compare shared with plain forwards, on one rank
ONE_RANK_MASKED = {"no_end": [1], "mask_truncated_completions": True}
# The teacher is let go after two of the three steps, and the rewards begin
SCHEDULED = {
    "distill_scheduler_type": "plateau",
    "distill_scheduler_kwargs": {"patience": 1, "min_delta": 9.0},
    "distill_gate_reward": 3.0,
    **{"reward_start": "switch", "distill_gate": "below_reward", "distill_mask_eos": True, "distill_clip": 3.0},
}
EQUAL_TO_ONE = {
    "ddp": {
        "scheduled": SCHEDULED,
        "dapo": {"loss_type": "dapo"},
        "grpo unshared": {"loss_type": "grpo", "shared_prefix": "off"},
        "split": SPLIT,
    },
    "fsdp2": {
        "split": SPLIT,
        "scheduled": SCHEDULED,
        "cut groups": {**CUT_GROUPS, "shared_prefix": "on"},
        "one rank masked": {**ONE_RANK_MASKED, **SPLIT},
        "unshared, evaluates": {"shared_prefix": "off", "evaluates": 8},
        "lora": {"lora": True},
        "lora, base": {"lora": True, "teacher": "base"},
        "all masked": {"no_end": [0, 1], "mask_truncated_completions": True},
        "adam": {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0},
    },
    "zero3": {
        "shared, evaluates": {"shared_prefix": "on", "evaluates": 8},
        # One rank has no row of its own
        "unshared, tiles, evaluates 1": {"shared_prefix": "off", "tile_tokens": 3, "evaluates": 1},
        "split, offload": {**SPLIT, "teacher_offload": "cpu"},
        "scheduled": SCHEDULED,
        "scheduled, offload": {**SCHEDULED, "teacher_offload": "cpu"},
        "cut groups": {**CUT_GROUPS, "shared_prefix": "on"},
        "lora": {"lora": True},
        "lora, base": {"lora": True, "teacher": "base"},
        "one rank masked": {**ONE_RANK_MASKED, **SPLIT},
        "all masked": {"no_end": [0, 1], "mask_truncated_completions": True},
        "adam": {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0},
    },
}
ENGINES = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}  # as Accelerate calls them
RESUMABLE = {"optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 4, "shuffle_dataset": True}
STRAIGHT = {**RESUMABLE, "saves": True}
STOPPED = {**RESUMABLE, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
RESUMED = {**RESUMABLE, "resume": "stopped"}
KILLED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
ONE_FORWARD_MORE = {"one_forward_more": 1, "shared_prefix": "off"}
LAUNCHES = {
    "ddp": {**EQUAL_TO_ONE["ddp"], "hangs": {"hangs": 1}},
    "fsdp2": {
        **EQUAL_TO_ONE["fsdp2"],
        "generates": {"generates": True},
        **{"straight": STRAIGHT, "stopped": STOPPED, "resumed": RESUMED},
        "one forward more": ONE_FORWARD_MORE,
    },
    "zero3": {
        # In the memory of a new process
        "measures": {
            **{"teacher": "large", "measures": True, "max_steps": 2},
            **{"num_generations": 2, "gradient_accumulation_steps": 1},
        },
        **EQUAL_TO_ONE["zero3"],
        "first": {"max_steps": 1},
        "corrupt": {"max_steps": 2, "corrupts": [2]},
        "stops": {"corrupts": [1, 2], "max_nonfinite_steps": 2},
        "generates": {"generates": True},
        **{"straight": STRAIGHT, "stopped": STOPPED},
        "sft": {},
        "killed": {**KILLED, "killed": 3},
    },
    "zero3 again": {  # resumes in a new process
        "resumed": RESUMED,
        "resumed after the kill": {**KILLED, "resume": "killed"},
        "one forward more": ONE_FORWARD_MORE,
    },
}
PARTING = ("hangs", "one forward more")  # of the ranks, on purpose: each the last of its launch
SFT_ARGUMENTS = [
    *("--config", str(ROOT / "recipes" / "smollm2-135m" / "sft" / "demo.yaml")),
    *("--max_steps", "-1", "--num_train_epochs", "1", "--bf16", "false", "--optim", "sgd"),
    *("--learning_rate", "0.5", "--max_grad_norm", "0", "--warmup_steps", "0"),
    *("--train_sampling_strategy", "random"),
]


def two_process_options(options):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, **options}
    return {**options, "per_device_eval_batch_size": 2 * options["per_device_train_batch_size"]}


class Runs:
    """What the launches have left, each of which takes place when it is first asked for."""

    def __init__(self, folder, tokenizer):
        self.folder = folder
        self.done: dict[str, dict[str, Outcome]] = {}
        self.references = {}
        self._make_models(tokenizer)

    def _make_models(self, tokenizer):
        """A student, a teacher of another width and depth, and one of which no rank has room for the whole."""
        wider = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 8}
        large |= {"num_key_value_heads": 4, "head_dim": 128}
        for name, sizes in (("student", {}), ("teacher", {"seed": 1, **wider}), ("large", {"seed": 1, **large})):
            build_model(**sizes).save_pretrained(self.folder / name, max_shard_size="60MB")
            tokenizer.save_pretrained(self.folder / name)

    def __call__(self, launch, name):
        engine = launch.split()[0]
        if launch == "zero3 again" and launch not in self.done:
            self("zero3", "killed")
            self.killed_files = {path.name for path in (self.out("zero3", "killed") / "checkpoint-3").iterdir()}
        if launch not in self.done:
            cases = [self._case(engine, name, options) for name, options in LAUNCHES[launch].items()]
            self.done[launch] = launch_cases(self.folder / engine, engine, cases)
        return self.done[launch][name]

    def _case(self, engine, name, options):
        if name == "sft":
            arguments = self.sft_arguments(self.out(engine, name), batch_size=2)
            return {"name": name, "kind": "sft", "arguments": arguments}
        options = two_process_options(options)
        models = {"student": str(self.folder / "student"), "teacher": self._teacher(options.pop("teacher", "teacher"))}
        if "resume" in options:
            options["resume"] = str(self.out(engine, options["resume"]))
        return {"name": name, "kind": "dgrpo", **models, "options": options, "fails": name == "stops"}

    def _teacher(self, name):
        return name if name == "base" else str(self.folder / name)

    def out(self, engine, name):
        return self.folder / engine / f"{name}_out"

    def sft_arguments(self, output, batch_size):
        rows = [
            {"prompt": [{"role": "user", "content": f"{'The ship. ' * (i % 4)} Number {i}?"}], "answer": f"number {i}"}
            for i in range(9)
        ]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths = {"model_name_or_path": self.folder / "student", "dataset_name": self.folder / "rows.jsonl"}
        flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
        flags += ["--output_dir", str(output), "--per_device_train_batch_size", str(batch_size)]
        return [*SFT_ARGUMENTS, *flags]

    def in_one_process(self, options):
        """Every completion with its prompt, in whole micro-batches: the reference."""
        options = {**two_process_options(options), "shared_prefix": "off"}
        teacher = self._teacher(options.pop("teacher", "teacher"))
        for name in ("max_tokens_per_micro_batch", "teacher_offload", "tile_tokens"):
            options.pop(name, None)
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            options[name] *= 2
        key = json.dumps([teacher, options], sort_keys=True)
        if key not in self.references:
            self.references[key] = train(str(self.folder / "one"), str(self.folder / "student"), teacher, options)
        return self.references[key]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tokenizer):
    return Runs(tmp_path_factory.mktemp("runs"), tokenizer)


def case(launch, name):
    marks = [needs_deepspeed] if launch.startswith("zero3") else []
    return pytest.param(launch, name, marks=marks, id=f"{launch}-{name}")


@pytest.mark.parametrize(
    ("engine", "name"), [case(engine, name) for engine in EQUAL_TO_ONE for name in EQUAL_TO_ONE[engine]]
)
def test_two_processes_equal_one_on_the_same_global_batch(runs, engine, name):
    options = EQUAL_TO_ONE[engine][name]
    two = runs(engine, name)
    two_steps, two_weights = two.log(), two.weights
    assert [rank["engine"] for rank in two.ranks] == [ENGINES[engine]] * 2
    one, one_weights = runs.in_one_process(options)
    one_steps = [entry for entry in one["log"] if "loss" in entry]
    assert len(one_steps) == 3
    for a, b in zip(one_steps, two_steps, strict=True):
        for metric in ("loss", "grad_norm", "reward", "distill/loss", "distill/grpo_loss", "distill/divergence"):
            assert (metric in a) == (metric in b), metric
            if metric in a:
                assert a[metric] == pytest.approx(b[metric], rel=1e-4, abs=1e-5), metric
    assert one_steps[-1]["num_tokens"] == two_steps[-1]["num_tokens"]
    if options.get("evaluates"):
        for metric in ("eval_loss", "eval_distill/loss", "eval_distill/divergence", "eval_reward"):
            values = [job["evaluated"][metric] for job in (one, two.ranks[0])]
            # What a rank without a row of its own evaluates is a row again, with completions by its place
            assert options["evaluates"] == 1 or values[1] == pytest.approx(values[0], rel=1e-4, abs=1e-5), metric
            assert math.isfinite(values[1])
    start = build_model().state_dict()
    start |= {name: torch.zeros_like(weight) for name, weight in one_weights.items() if "lora_B" in name}
    names = [name for name in one_weights if name in start]
    moved = torch.cat([(one_weights[name] - start[name]).flatten() for name in names]).norm()
    apart = torch.cat([(one_weights[name] - two_weights[name]).flatten() for name in one_weights]).norm()
    if options.get("no_end") == [0, 1]:  # nothing to learn from, on any rank
        assert moved == 0 and apart == 0
    else:
        assert moved > 1e-3 and apart < 1e-4 * moved


CASES = [(launch, name) for launch, cases in LAUNCHES.items() for name in cases if name not in PARTING]


@pytest.mark.parametrize(("launch", "name"), [case(launch, name) for launch, name in CASES])
def test_all_ranks_issue_the_same_collective_calls_in_each_phase_of_a_step(runs, launch, name):
    outcome = runs(launch, name)
    if name not in ("stops", "killed"):
        outcome.check()
    assert all(outcome.calls)
    assert_same_calls(outcome.calls)
    if name == "sft":
        return
    counts = count_by_phase(outcome.calls[0])
    assert counts["generation"] > 0 and counts["step"] > 0
    if launch != "ddp":  # where weights are gathered
        assert counts["teacher"] > 0 and counts["loss"] > 0
    assert (counts["check"] > 0) == ("unshared" not in name)


@pytest.mark.parametrize("launch", [pytest.param("zero3 again", marks=needs_deepspeed), "fsdp2"])
def test_a_rank_that_runs_one_forward_more_is_found(runs, launch):
    outcome = runs(launch, "one forward more")
    assert not outcome.has_ended
    with pytest.raises(AssertionError, match=r"The ranks differ .* rank 1 in step/teacher: all_gather"):
        assert_same_calls(outcome.calls)


@needs_deepspeed
def test_zero3_skips_a_step_that_is_not_finite_on_one_rank(runs):
    first, corrupt, stops = (runs("zero3", name) for name in ("first", "corrupt", "stops"))
    first.check()
    corrupt.check()
    for name in first.weights:
        torch.testing.assert_close(first.weights[name], corrupt.weights[name], rtol=0, atol=0)
    message = "2 consecutive optimizer steps were not finite; the last: the"
    assert len(stops.errors) == 2 and all(message in error for error in stops.errors)
    assert f"{message} teacher term" in stops.errors[1]  # only that rank knows whose it is


@pytest.mark.parametrize(
    ("launch", "again"), [pytest.param("zero3", "zero3 again", marks=needs_deepspeed), ("fsdp2", "fsdp2")]
)
def test_a_sharded_run_resumes_in_the_middle_of_an_epoch_and_saves_what_transformers_loads(runs, launch, again):
    straight, resumed = runs(launch, "straight"), runs(again, "resumed")
    runs(launch, "stopped").check()
    resumed.check()
    assert resumed.ranks[0]["resumed_from"].endswith("checkpoint-2")
    for a, b in zip(straight.log(), resumed.log(), strict=True):
        assert a["num_tokens"] == b["num_tokens"] or a["step"] > 2  # TRL counts tokens from the resumption on
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5, abs=1e-6)
    expected = straight.weights
    for name in expected:
        torch.testing.assert_close(expected[name], resumed.weights[name], rtol=1e-6, atol=1e-7)
    saved = AutoModelForCausalLM.from_pretrained(runs.out(launch, "straight"))
    model = build_model()
    model.load_state_dict(expected)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(saved(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-6)


@needs_deepspeed
def test_the_cold_start_equals_one_process_and_ends_where_a_rank_has_no_row_left(runs):
    runs("zero3", "sft").check()
    one, two = runs.folder / "sft", runs.out("zero3", "sft")
    train_sft.main(runs.sft_arguments(one, batch_size=4))
    logs = []
    for output in (one, two):
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        logs.append([entry for entry in history if "loss" in entry])
    assert len(logs[0]) == len(logs[1]) == 3  # in the last step there is one row, for one of the ranks
    for a, b in list(zip(*logs, strict=True))[:2]:
        for metric in ("loss", "grad_norm"):
            assert a[metric] == pytest.approx(b[metric], rel=1e-4), metric
    assert logs[0][0]["loss"] - logs[0][1]["loss"] > 0.01
    assert AutoModelForCausalLM.from_pretrained(two).num_parameters() == build_model().num_parameters()


def test_a_job_that_hangs_ends_with_the_stack_of_every_rank(runs):
    outcome = runs("ddp", "hangs")
    assert not outcome.has_ended
    # The other rank is ended by the launcher, or by the loss of its connection, whichever comes first
    stacks = re.findall(r'distributed_job.py", line \d+,? in run_case', outcome.stderr)
    assert len(stacks) >= 2, outcome.stderr[-20_000:]
    assert outcome.stderr.count("in wait_for_ever") == 1


@needs_deepspeed
def test_no_rank_ever_holds_the_teacher_whole(runs):
    outcome = runs("zero3", "measures")
    outcome.check()
    teacher = AutoModelForCausalLM.from_pretrained(runs.folder / "large")
    num_parameters = teacher.num_parameters()
    whole_mib = 4 * num_parameters / 2**20
    for seen in outcome.ranks:
        assert seen["held"] == 0 and seen["sharded"] == pytest.approx(num_parameters / 2, rel=0.01)
        assert seen["built_mib"] < 0.75 * whole_mib, seen
        assert seen["trained_mib"] < whole_mib, seen  # its shard, the layers in use, the student and all else


@needs_deepspeed
def test_a_checkpoint_that_was_cut_off_by_a_kill_is_not_resumed_from(runs):
    assert runs("zero3", "killed").ranks == [None, None]
    resumed = runs("zero3 again", "resumed after the kill")
    assert [entry["step"] for entry in resumed.log()] == [1, 2, 3, 4]
    assert resumed.ranks[0]["resumed_from"].endswith("checkpoint-2")
    assert "model.safetensors" in runs.killed_files and "global_step3" not in runs.killed_files
