"""Each line of the table of outcomes, played by a scripted server; and the words and endings of many servers."""

import asyncio
import json

import pytest
from chat_server import ChatServer, Fault, chat_body
from conftest import ROOT

from dgrpo_trl.llm import ChatClient, RequestCache, RequestFailed, ServerConfig, ServerRefused, ServerUnavailable
from dgrpo_trl.llm.failures import OUTCOMES, REQUEST_REASONS, Refusal, refusal_in_reply


FAST = {"backoff_seconds": 0.001, "max_backoff_seconds": 0.01, "timeout_seconds": 5, "max_outage_seconds": 0.1}
DOCUMENT = "The ship Antonio sails from Venice with number 4821, and nobody spoke of it. " * 200
MAX_RETRIES = 3


def error(status, message, **fields):
    return Fault(status, json.dumps({"error": {"message": message, **fields}}).encode())


def read(num_tokens):
    """A reply of a server that read this many tokens of its prompt."""
    return json.dumps({**json.loads(chat_body("fine")), "usage": {"prompt_tokens": num_tokens}}).encode()


def ask(server, path, prompts, **options):
    """Outcomes of all prompts: texts, or errors."""

    async def run():
        config = ServerConfig(base_url=server.url, model="m", **{**FAST, "max_retries": MAX_RETRIES, **options})
        async with ChatClient(config, RequestCache(path)) as client:
            requests = (client.complete([{"role": "user", "content": p}], max_tokens=16) for p in prompts)
            return await asyncio.gather(*requests, return_exceptions=True)

    return [outcome if isinstance(outcome, Exception) else outcome.text for outcome in asyncio.run(run())]


# By line of the table: what the server does, to the request "bad" alone where one is skipped, and else to all
SCRIPTS = {
    "rate_limited": [error(429, "slow down")],
    "server_error": [
        error(500, "out of order"),
        error(409, "busy"),
        Fault(200, b'{"error": {"message": "Upstream error", "code": 500}}'),
        Fault(200, b'{"error": "internal failure"}'),
        Fault(200, b'{"object": "error", "message": "engine died", "code": 500}'),
        Fault(
            200, b'{"choices": [{"error": {"message": "Provider failed", "code": 500}, "message": {"content": "x"}}]}'
        ),
    ],
    "timeout": [Fault(seconds=1)],
    "connection_closed": [Fault(200, chat_body("half of it"), hangs_up=20)],
    "malformed_reply": [
        Fault(200, b"<html>busy</html>"),
        Fault(200, chat_body("call", "tool_calls")),
        Fault(200, chat_body([{"type": "image_url", "image_url": "x"}])),
    ],
    "empty_reply": [Fault(200, chat_body(None)), Fault(200, b"{}"), Fault(200, chat_body([]))],
    "truncated": [
        *(
            Fault(200, chat_body("So the answer is", reason))
            for reason in (
                "length",
                "max_tokens",
                "MAX_TOKENS",
                "model_length",
                "abort",
                "error",
                "load",
                "limit",
                None,
            )
        ),
        Fault(200, chat_body("<|channel|>analysis<|message|>We need the ship")),
        Fault(200, chat_body("<thinking>the ship")),
    ],
    "reasoning_only": [
        Fault(200, chat_body(None, reasoning_content="The ship is number 4821.")),
        Fault(200, chat_body("", reasoning="The ship is number 4821.")),
        Fault(200, chat_body("Thinking Process:\n\n1. **Analyze the request:** the ship\n2. Number: 4821")),
        Fault(200, chat_body([{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}])),
    ],
    "refused_content": [
        Fault(200, chat_body("", "content_filter")),
        Fault(200, chat_body("", "SAFETY")),
        Fault(200, chat_body(None, refusal="no")),
        error(400, "blocked by the content_filter"),
    ],
    "context_overflow": [
        error(400, "too long", code="context_length_exceeded"),
        Fault(413, b"<html>Request Entity Too Large</html>"),
        Fault(200, b'{"error": {"message": "the prompt exceeds the context window", "code": 400}}'),
    ],
    "bad_request": [Fault(403, b"<html>Blocked by the firewall</html>"), error(422, "what?"), error(405, "no")],
    "unpaid": [
        error(402, "Insufficient Balance"),
        error(429, "You exceeded your current quota", code="insufficient_quota"),
        error(400, "Your credit balance is too low to access the API"),
        Fault(200, b'{"error": {"message": "Insufficient credits", "code": 402}}'),
        Fault(200, b'{"error": {"message": "Your account is out of credits"}}'),
    ],
    "refuses_all": [
        error(401, "wrong key"),
        error(403, "you may not use this model"),
        error(404, "no such model"),
        error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."),
        error(400, "max_tokens is too large: 16. This model supports at most 8 completion tokens."),
        error(422, "temperature: extra fields not permitted"),
        Fault(200, b'{"error": {"message": "Invalid API key"}}'),
    ],
    "prompt_cut": [Fault(200, read(1024))],
    "nothing_usable": [
        Fault(200, chat_body(None, reasoning_content="The ship is number 4821.")),
        Fault(200, chat_body("cut", "length")),
        error(500, "out of order"),
        Fault(200, b"<html>busy</html>"),
    ],
    "unavailable": [error(429, "slow down"), error(503, "loading the model")],
}
CASES = [pytest.param(name, script, id=f"{name}-{n}") for name, of in SCRIPTS.items() for n, script in enumerate(of)]


def test_every_line_is_played():
    assert set(SCRIPTS) == set(OUTCOMES)


@pytest.mark.parametrize(("reason", "script"), [case for case in CASES if OUTCOMES[case.values[0]].then != "stop"])
def test_one_request_that_fails_is_retried_skipped_and_resumed_as_the_table_says(reason, script, tmp_path):
    outcome, works = OUTCOMES[reason], False

    def reply(request, times):
        return script if request["messages"][0]["content"] == "bad" and not works else "fine"

    prompts = [*map(str, range(10)), "bad", *map(str, range(10, 20))]
    with ChatServer(reply) as server:
        seconds = 0.5 if reason == "timeout" else 5
        results = ask(server, tmp_path / "cache", prompts, max_concurrency=2, timeout_seconds=seconds)
        failed = results.pop(10)
        assert isinstance(failed, RequestFailed) and failed.reason == reason
        assert set(results) == {"fine"}
        num_tries = sum(request["messages"][0]["content"] == "bad" for request in server.requests)
        retries = MAX_RETRIES if outcome.retries == "max_retries" else outcome.retries
        assert num_tries >= 1 + retries if reason == "rate_limited" else num_tries == 1 + retries
        works = True
        cache = RequestCache(tmp_path / "cache")
        cache.forget_failures([name for name, may_succeed in REQUEST_REASONS.items() if may_succeed])  # --retry_failed
        cache.close()
        (again,) = ask(server, tmp_path / "cache", ["bad"])
    assert (again == "fine") == (outcome.resume == "--retry_failed" or error_was_free(script))


def error_was_free(script):
    """Nobody has paid for a status that is no reply: the cache does not keep it."""
    return script.status != 200


@pytest.mark.parametrize(("reason", "script"), [case for case in CASES if OUTCOMES[case.values[0]].then == "stop"])
def test_a_server_that_fails_all_requests_stops_the_run_early_and_the_next_run_asks_all_again(
    reason, script, tmp_path
):
    works, asked = True, []

    def reply(request, times):
        if works:
            asked.append(request["messages"][0]["content"])
        return "fine" if works else script

    documents = [f"{n} {DOCUMENT}" for n in range(120)]
    with ChatServer(reply) as server:
        assert set(ask(server, tmp_path / "cache", documents[:5])) == {"fine"}
        works = False
        results = ask(server, tmp_path / "cache", documents[5:], max_concurrency=64)
        stops = [result for result in results if isinstance(result, ServerRefused)]
        assert stops and all("run again" in str(stop) for stop in stops)
        assert reason != "unavailable" or isinstance(stops[0], ServerUnavailable)
        assert not any(isinstance(result, RequestFailed) for result in results)
        if reason == "nothing_usable" and script.status == 200:
            assert len(server.requests) <= 5 + 48, stops[0]
        works = True
        asked.clear()
        assert set(ask(server, tmp_path / "cache", documents)) == {"fine"}  # without --retry_failed
    assert set(asked) == set(documents[5:])
    assert len(asked) <= 115 + 64  # what was in flight at the stop may reach the server late


@pytest.mark.parametrize("max_concurrency", [1, 64])
def test_replies_that_the_caller_cannot_use_end_the_run_early_too(max_concurrency, tmp_path):
    async def run():
        config = ServerConfig(base_url=server.url, model="m", max_concurrency=max_concurrency, **FAST)
        async with ChatClient(config, RequestCache(tmp_path / "cache")) as client:
            requests = (
                client.complete([{"role": "user", "content": str(n)}], max_tokens=16, is_usable="{".__eq__)
                for n in range(200)
            )
            return await asyncio.gather(*requests, return_exceptions=True)

    with ChatServer(lambda request, times: "no JSON") as server:
        results = asyncio.run(run())
        assert isinstance(results[-1], ServerRefused) and "unusable text" in str(results[-1])
        assert len(server.requests) <= 64


def test_a_server_that_fails_every_reply_is_noticed_across_restarts(tmp_path):
    with ChatServer(lambda request, times: Fault(200, chat_body("cut", "length"))) as server:
        outcomes = [ask(server, tmp_path / "cache", [f"{n} a", f"{n} b"])[-1] for n in range(6)]
        assert [type(outcome) for outcome in outcomes] == [RequestFailed] * 5 + [ServerRefused]
        assert "max_tokens" in str(outcomes[-1])


def test_the_tries_of_a_run_that_was_killed_count(tmp_path):
    async def die_after(num_tries):
        config = ServerConfig(
            base_url=server.url, model="m", **{**FAST, "backoff_seconds": 0.2, "max_backoff_seconds": 1}
        )
        async with ChatClient(config, RequestCache(tmp_path / "cache")) as client:
            task = asyncio.ensure_future(client.complete([{"role": "user", "content": "bad"}], max_tokens=16))
            while len(server.requests) < num_tries:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.05)
            task.cancel()

    def reply(request, times):
        return error(500, "x") if request["messages"][0]["content"] == "bad" else "fine"

    with ChatServer(reply) as server:
        asyncio.run(die_after(2))
        (failed,) = ask(server, tmp_path / "cache", ["bad"])
        assert failed.reason == "server_error" and len(server.requests) == 1 + MAX_RETRIES


def test_a_server_that_counts_fairly_or_not_at_all_is_not_taken_for_one_that_cuts(tmp_path):
    code = "    if x:\n" + " " * 400 + "return None  # " + "-" * 300 + "\n"
    texts = {DOCUMENT: len(DOCUMENT) // 6, code * 20: 20 * 14, DOCUMENT + " ": 0, DOCUMENT + "  ": 3}
    with ChatServer(lambda request, times: read(texts[request["messages"][0]["content"]])) as server:
        assert ask(server, tmp_path / "cache", list(texts)) == ["fine"] * len(texts)


def test_a_tokenizer_sees_a_prompt_that_lost_a_third(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    num_tokens = len(tokenizer(DOCUMENT)["input_ids"])
    share = 1.0
    with ChatServer(lambda request, times: read(int(share * num_tokens))) as server:
        assert ask(server, tmp_path / "a", [DOCUMENT], tokenizer=str(tmp_path)) == ["fine"]
        share = 0.6
        (stop,) = ask(server, tmp_path / "b", [DOCUMENT], tokenizer=str(tmp_path))
    if len(DOCUMENT) >= 5 * int(share * num_tokens):
        assert isinstance(stop, ServerRefused) and "num_ctx" in str(stop) and f"{num_tokens:,}" in str(stop)


OVERFLOWS = {
    "vLLM": "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4000 in the "
    "messages, 1000 in the completion). Please reduce the length of the messages or completion.",
    "vLLM 2": "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
    "vLLM 3": "max_tokens must be at least 1, got -904.",
    "vLLM 4": "You passed 5000 input tokens and requested 16 output tokens. However, the model's context length is "
    "only 4096 tokens.",
    "SGLang": "Input length (5000 tokens) exceeds the maximum allowed length (4096 tokens). Use a shorter input or "
    "enable --allow-auto-truncate.",
    "SGLang 2": "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
    "SGLang 3": "Requested token count exceeds the model's maximum context length of 4096 tokens.",
    "llama.cpp": "the request exceeds the available context size, try increasing it",
    "llama.cpp 2": "request (5000 tokens) exceeds the available context size (4096 tokens), try increasing it",
    "Ollama": "the input length exceeds the context length",
    "Ollama 2": "prompt too long; exceeded max context length by 904 tokens",
    "TGI": "Input validation error: `inputs` must have less than 1024 tokens. Given: 1500",
    "TGI 2": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 3900 `inputs` tokens "
    "and 500 `max_new_tokens`",
    "OpenAI": "Your input exceeds the context window of this model. Please adjust your input and try again.",
    "Anthropic": "prompt is too long: 210000 tokens > 200000 maximum",
    "Anthropic 2": "input length and `max_tokens` exceed context limit: 190000 + 20000 > 200000",
    "Gemini": "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576).",
    "Mistral": "Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
    "Cohere": "too many tokens: total number of tokens in the prompt cannot exceed 4081 - received 6000.",
    "TensorRT-LLM": "The sum of prompt length (5000.0), query length (0) should not exceed max_num_tokens (4096)",
    "Groq": "Please reduce the length of the messages or completion.",
}


@pytest.mark.parametrize("server", OVERFLOWS)
def test_an_overflow_is_known_in_the_words_of_many_servers(server):
    assert Refusal(400, OVERFLOWS[server]).as_failure().reason == "context_overflow"
    assert refusal_in_reply({"error": {"message": OVERFLOWS[server]}}).as_failure().reason == "context_overflow"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "Unknown parameter: 'max_tokens'"),
        (400, "temperature must be less than 2"),
        (400, "messages[0].role must be one of system, user"),
        (403, "your token has expired; the limit is exceeded"),
        (429, "Rate limit reached: tokens per minute exceeded"),
        (503, "the request queue is full: too many requests, 40 tokens"),
        (502, "upstream sent too big header while reading response: context"),
    ],
)
def test_what_is_no_overflow_is_not_taken_for_one(status, message):
    assert not Refusal(status, message).is_overflow


def test_a_rate_that_is_free_again_soon_is_no_lack_of_money():
    gemini = "You exceeded your current quota, please check your plan and billing details. Please retry in 7.2s."
    assert not Refusal(429, gemini).is_unpaid
    assert not Refusal(
        429, "Rate limit reached. Add a payment method under billing to raise it. Limit: 3 per min"
    ).is_unpaid
    assert Refusal(429, "You exceeded your current quota, please check your plan and billing details.").is_unpaid


REASONINGS = {
    "harmony": "<|channel|>analysis<|message|>a < b<|end|><|start|>assistant<|channel|>final<|message|>fine<|return|>",
    "harmony, opened before": "analysis<|message|>a < b<|end|><|start|>assistant<|channel|>final<|message|>fine",
    "harmony, json": "<|channel|>analysis<|message|>a < b<|end|><|channel|>final <|constrain|>json<|message|>fine",
    "harmony, no control tokens": "analysisWe see a < b.assistantfinalfine",
    "think": "<think>a < b</think>fine",
    "think, opened by the template": "a < b</think>\n\nfine",
    "thinking": "<thinking>a < b</thinking> fine",
    "thought": "<thought>\na < b\n</thought>\nfine",
    "seed": "<seed:think>a < b</seed:think>fine",
    "magistral": "[THINK]a < b[/THINK]fine",
    "kimi": "◁think▷a < b◁/think▷fine",
    "cohere": "<|START_THINKING|>a < b<|END_THINKING|><|START_RESPONSE|>fine<|END_RESPONSE|>",
    "sky": "<|begin_of_thought|>a < b<|end_of_thought|>\n<|begin_of_solution|>fine<|end_of_solution|>",
    "gemma": "<|channel>thought\na < b<channel|>fine",
    "reasoning": "<reasoning>a < b</reasoning>fine",
    "capitals": "<THINK>a < b</THINK>fine",
    "headed and closed": "Thinking Process:\n\n1. a < b\n</think>\nfine",
    "ollama": "Thinking...\na < b\n...done thinking.\n\nfine",
    "granite": "Here is my thought process: a < b. \n\nHere is my response: fine",
}


@pytest.mark.parametrize("name", REASONINGS)
def test_the_reasoning_is_told_from_the_answer(name, tmp_path):
    with ChatServer(lambda request, times: REASONINGS[name]) as server:
        assert ask(server, tmp_path / "cache", ["x"]) == ["fine"]


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>a < b<|end|>",
        "<|channel|>commentary<|message|>a < b",
        "analysisWe see a < b.",
        "<thought>a < b",
        "a </think> <think> b",
        "[THINK]a",
        "<analysis>a",
        "**Thinking Process:**\n1. a",
        "Here's a thinking process that leads to the suggested answer:\n\n1. a",
        "Here is my thought process: a",
        "## Reasoning process\n1. a",
    ],
)
def test_reasoning_without_an_answer_is_no_answer(text, tmp_path):
    with ChatServer(lambda request, times: text) as server:
        (failed,) = ask(server, tmp_path / "cache", ["x"], max_retries=0)
    assert isinstance(failed, RequestFailed) and failed.reason in ("truncated", "reasoning_only")


@pytest.mark.parametrize(
    "text",
    [
        "Analysis of the ledger shows 412 ships.",
        "analysis of variance",
        "The process of thinking: slow.",
        "Write <analysis> first, then close it by </analysis>.",
        "Reasoning: 4 + 4.\nVERDICT: ACCEPT",
        "Thinking of the ships, Antonio said: 412.",
    ],
)
def test_an_answer_that_looks_a_little_like_reasoning_stays(text, tmp_path):
    with ChatServer(lambda request, times: text) as server:
        assert ask(server, tmp_path / "cache", ["x"]) == [text]


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos_token", "end_turn", "stop_sequence", "COMPLETE"])
def test_known_normal_ends_are_answers(reason, tmp_path):
    with ChatServer(lambda request, times: chat_body("fine", reason)) as server:
        assert ask(server, tmp_path / "cache", ["x"]) == ["fine"]


def test_content_in_parts_is_joined(tmp_path):
    parts = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}]
    with ChatServer(lambda request, times: chat_body(parts)) as server:
        assert ask(server, tmp_path / "cache", ["x"]) == ["fine"]


def test_a_reply_that_an_earlier_version_took_for_an_answer_is_asked_for_again(tmp_path):
    with ChatServer(lambda request, times: "fine") as server:
        assert ask(server, tmp_path / "cache", ["x", "y", "z"]) == ["fine"] * 3
        cache = RequestCache(tmp_path / "cache")
        for change in ("finish_reason = 'abort'", "text = '<|channel|>analysis<|message|>hm'"):
            cache._database.execute(f"UPDATE replies SET {change} WHERE rowid = (SELECT MIN(rowid) FROM replies)")
            cache.close()
            num_asked = len(server.requests)
            assert ask(server, tmp_path / "cache", ["x", "y", "z"]) == ["fine"] * 3
            assert len(server.requests) == num_asked + 1
            cache = RequestCache(tmp_path / "cache")


def test_the_page_shows_the_table():
    lines = (ROOT / "docs" / "builder-failures.md").read_text().splitlines()
    for reason, outcome in OUTCOMES.items():
        assert (
            f"| `{reason}` | {outcome.server_did} | {outcome.then} | {outcome.retries} | {outcome.resume} |" in lines
        )
    assert sum(line.startswith("| `") for line in lines) == len(OUTCOMES)
