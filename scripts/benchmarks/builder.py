"""Speed of the LongBlocks builder: its own work with questions made by rule, and what it adds to a server's time.

    python scripts/benchmarks/builder.py [--documents 256] [--requests 2000] [--repeats 3]

Rule engine: the whole build from Python's standard library, documents and rows a second, with the time of each stage.

Requests: the stage `questions` with the engine `llm`, against a server in another process that answers each request
after 50 ms, 64 in flight; and the same number of requests of the same size, sent by the same client library with
nothing around it. They take turns; the overhead is the ratio of their medians less one. The ideal is the time that
the server alone would need.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import openai
import yaml

from dgrpo_trl.llm import Completion, ServerConfig
from dgrpo_trl.longblocks import STAGES, Builder, load_config, split_blocks
from dgrpo_trl.longblocks.questions.blocks import BlocksConfig, link_blocks
from dgrpo_trl.longblocks.questions.llm_engine import LLMEngine, LLMEngineConfig
from dgrpo_trl.longblocks.records import Document


LATENCY_SECONDS = 0.05
IN_FLIGHT = 64
REPLY = json.dumps({"question": "What does the first part define?", "answer": "A function.", "evidence": ["B1", "B2"]})


def serve(connection) -> None:
    """An HTTP server that does nothing but wait and answer; it sends its port through the pipe."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": REPLY}}
    completion = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    body = json.dumps(completion).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                headers = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(headers.split(b"content-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(length)
                await asyncio.sleep(LATENCY_SECONDS)
                writer.write(head + body)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=2**22, backlog=256)
        connection.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def write_config(folder: Path, **sections) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "benchmark", **sections}), encoding="utf-8")
    return path


def measure_rule(num_documents: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        config = load_config(
            write_config(
                Path(name),
                sources=[{"type": "stdlib", "max_documents": num_documents}],
                questions={"engine": "rule", "lengths": [2048], "rows_per_document": 4},
            )
        )
        builder = Builder(config, Path(name))
        seconds = {}
        for stage in STAGES:
            started = time.perf_counter()
            summary = builder.run([stage])
            seconds[stage] = time.perf_counter() - started
    num_rows, total = summary["stages"]["mixing"]["kept"], sum(seconds.values())
    print(f"Rule engine: {num_documents} files, {num_rows} rows of up to 2,048 tokens in {total:.1f} s: ", end="")
    print(f"{num_documents / total:.1f} documents and {num_rows / total:.1f} rows a second")
    print("  " + ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items()))


async def send_bare(url: str, requests: list[list[dict]], max_tokens: int) -> float:
    """Seconds that the client library alone needs."""
    slots = asyncio.Semaphore(IN_FLIGHT)
    async with openai.AsyncOpenAI(base_url=url, api_key="EMPTY", max_retries=0) as client:

        async def send(messages: list[dict]) -> None:
            async with slots:
                await client.chat.completions.create(model="m", messages=messages, max_tokens=max_tokens)

        started = time.perf_counter()
        await asyncio.gather(*map(send, requests))
        return time.perf_counter() - started


class Recorder:
    """Takes the place of a client to see what the engine asks."""

    def __init__(self):
        self.requests: list[list[dict]] = []
        self.config = ServerConfig(base_url="http://unused", model="m")

    async def complete(self, messages: list[dict], *, max_tokens: int, **options) -> Completion:
        self.requests.append(messages)
        return Completion(REPLY, None, "stop", "m")


async def questions_on(texts: list[str], config: LLMEngineConfig) -> list[list[dict]]:
    """What the builder sends for these documents."""
    recorder = Recorder()
    engine = LLMEngine(config, recorder)
    for text in texts:
        document = Document(text=text, source="made", source_id="0", language="en")
        blocks = split_blocks(text, "text", BlocksConfig())
        await engine.rows(document, blocks, link_blocks(blocks, BlocksConfig()))
    return recorder.requests


def measure_requests(num_requests: int, repeats: int) -> None:
    receiver, sender = multiprocessing.Pipe(duplex=False)
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(sender,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{receiver.recv()}/v1"
    bare, ours = [], []
    body = "\n\n".join(f"Paragraph {n} tells of the things that came after the others." for n in range(40))
    for repeat in range(repeats + 1):  # the first warms up
        texts = [f"Document {repeat}-{n}.\n\n{body}" for n in range(num_requests)]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            sections = {
                "sources": [
                    {"type": "jsonl", "name": "made", "paths": [str(folder / "documents.jsonl")], "language": "en"}
                ],
                "cleaning": {"min_tokens": 1},
                "deduplication": {"enabled": False},
                "servers": {"writer": {"base_url": url, "model": "m", "max_concurrency": IN_FLIGHT}},
                "questions": {"engine": "llm", "server": "writer", "questions_per_document": 1},
            }
            builder = Builder(load_config(write_config(folder, **sections)), folder)
            builder.run(["sources", "deduplication", "blocks"])
            started = time.perf_counter()
            summary = builder.run(["questions"])
            seconds = time.perf_counter() - started
            assert summary["stages"]["questions"]["kept"] > 0.9 * num_requests, summary
            requests = asyncio.run(questions_on(texts, builder.config.questions))
        alone = asyncio.run(send_bare(url, requests, builder.config.questions.max_tokens))
        if repeat > 0:
            ours.append(seconds)
            bare.append(alone)
            print(f"  ours {seconds:.2f} s, bare {alone:.2f} s", flush=True)
    server.terminate()
    ideal = num_requests / IN_FLIGHT * LATENCY_SECONDS
    ours, bare = statistics.median(ours), statistics.median(bare)
    print(f"Requests: {num_requests} in {ours:.2f} s, {num_requests / ours:.0f} a second; bare {bare:.2f} s; ", end="")
    print(f"overhead {ours / bare - 1:+.1%}; the server alone would need {ideal:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=256)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    measure_rule(args.documents)
    measure_requests(args.requests, args.repeats)


if __name__ == "__main__":
    main()
