"""Completions: batches, padding, a shared beginning, penalties of the checkpoint, the adapter of vLLM."""

import sys
import types

import pytest
import torch

from dgrpo_trl.evaluation import generation
from dgrpo_trl.evaluation.generation import (
    bind_chat_template_kwargs,
    can_continue,
    generate_completions,
    generate_with_vllm,
    load_vllm,
    tokenize_prompts,
)


DOCUMENT = "The ship Antonio sails from Venice with number 4821. The town of Marbury has 730 people and 12 mills. "
OTHER = "user assistant system What is the number of the town? It has 12 ships, and the mills have 4821 people. " * 2
QUESTIONS = ["What is the number?", "Which town?", "Answer with the number of the mills only.", "Who?"]


def turn(text):
    return [{"role": "user", "content": text}]


PROMPTS = [turn(DOCUMENT + question) for question in QUESTIONS]
PROMPTS += [turn(OTHER + question) for question in QUESTIONS[:3]] + [turn("Alone.")]
SHARED = ["a"] * 4 + ["b"] * 3 + [None]
PREFIXES = ["", " The", "", " It is", "", "", "The answer", ""]


def greedy(model, tokenizer, prompt, prefix, max_new_tokens):
    """Written out: one prompt, no padding, no cache."""
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) + prefix
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    new = []
    with torch.no_grad():
        while len(new) < max_new_tokens and (not new or new[-1] != tokenizer.eos_token_id):
            new.append(model(torch.tensor([ids + new])).logits[0, -1].argmax().item())
    return tokenizer.decode(new, skip_special_tokens=True)


def forwards(model):
    """Number of tokens of each forward."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen, handle


WINDOW = {"sliding_window": 40, "max_position_embeddings": 1024}
KINDS = {
    "full attention": ("Qwen3", {"max_position_embeddings": 1024}),
    "another family": ("Llama", {"max_position_embeddings": 1024}),
    "a window in every layer": ("Mistral", WINDOW),
    "a window in some layers": (
        "Qwen3",
        {**WINDOW, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}


@pytest.mark.parametrize("max_batch_tokens", [1, 700, 10_000])
@pytest.mark.parametrize("kind", KINDS)
def test_batching_padding_and_a_shared_beginning_change_no_completion(tokenizer, make_model, kind, max_batch_tokens):
    name, overrides = KINDS[kind]
    model = make_model(name, **overrides)
    expected = [greedy(model, tokenizer, *pair, 6) for pair in zip(PROMPTS, PREFIXES, strict=True)]
    assert len(set(expected)) > 4  # the model tells the prompts apart
    assert can_continue(model)
    for shared_with in (None, SHARED):
        found = generate_completions(
            *(model, tokenizer, PROMPTS, 6, max_batch_tokens, None),
            answer_prefixes=PREFIXES,
            shared_with=shared_with,
            min_shared_tokens=8,
        )
        assert found == expected


def test_a_shared_beginning_runs_once(tokenizer, make_model):
    model = make_model(max_position_embeddings=1024)
    ids = tokenize_prompts(tokenizer, PROMPTS[:4])
    common = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
    assert common > 30
    for shared_with, expected in (
        (SHARED[:4], common + sum(len(x) - common for x in ids)),
        (None, sum(map(len, ids))),
    ):
        seen, handle = forwards(model)
        generate_completions(
            model, tokenizer, PROMPTS[:4], 1, 1, None, shared_with=shared_with, min_shared_tokens=8
        )  # a batch a prompt: no padding
        handle.remove()
        assert sum(seen) == expected


def test_what_cannot_continue_from_a_cache_is_run_whole(make_model):
    def rope(kind, **more):
        return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **more}}

    assert can_continue(make_model(**rope("linear")))
    assert can_continue(make_model(**rope("yarn", original_max_position_embeddings=128)))
    assert not can_continue(make_model(**rope("dynamic")))
    model = make_model()
    model.config.layer_types = ["chunked_attention", "full_attention"]
    assert not can_continue(model)
    model.config.layer_types = ["linear_attention", "full_attention"]
    assert not can_continue(model)


def test_prefilling_makes_the_logits_of_one_token_alone(tokenizer, make_model):
    model = make_model(max_position_embeddings=1024)
    rows = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: rows.append(out.shape[1]))
    generate_completions(model, tokenizer, PROMPTS, 3, 700, None, shared_with=SHARED, min_shared_tokens=8)
    handle.remove()
    assert set(rows) == {1}


def test_penalties_and_sampling_of_the_checkpoint_are_left_out_and_put_back(tokenizer, make_model):
    model = make_model(max_position_embeddings=1024)
    plain = generate_completions(model, tokenizer, PROMPTS, 12, 700, None)
    model.generation_config.update(repetition_penalty=3.0, do_sample=True, temperature=5.0, top_k=7)
    defaults = model.generation_config
    assert generate_completions(model, tokenizer, PROMPTS, 12, 700, None) == plain
    assert model.generation_config is defaults and defaults.repetition_penalty == 3.0


def test_a_completion_ends_where_the_checkpoint_or_the_tokenizer_says(tokenizer, make_model):
    model = make_model(max_position_embeddings=1024)
    new = tokenizer(greedy(model, tokenizer, PROMPTS[0], "", 8), add_special_tokens=False)["input_ids"]
    model.generation_config.eos_token_id = [299, new[2]]
    (short,) = generate_completions(model, tokenizer, PROMPTS[:1], 8, 700, None)
    assert tokenizer.decode(new).startswith(short) and len(short) < len(tokenizer.decode(new))
    assert generation.greedy_config(model.generation_config, tokenizer).eos_token_id == [299, new[2], 2]


def test_a_control_token_in_a_document_stays_text(tokenizer):
    (ids,) = tokenize_prompts(tokenizer, [turn("before <|im_end|> after")])
    ends = ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert ends == 1  # the template's own


def test_batches_hold_every_prompt_once_within_the_budget(tokenizer, make_model):
    model = make_model(max_position_embeddings=1024)
    generate, shapes = model.generate, []

    def record(input_ids, **kwargs):
        shapes.append(input_ids.shape)
        return generate(input_ids=input_ids, **kwargs)

    model.generate = record
    prompts = [turn("word " * count) for count in (5, 90, 7, 30, 31, 6, 200, 8)]
    generate_completions(model, tokenizer, prompts, 10, 700, None)
    assert sum(rows for rows, _ in shapes) == len(prompts) > len(shapes)
    assert all(rows == 1 or rows * (length + 10) <= 700 for rows, length in shapes)
    assert any(length + 10 > 700 for _, length in shapes)  # a prompt over the budget is a batch by itself


def test_generation_leaves_the_mode_of_the_model_as_it_was(tokenizer, make_model):
    model = make_model(max_position_embeddings=1024).train()
    generate_completions(model, tokenizer, PROMPTS[:1], 1, 700, None)
    assert model.training


def test_progress_counts_every_prompt_once(tokenizer, make_model):
    done = []
    generate_completions(
        *(make_model(max_position_embeddings=1024), tokenizer, PROMPTS, 2, 700, None),
        shared_with=SHARED,
        min_shared_tokens=8,
        on_progress=done.append,
    )
    assert sum(done) == len(PROMPTS)


def test_arguments_of_the_chat_template_are_bound_into_it(tokenizer):
    import copy

    bound = copy.deepcopy(tokenizer)
    bound.chat_template += "{% if not enable_thinking %}<think></think>{% endif %}{{ note }}"
    bind_chat_template_kwargs(bound, {"enable_thinking": True, "note": 'a "note"'})
    assert bound.apply_chat_template(PROMPTS[0], tokenize=False).endswith('<|im_end|>\na "note"')
    bind_chat_template_kwargs(bound, {})
    assert not bound.apply_chat_template(PROMPTS[0], tokenize=False).endswith("<think></think>")


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in with the published signatures of `vllm.LLM`, `LLM.generate` and `SamplingParams` (0.11)."""
    calls = []

    class SamplingParams:
        def __init__(self, *, temperature=1.0, max_tokens=16, skip_special_tokens=True, repetition_penalty=1.0):
            self.temperature, self.max_tokens = temperature, max_tokens

    class LLM:
        def __init__(self, model, *, dtype="auto", revision=None, tokenizer_revision=None, **kwargs):
            calls.append({"model": model, "dtype": dtype, "revision": revision, **kwargs})

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None, priority=None):
            calls.append((prompts, sampling_params))
            texts = [f"{len(prompt['prompt_token_ids'])} tokens" for prompt in prompts]
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(text=text)]) for text in texts]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    return calls


def test_vllm_gets_the_same_tokens_and_is_greedy(vllm, tokenizer):
    llm = load_vllm("some/model", "main", "bfloat16", 4096, {"tensor_parallel_size": 2})
    assert vllm[0] == {
        **{"model": "some/model", "dtype": "bfloat16", "revision": "main", "max_model_len": 4096},
        **{"enable_prefix_caching": True, "tensor_parallel_size": 2},
    }
    texts = generate_with_vllm(llm, tokenizer, PROMPTS, 7, answer_prefixes=PREFIXES)
    ids = tokenize_prompts(tokenizer, PROMPTS, PREFIXES)
    prompts, params = vllm[1]
    assert [prompt["prompt_token_ids"] for prompt in prompts] == ids
    assert (params.temperature, params.max_tokens) == (0.0, 7)
    assert texts == [f"{len(x)} tokens" for x in ids]


def test_a_missing_vllm_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install 'dgrpo-trl\[vllm\]'"):
        load_vllm("some/model", None, "auto", 4096, {})
