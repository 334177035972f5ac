"""Requests to a real HTTP server that misbehaves on schedule: what is retried, what fails, what is paid once."""

import asyncio
import json
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
from chat_server import FAULTS, ChatServer, Fault, chat_body

from dgrpo_trl.llm import (
    ChatClient,
    Completion,
    RequestCache,
    RequestFailed,
    ServerConfig,
    ServerRefused,
    ServerUnavailable,
)


HELLO = [{"role": "user", "content": "hello"}]
FAST = {"backoff_seconds": 0.001, "max_backoff_seconds": 0.01, "timeout_seconds": 5, "max_outage_seconds": 20}


def messages(text):
    return [{"role": "user", "content": str(text)}]


def make_client(server_or_url, path, **options):
    url = server_or_url if isinstance(server_or_url, str) else server_or_url.url
    config = ServerConfig(**{"base_url": url, "model": "m", **FAST, **options})
    return ChatClient(config, RequestCache(path))


def only_hello(fault):
    """A server that does this to one request, and answers all others."""
    return lambda request, times: fault if request["messages"] == HELLO else "fine"


def ask(client, prompts=(HELLO,), **options):
    """Replies to all prompts at once, or the errors; and the client's counts."""

    async def run():
        async with client:
            return await asyncio.gather(
                *(client.complete(prompt, **{"max_tokens": 16, **options}) for prompt in prompts),
                return_exceptions=True,
            )

    return asyncio.run(run())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_retried(fault, tmp_path):
    with ChatServer(lambda request, times: FAULTS[fault] if times == 0 else "fine") as server:
        client = make_client(server, tmp_path / "cache")
        (completion,) = ask(client)
    assert completion == Completion("fine", None, "stop", "m")
    assert client.stats.num_sent == 2 and client.stats.retries.total() == 1


@pytest.mark.parametrize(
    ("fault", "reason", "num_sent"),
    [
        (FAULTS["server_error"], "server_error", 4),
        (Fault(408), "server_error", 4),
        (FAULTS["closed"], "connection_closed", 4),
        (Fault(seconds=0.5), "timeout", 4),
        (Fault(200, chat_body("fine"), seconds_per_byte=0.01), "timeout", 4),  # each byte in time, the reply too late
        (FAULTS["not_json"], "malformed_reply", 3),
        (FAULTS["html"], "malformed_reply", 3),
        (FAULTS["garbage"], "malformed_reply", 3),
        (Fault(200, b"null"), "malformed_reply", 3),
        (Fault(200, b"[]"), "malformed_reply", 3),
        (Fault(200, b"{}"), "empty_reply", 3),
        (Fault(200, b'{"choices": null}'), "empty_reply", 3),
        (Fault(200, b'{"choices": [{}]}'), "malformed_reply", 3),
        (Fault(200, chat_body(None, tool_calls=[{"id": "1"}])), "malformed_reply", 3),
        (Fault(200, chat_body(["a"])), "malformed_reply", 3),
        (FAULTS["no_choices"], "empty_reply", 3),
        (FAULTS["no_text"], "empty_reply", 3),
        (Fault(200, chat_body("<think>so</think>  ")), "reasoning_only", 3),
        (FAULTS["truncated"], "truncated", 3),
        (FAULTS["thinks_on"], "truncated", 3),
        (Fault(200, chat_body("<think>One.</think>\n<think>Two.\nfine")), "truncated", 3),
        (Fault(200, chat_body(None, refusal="no")), "refused_content", 1),
        (Fault(200, chat_body("", "content_filter")), "refused_content", 1),
        (Fault(400, b'{"error": {"message": "maximum context length is 8"}}'), "context_overflow", 2),
        (Fault(422, b'{"error": {"message": "what?"}}'), "bad_request", 2),
    ],
)
def test_a_fault_that_stays_fails_by_name_after_its_retries(fault, reason, num_sent, tmp_path):
    with ChatServer(only_hello(fault)) as server:
        client = make_client(
            server, tmp_path / "cache", max_retries=3, timeout_seconds=0.2 if reason == "timeout" else 5
        )
        (error,) = ask(client)
    assert isinstance(error, RequestFailed) and error.reason == reason
    assert client.stats.num_sent == num_sent


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_all_requests_ends_the_run(status, tmp_path):
    with ChatServer(lambda request, times: Fault(status)) as server:
        (error,) = ask(make_client(server, tmp_path / "cache", api_key_env="MY_KEY"))
    assert isinstance(error, ServerRefused)
    assert "MY_KEY" in str(error) and "'m'" in str(error) and str(status) in str(error)


def test_one_request_that_is_refused_is_skipped_and_one_that_all_share_ends_the_run(tmp_path):
    """Whichever comes first: a plain request tells them apart."""

    def reply(request, times):
        is_refused = "<script>" in request["messages"][0]["content"] or "wrong" in request
        return Fault(403, b"<html>Blocked by the firewall</html>") if is_refused else "fine"

    prompts = [messages(f"{n} {'<script>' * (n < 20)}") for n in range(24)]
    with ChatServer(reply) as server:
        results = ask(make_client(server, tmp_path / "a", max_concurrency=4), prompts)
        assert [result.reason for result in results[:20]] == ["bad_request"] * 20
        assert {result.text for result in results[20:]} == {"fine"}
        num_sent = len(server.requests)
        results = ask(make_client(server, tmp_path / "b", extra_body={"wrong": 1}, max_concurrency=4), prompts)
        assert {type(result) for result in results} == {ServerRefused} and len(server.requests) - num_sent <= 8
        assert "extra_body" in str(results[0]) and "403" in str(results[0])


def test_the_reasoning_is_kept_apart(tmp_path):
    bodies = {
        "both tags": chat_body("<think>a < b</think>\nfine"),
        "one tag": chat_body("a < b</think>fine"),
        "own field": chat_body("fine", reasoning_content="a < b"),
        "newer field": chat_body("fine", reasoning="a < b"),
    }
    with ChatServer(lambda request, times: bodies[request["messages"][0]["content"]]) as server:
        completions = ask(make_client(server, tmp_path / "cache"), [messages(name) for name in bodies])
    assert {(c.text, c.thinking) for c in completions} == {("fine", "a < b")}


def test_a_finished_request_is_never_sent_again(tmp_path):
    with ChatServer(lambda request, times: f"reply {request['messages'][0]['content']}") as server:
        prompts = [messages(n % 5) for n in range(20)]  # equal ones in flight at once are one
        first = ask(make_client(server, tmp_path / "cache"), prompts)
        client = make_client(server, tmp_path / "cache")
        again = ask(client, prompts)
        assert len(server.requests) == 5
    assert first == again and client.stats.num_sent == 0


def test_a_reply_that_cannot_be_used_is_paid_for_once(tmp_path):
    """Killed after some bad replies, a run resumes their count."""
    bad = {
        "truncated": FAULTS["truncated"],
        "empty_reply": FAULTS["no_text"],
        "refused_content": Fault(200, chat_body(None, refusal="no")),
    }

    def reply(request, times):
        return bad.get(request["messages"][0]["content"], "fine")

    async def ask_until_the_second_is_sent(client):
        async with client:
            task = asyncio.ensure_future(client.complete(messages("truncated"), max_tokens=16))
            while len(server.requests) < 2:
                await asyncio.sleep(0.001)
            task.cancel()

    with ChatServer(reply) as server:
        asyncio.run(ask_until_the_second_is_sent(make_client(server, tmp_path / "cache", backoff_seconds=0.2)))
        assert len(server.requests) == 2
        errors = ask(make_client(server, tmp_path / "cache"), [messages(reason) for reason in bad])
        assert [error.reason for error in errors] == list(bad)
        # The second may have come or not when its client was closed
        num_sent = Counter(request["messages"][0]["content"] for request in server.requests)
        assert num_sent["truncated"] in (3, 4) and (num_sent["empty_reply"], num_sent["refused_content"]) == (3, 1)
        client = make_client(server, tmp_path / "cache")
        again = ask(client, [messages(reason) for reason in bad])
        assert client.stats.num_sent == 0 and [str(error) for error in again] == [str(error) for error in errors]
        cache = RequestCache(tmp_path / "other", [tmp_path / "cache"])
        config = ServerConfig(base_url=server.url, model="m", **FAST)
        assert [str(error) for error in ask(ChatClient(config, cache), [messages("truncated")])] == [str(errors[0])]
        cache = RequestCache(tmp_path / "cache")
        cache.forget_failures(["truncated"])
        cache.close()
        del bad["truncated"], bad["empty_reply"]
        fine, empty = ask(make_client(server, tmp_path / "cache"), [messages("truncated"), messages("empty_reply")])
        assert fine.text == "fine" and empty.reason == "empty_reply"


def test_a_cancelled_call_leaves_the_shared_request_to_the_others(tmp_path):
    async def cancel_the_first():
        async with make_client(server, tmp_path / "cache") as client:
            first, second = (asyncio.ensure_future(client.complete(HELLO, max_tokens=8)) for _ in range(2))
            await asyncio.sleep(0.05)
            first.cancel()
            return await second

    with ChatServer(lambda request, times: Fault(200, chat_body("fine"), seconds=0.2)) as server:
        assert asyncio.run(cancel_the_first()).text == "fine"
        assert len(server.requests) == 1


def test_without_a_file_replies_are_kept_in_memory():
    async def ask_twice():
        async with ChatClient(ServerConfig(base_url=server.url, model="m"), RequestCache()) as client:
            return [await client.complete(HELLO, max_tokens=8) for _ in range(2)]

    with ChatServer(lambda request, times: "fine") as server:
        assert [completion.text for completion in asyncio.run(ask_twice())] == ["fine"] * 2
        assert len(server.requests) == 1


def test_what_is_not_configured_is_left_to_the_server(tmp_path):
    with ChatServer(lambda request, times: "fine") as server:
        ask(make_client(server, tmp_path / "cache"))
        assert set(server.requests[0]) == {"messages", "model", "max_tokens"}


def test_a_request_that_waits_for_its_retry_holds_no_slot(tmp_path):
    def reply(request, times):
        return Fault(500) if times == 0 and request["messages"][0]["content"] == "0" else "fine"

    with ChatServer(reply) as server:
        client = make_client(
            server, tmp_path / "cache", max_concurrency=1, backoff_seconds=1, max_backoff_seconds=1, timeout_seconds=5
        )
        ask(client, [messages(n) for n in range(3)])
    assert server.times[2] - server.times[0] < 0.5 <= server.times[3] - server.times[0]


def test_the_wait_that_the_server_asks_for_is_kept(tmp_path):
    def reply(request, times):
        return Fault(429, headers=(("Retry-After", "0.3"),)) if times == 0 else "fine"

    with ChatServer(reply) as server:
        ask(make_client(server, tmp_path / "cache", max_backoff_seconds=1))
    assert server.times[1] - server.times[0] >= 0.3


def test_what_decides_a_reply_is_part_of_the_key_and_the_address_is_not(tmp_path):
    with ChatServer(lambda request, times: "one") as server, ChatServer(lambda request, times: "two") as other:
        ask(make_client(server, tmp_path / "cache"))
        assert ask(make_client(other, tmp_path / "cache"))[0].text == "one"
        for change in ({"temperature": 0.5}, {"model": "n"}, {"seed": 1}, {"extra_body": {"top_k": 3}}):
            assert ask(make_client(other, tmp_path / "cache", **change))[0].text == "two", change
        for change in ({"sample": 1}, {"max_tokens": 17}, {"schema": {"type": "object"}}):
            assert ask(make_client(other, tmp_path / "cache"), **change)[0].text == "two", change


def test_a_reply_that_an_earlier_version_kept_is_found(tmp_path):
    """The key and the table are part of the format: with another, builds would pay for all replies again."""
    database = sqlite3.connect(tmp_path / "cache")
    database.execute(
        "CREATE TABLE replies (key TEXT PRIMARY KEY, text TEXT NOT NULL, thinking TEXT, finish_reason TEXT NOT NULL, "
        "model TEXT NOT NULL, prompt_tokens INTEGER, completion_tokens INTEGER, unix_seconds REAL NOT NULL)"
    )
    key = "d63ab225e7b07b55d19ca5daf53e9f2c5474a74c8ad9eb1fb5f5a723ae159162"
    database.execute("INSERT INTO replies VALUES (?, 'fine', NULL, 'stop', 'm', 3, 2, 0.5)", (key,))
    database.commit()
    database.close()
    client = make_client("http://127.0.0.1:9/v1", tmp_path / "cache", temperature=0.5, seed=1, extra_body={"top_k": 3})
    assert ask(client, sample=2) == [Completion("fine", None, "stop", "m")]


def test_replies_in_the_files_of_other_processes_are_found(tmp_path):
    with ChatServer(lambda request, times: "one") as server:
        ask(make_client(server, tmp_path / "first"))
        config = ServerConfig(base_url=server.url, model="m")
        (completion,) = ask(ChatClient(config, RequestCache(tmp_path / "second", [tmp_path / "first"])))
        assert completion.text == "one" and len(server.requests) == 1


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "cache").write_bytes(b"not a database, but long enough to be looked at" * 30)
    with pytest.raises(ValueError, match="cache of requests .*cannot be opened.*Restore it"):
        RequestCache(tmp_path / "cache")


def test_no_more_requests_are_in_flight_than_allowed(tmp_path):
    with ChatServer(lambda request, times: Fault(200, chat_body("fine"), seconds=0.02)) as server:
        ask(make_client(server, tmp_path / "cache", max_concurrency=5), [messages(n) for n in range(40)])
        assert server.max_active == 5


def test_fewer_requests_are_in_flight_after_status_429(tmp_path):
    num_active = []

    def reply(request, times):
        if times == 0:
            return Fault(429, seconds=0.2)
        num_active.append(server.num_active)
        return Fault(200, chat_body("fine"), seconds=0.05)

    with ChatServer(reply) as server:
        client = make_client(server, tmp_path / "cache", max_concurrency=16)
        assert {c.text for c in ask(client, [messages(n) for n in range(16)])} == {"fine"}
        assert server.max_active == 16 and 1 < max(num_active) < 16


def test_requests_a_minute_are_limited(tmp_path):
    with ChatServer(lambda request, times: "fine") as server:
        started = time.monotonic()
        ask(make_client(server, tmp_path / "cache", requests_per_minute=1200), [messages(n) for n in range(5)])
        assert time.monotonic() - started >= 4 * 60 / 1200


def test_a_prompt_that_does_not_fit_is_not_sent(tmp_path):
    with ChatServer(lambda request, times: "fine") as server:
        client = make_client(server, tmp_path / "cache", max_model_tokens=100)
        fits, too_long = ask(client, [messages("x" * 40), messages("x" * 60)])
        assert fits.text == "fine"
        assert too_long.reason == "context_overflow" and "of 100" in too_long.detail
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("mode", "key"), [("json_schema", "response_format"), ("vllm", "structured_outputs"), ("none", None)]
)
def test_a_schema_goes_to_the_server_in_its_form(mode, key, tmp_path):
    with ChatServer(lambda request, times: "fine") as server:
        ask(make_client(server, tmp_path / "cache", structured_output=mode), schema={"type": "object"})
        sent = {"response_format", "structured_outputs"} & set(server.requests[0])
    assert sent == ({key} if key else set())


def test_a_server_without_schemas_is_asked_without(tmp_path):
    def reply(request, times):
        refusal = Fault(400, b'{"error": {"message": "response_format is not supported"}}')
        return refusal if "response_format" in request else "fine"

    with ChatServer(reply) as server:
        client = make_client(server, tmp_path / "cache", structured_output="auto", max_concurrency=1)
        completions = ask(client, [messages(n) for n in range(4)], schema={"type": "object"})
        assert [c.text for c in completions] == ["fine"] * 4
        assert sum("response_format" in request for request in server.requests) == 1


def test_a_server_that_comes_back_is_waited_for(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = ChatServer.__new__(ChatServer)

    def start_late():
        time.sleep(0.3)
        ChatServer.__init__(server, lambda request, times: "fine", port)
        server.__enter__()

    thread = threading.Thread(target=start_late)
    thread.start()
    (completion,) = ask(make_client(f"http://127.0.0.1:{port}/v1", tmp_path / "cache"))
    thread.join()
    server.__exit__()
    assert completion.text == "fine"


def test_a_server_that_stays_unreachable_ends_the_run(tmp_path):
    (error,) = ask(make_client("http://127.0.0.1:9/v1", tmp_path / "cache", max_outage_seconds=0.1))
    assert isinstance(error, ServerUnavailable) and "answered no request" in str(error) and "kept" in str(error)


def test_the_key_goes_to_the_server_and_nowhere_else(tmp_path, monkeypatch):
    with ChatServer(lambda request, times: "fine") as server:
        ask(make_client(server, tmp_path / "other", api_key_env="MY_KEY"))
        monkeypatch.setenv("MY_KEY", "a-secret")
        client = make_client(server, tmp_path / "cache", api_key_env="MY_KEY")
        ask(client)
        assert [headers["authorization"] for headers in server.headers] == ["Bearer EMPTY", "Bearer a-secret"]
    assert "a-secret" not in client.config.model_dump_json()
    assert all(b"a-secret" not in path.read_bytes() for path in tmp_path.iterdir())


CRASHING = """
import asyncio, sys
from dgrpo_trl.llm import ChatClient, RequestCache, ServerConfig
async def main(url, path):
    async with ChatClient(ServerConfig(base_url=url, model="m", max_concurrency=8), RequestCache(path)) as client:
        async def one(n):
            await client.complete([{"role": "user", "content": str(n)}], max_tokens=8)
            print(n, flush=True)
        await asyncio.gather(*(one(n) for n in range(300)))
from pathlib import Path
asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
"""


def test_text_that_is_no_unicode_does_not_stop_the_run(tmp_path):
    body = json.dumps({"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "a \ud800 b"}}]})
    with ChatServer(lambda request, times: Fault(200, body.encode())) as server:
        (completion,) = ask(make_client(server, tmp_path / "cache"))
    assert completion.text == "a ? b"
    with ChatServer(lambda request, times: chat_body("a \ud800 b", "length")) as server:
        (error,) = ask(make_client(server, tmp_path / "other"))
    assert error.reason == "truncated" and error.detail.endswith("a \ud800 b")


@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_server_that_rejects_all_requests_for_a_while_loses_none(status, tmp_path):
    with ChatServer(lambda request, times: Fault(status) if time.monotonic() < end else "fine") as server:
        end = time.monotonic() + 0.5
        client = make_client(server, tmp_path / "cache", max_retries=2)
        completions = ask(client, [messages(n) for n in range(20)])
    assert {completion.text for completion in completions} == {"fine"}


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_rejects_all_requests_for_too_long_ends_the_run(status, tmp_path):
    with ChatServer(lambda request, times: Fault(status)) as server:
        (error,) = ask(make_client(server, tmp_path / "cache", max_outage_seconds=0.2))
    assert isinstance(error, ServerUnavailable) and str(status) in str(error)


@pytest.mark.parametrize("max_concurrency", [1, 4])
def test_one_request_that_is_rejected_while_others_are_answered_fails_by_name(max_concurrency, tmp_path):
    def reply(request, times):
        return Fault(429) if request["messages"][0]["content"] == "large" else "fine"

    prompts = [messages("large"), *(messages(n) for n in range(30))]
    with ChatServer(reply) as server:
        client = make_client(
            server, tmp_path / "cache", max_retries=1, max_concurrency=max_concurrency, max_outage_seconds=1
        )
        error, *completions = ask(client, prompts)
    assert isinstance(error, RequestFailed) and error.reason == "rate_limited"
    assert {type(completion) for completion in completions} == {Completion}


def test_a_limited_rate_costs_time_and_no_request(tmp_path):
    free_at = 0.0

    def reply(request, times):
        nonlocal free_at
        now = time.monotonic()
        if now < free_at:
            return Fault(429, headers=(("Retry-After", f"{free_at - now + 0.001:.3f}"),))
        free_at = now + 0.02
        return "fine"

    with ChatServer(reply) as server:
        client = make_client(server, tmp_path / "cache", max_concurrency=16)
        completions = ask(client, [messages(n) for n in range(40)])
    assert {type(completion) for completion in completions} == {Completion}


def test_time_without_requests_is_no_outage(tmp_path):
    client = make_client("http://127.0.0.1:9/v1", tmp_path / "cache", max_outage_seconds=0.3)

    async def run():
        async with client:
            await asyncio.sleep(0.4)
            await client.complete(HELLO, max_tokens=8)

    with pytest.raises(ServerUnavailable):
        asyncio.run(run())
    assert client.stats.num_sent > 2


def test_the_back_off_grows_during_an_outage(tmp_path):
    client = make_client(
        "http://127.0.0.1:9/v1", tmp_path / "cache", max_outage_seconds=1, backoff_seconds=0.02, max_backoff_seconds=9
    )
    ask(client)
    assert client.stats.num_sent < 12


@pytest.mark.parametrize(
    ("status", "message", "reason"),
    [
        (403, "Your input was flagged", "refused_content"),
        (400, "blocked by the content_filter", "refused_content"),
        (429, "Request too large for m", "context_overflow"),
        (400, "the request exceeds the available context size", "context_overflow"),
    ],
)
def test_the_words_of_a_server_tell_what_is_wrong_with_one_request(status, message, reason, tmp_path):
    body = json.dumps({"error": {"message": message}}).encode()
    with ChatServer(only_hello(Fault(status, body))) as server:
        (error,) = ask(make_client(server, tmp_path / "cache"))
    assert isinstance(error, RequestFailed) and error.reason == reason


def test_a_quota_that_is_used_up_ends_the_run(tmp_path):
    body = b'{"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}'
    with ChatServer(lambda request, times: Fault(429, body)) as server:
        (error,) = ask(make_client(server, tmp_path / "cache"))
    assert isinstance(error, ServerRefused) and "quota" in str(error)


def test_a_key_that_the_server_repeats_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "a-secret")
    body = b'{"error": {"message": "Incorrect API key: a-secret"}}'
    with ChatServer(lambda request, times: Fault(401, body)) as server:
        (error,) = ask(make_client(server, tmp_path / "cache", api_key_env="MY_KEY"))
    assert "a-secret" not in str(error) and "MY_KEY is set" in str(error)


def test_a_prompt_or_a_reasoning_that_is_no_unicode_does_not_stop_the_run(tmp_path):
    with ChatServer(lambda request, times: chat_body("fine", reasoning="a \ud800 b")) as server:
        (completion,) = ask(make_client(server, tmp_path / "cache"), [messages("a \ud800 b")])
        assert server.requests[0]["messages"][0]["content"] == "a ? b"
    assert completion.thinking == "a ? b"


def test_a_tag_in_an_answer_whose_reasoning_came_apart_is_part_of_it(tmp_path):
    with ChatServer(lambda request, times: chat_body("Write </think> to end it.", reasoning="so")) as server:
        (completion,) = ask(make_client(server, tmp_path / "cache"))
    assert completion == Completion("Write </think> to end it.", "so", "stop", "m")


def test_a_reply_that_was_cut_is_not_drawn_again_at_temperature_0(tmp_path):
    with ChatServer(lambda request, times: FAULTS["truncated"]) as server:
        (error,) = ask(make_client(server, tmp_path / "cache", temperature=0))
        assert error.reason == "truncated" and len(server.requests) == 1


def test_json_that_is_nested_too_deep_is_a_malformed_reply(tmp_path):
    with ChatServer(lambda request, times: b"[" * 200_000) as server:
        (error,) = ask(make_client(server, tmp_path / "cache"))
    assert error.reason == "malformed_reply"


def test_an_address_without_a_scheme_is_refused():
    with pytest.raises(ValueError, match="base_url"):
        ServerConfig(base_url="localhost:8000/v1", model="m")


def test_the_longest_reply_goes_by_the_name_that_the_server_takes(tmp_path):
    with ChatServer(lambda request, times: "fine") as server:
        ask(make_client(server, tmp_path / "cache", max_tokens_key="max_completion_tokens"))
        assert server.requests[0]["max_completion_tokens"] == 16 and "max_tokens" not in server.requests[0]


def test_how_a_reply_was_held_to_its_schema_is_part_of_the_key(tmp_path):
    with ChatServer(lambda request, times: "fine") as server:
        for mode in ("json_schema", "none", "none"):
            ask(make_client(server, tmp_path / "cache", structured_output=mode), schema={"type": "object"})
        assert len(server.requests) == 2


def test_files_of_other_processes_that_cannot_be_read_are_left_out(tmp_path, caplog):
    (tmp_path / "corrupt").write_bytes(b"x" * 5000)
    sqlite3.connect(tmp_path / "just made").execute("PRAGMA journal_mode=WAL")
    others = [tmp_path / name for name in ("corrupt", "just made", "gone")]
    with ChatServer(lambda request, times: "fine") as server:
        config = ServerConfig(base_url=server.url, model="m")
        assert ask(ChatClient(config, RequestCache(tmp_path / "cache", others)))[0].text == "fine"
    assert [str(path) in caplog.text for path in others] == [True] * 3


def test_a_lock_of_another_process_is_waited_for_and_holds_nothing_up(tmp_path):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def run():
        async with make_client(server, tmp_path / "cache") as client:
            other = sqlite3.connect(tmp_path / "cache", isolation_level=None)
            other.execute("BEGIN IMMEDIATE")
            asyncio.get_running_loop().call_later(0.5, other.execute, "COMMIT")
            ticking = asyncio.ensure_future(tick())
            completion = await client.complete(HELLO, max_tokens=8)
            ticking.cancel()
            return completion

    with ChatServer(lambda request, times: "fine") as server:
        assert asyncio.run(run()).text == "fine"
    assert ticks > 10


def test_a_reply_that_cannot_be_written_ends_the_run_with_the_reason(tmp_path):
    async def run():
        async with make_client(server, tmp_path / "cache") as client:
            other = sqlite3.connect(tmp_path / "cache", isolation_level=None)
            other.execute("DROP TABLE replies")
            other.execute("CREATE TABLE replies (key, text, thinking, finish_reason, model)")
            await client.complete(HELLO, max_tokens=8)

    with ChatServer(lambda request, times: "fine") as server:
        with pytest.raises(RuntimeError, match="cannot be written.*run again"):
            asyncio.run(run())


def test_killed_at_any_moment_and_shared_by_processes_the_file_holds_every_reply_that_was_seen(tmp_path):
    path, seen = tmp_path / "cache", set()
    with ChatServer(lambda request, times: Fault(200, chat_body("fine"), seconds=0.01)) as server:
        command = [sys.executable, "-c", CRASHING, server.url, str(path)]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        for process, num_seen in zip(processes, (2, 60, 31), strict=True):
            seen |= {process.stdout.readline().strip() for _ in range(num_seen)}
            process.kill()
            seen |= {line.strip() for line in process.stdout.readlines() if line.endswith("\n")}
            process.wait()
        client = make_client(server, path)
        ask(client, [messages(n) for n in seen - {""}], max_tokens=8)
    assert len(seen) >= 60 and client.stats.num_sent == 0
