"""What fails in a long run: steps that are not finite, a vLLM server that is lost."""

import re
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import requests
import torch
from chat_server import ChatServer, Fault
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from dgrpo_trl import DGRPOTrainer
from dgrpo_trl.run import vllm_server
from dgrpo_trl.run.vllm_server import ServerLost, report_losses, wait_for_server


class Corrupting(DGRPOTrainer):
    """Puts a NaN into what the teacher says of one row, in some generation batches."""

    corrupt: set[int] = set()
    num_batches = 0

    def _generate_and_score_completions(self, inputs):
        rollouts = super()._generate_and_score_completions(inputs)
        self.num_batches += 1
        if self.num_batches in self.corrupt:
            if "teacher_hidden_states" in rollouts:
                rollouts["teacher_hidden_states"][2, 0, 0] = float("nan")
            else:
                rollouts["advantages"][2] = float("inf")
        return rollouts


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


class Record:
    """The weights after every step."""

    def __init__(self, trainer):
        self.steps = [weights(trainer)]
        on_step_end = trainer.callback_handler.on_step_end

        def record(*args, **kwargs):
            self.steps.append(weights(trainer))
            return on_step_end(*args, **kwargs)

        trainer.callback_handler.on_step_end = record

    def moved(self):
        pairs = zip(self.steps, self.steps[1:], strict=False)
        return [any(not torch.equal(a[name], b[name]) for name in a) for a, b in pairs]


@pytest.mark.parametrize("distills", [True, False])
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_a_step_that_is_not_finite_is_skipped_and_its_rows_are_named(
    make_trainer, saved_teacher, caplog, optim, distills
):
    options = {"teacher_model": saved_teacher} if distills else {"distill_coef": 0.0}
    trainer = make_trainer(Corrupting, max_steps=4, optim=optim, weight_decay=0.1, logging_steps=1, **options)
    trainer.corrupt = {2}
    record = Record(trainer)
    trainer.train()
    assert record.moved() == [True, False, True, True]  # Adam's momentum and the decay did not move it either
    message = next(text for text in caplog.messages if "is not finite" in text)
    term, fault = ("teacher", "divergence to the teacher") if distills else ("GRPO", "advantage")
    assert f"Step 2 on rank 0: the {term} term" in message
    assert re.search(rf"Rows: \d \({fault}\)", message) and message.count(fault) == 1
    assert "What is the number?" in message
    assert "Step 2 is skipped and the weights stay: 1 consecutive" in caplog.text


def test_training_stops_after_max_nonfinite_steps_consecutive_ones(make_trainer, saved_teacher):
    trainer = make_trainer(Corrupting, max_steps=9, teacher_model=saved_teacher, max_nonfinite_steps=2)
    trainer.corrupt = {2, 4, 5}
    record = Record(trainer)
    with pytest.raises(
        RuntimeError, match="2 consecutive optimizer steps were not finite; the last: the teacher term"
    ):
        trainer.train()
    assert trainer.state.global_step == 4 and record.moved() == [True, False, True, False]


def test_one_bad_micro_batch_skips_the_whole_step(make_trainer, saved_teacher):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_steps": 2}
    trainer = make_trainer(Corrupting, teacher_model=saved_teacher, **options)
    trainer.corrupt = {1}
    record = Record(trainer)
    trainer.train()
    assert record.moved() == [False, True]


def test_a_gradient_that_is_not_finite_is_skipped_too(make_trainer, saved_teacher):
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher)
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: gradient * (float("inf") if trainer.state.global_step == 0 else 1.0))
    record = Record(trainer)
    trainer.train()
    assert record.moved() == [False, True]


def with_scaler(trainer, scale):
    """Trains in float16 on the CPU, which Accelerate does on a GPU alone."""
    trainer.accelerator.state._mixed_precision = "fp16"
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return trainer


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_search_for_the_scale_of_fp16_is_left_to_the_scaler(make_trainer, saved_teacher, caplog, max_grad_norm):
    options = {"teacher_model": saved_teacher, "max_grad_norm": max_grad_norm, "max_steps": 12}
    trainer = with_scaler(make_trainer(DGRPOTrainer, **options), scale=2.0**22)
    record = Record(trainer)
    trainer.train()
    num_skipped = record.moved().count(False)
    assert num_skipped > 3 and record.moved()[-1]
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (22 - num_skipped)
    assert "is skipped and the weights stay" not in caplog.text


def test_a_loss_that_is_not_finite_counts_in_fp16_too(make_trainer, saved_teacher):
    trainer = with_scaler(make_trainer(Corrupting, max_steps=9, teacher_model=saved_teacher), scale=1.0)
    trainer.corrupt = {2, 3, 4}
    record = Record(trainer)
    with pytest.raises(
        RuntimeError, match="3 consecutive optimizer steps .* the teacher term .*train with `bf16: true`"
    ):
        trainer.train()
    assert record.moved() == [True, False, False]


def test_gradients_that_overflow_without_a_scale_count(make_trainer, saved_teacher):
    trainer = with_scaler(make_trainer(DGRPOTrainer, max_steps=9, teacher_model=saved_teacher), scale=4.0)
    parameter = trainer.model.model.layers[0].mlp.up_proj.weight
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RuntimeError, match="3 consecutive optimizer steps"):
        trainer.train()
    assert trainer.state.global_step == 4  # two of them lowered the scale to 1


# --- The vLLM server


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args): pass
    def reply(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())
    def do_GET(self):
        self.reply({})
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        global left
        left -= 1
        if left < 0:
            import os
            os._exit(1)  # in the middle of a request
        self.reply({"choices": []})

left = int(sys.argv[2])
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Server:
    """A server of our own that can be started, dies after some requests, and is started again."""

    def __init__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process = None

    def start(self, num_requests=10**6):
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, str(self.port), str(num_requests)])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                requests.get(f"http://127.0.0.1:{self.port}/health", timeout=10)
                return
            except requests.RequestException:
                time.sleep(0.1)
        raise AssertionError("the server did not start")

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def served(make_trainer, saved_teacher, server, monkeypatch):
    """A trainer in server mode, by TRL's own code; the parts of it that need vLLM or CUDA are counted instead."""
    monkeypatch.setattr(vllm_server, "SECONDS_BETWEEN_TRIES", 0.1)
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher, max_steps=3)
    client = VLLMClient.__new__(VLLMClient)
    client.base_url, client.session = f"http://127.0.0.1:{server.port}", requests.Session()
    calls = SimpleNamespace(init=0, sync=[])

    def generate(prompts, n, **kwargs):
        client._post(f"{client.base_url}/v1/completions", json={})
        completions = [[5 + i, 7, 2] for _ in prompts for i in range(n)]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": [[[-1.0]] * 3 for _ in completions]}

    def init_communicator(device):
        calls.init += 1

    client.generate, client.init_communicator = generate, init_communicator
    generation = VLLMGeneration.__new__(VLLMGeneration)
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0, "logprobs": 0}
    settings |= {"mode": "server", "max_completion_length": 8, "structured_outputs_regex": None}
    settings |= {"generation_kwargs": {}, "accelerator": trainer.accelerator, "vllm_client": client}
    vars(generation).update(settings)
    generation.sync_weights = lambda: calls.sync.append(trainer.state.global_step)
    trainer.use_vllm, trainer.vllm_mode, trainer.vllm_generation = True, "server", generation
    trainer.vllm_importance_sampling_correction = False
    trainer._last_loaded_step = -1
    report_losses(client)
    return trainer, calls


def test_the_run_waits_for_a_server_that_dies_while_it_generates(served, server, caplog):
    trainer, calls = served
    server.start(num_requests=1)  # and dies in the second
    restart = threading.Timer(3.0, lambda: (server.process.wait(), server.start()))
    restart.start()
    trainer.train()
    restart.join()
    assert trainer.state.global_step == 3
    assert "was lost while it generated" in caplog.text and "The run waits" in caplog.text
    assert "is back after" in caplog.text
    assert calls.init == 1 and calls.sync == [0, 1, 1, 2]  # the new server gets the student's weights again


def test_a_server_that_is_back_before_it_is_looked_for_gets_the_weights_too(served, server, caplog):
    trainer, calls = served
    server.start(num_requests=1)
    generate = trainer.vllm_generation.vllm_client.generate

    def generate_and_restart(*args, **kwargs):
        answer = generate(*args, **kwargs)
        if not isinstance(answer["prompt_ids"], list):
            server.process.wait()
            server.start()
        return answer

    trainer.vllm_generation.vllm_client.generate = generate_and_restart
    trainer.train()
    assert "was lost while it generated" in caplog.text and "The run waits" not in caplog.text
    assert calls.init == 1 and calls.sync == [0, 1, 1, 2]


def test_the_run_ends_when_the_server_stays_away(served):
    trainer, _ = served
    trainer.args.vllm_server_timeout = 0.5
    with pytest.raises(ServerLost, match="did not come back in 0 s.*resume_from_checkpoint"):
        trainer.train()


def test_an_error_of_the_request_is_no_loss_of_the_server(make_trainer, saved_teacher):
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher)
    client = VLLMClient.__new__(VLLMClient)
    with ChatServer(lambda request, times: Fault(400, b"too long")) as server:
        client.base_url, client.session = server.url, requests.Session()
        client.generate = lambda: client._post(f"{client.base_url}/v1/completions", json={})
        report_losses(client)
        with pytest.raises(Exception, match="Request failed: 400, too long"):
            client.generate()
        server.reply = lambda request, times: Fault(503)
        with pytest.raises(ServerLost, match="503"):
            list(client.generate()["prompt_ids"])
    client.base_url = "http://127.0.0.1:9"
    with pytest.raises(ServerLost, match="did not come back"):
        wait_for_server(client, trainer.accelerator, 0.0)


# --- A teacher that waits elsewhere


def test_offloading_changes_no_loss(make_trainer, saved_teacher):
    losses = []
    for offload in (None, "cpu"):
        trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher, teacher_offload=offload)
        trainer.train()
        losses.append([entry.get("loss") for entry in trainer.state.log_history])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_stays_where_the_loss_needs_it(make_trainer, make_model, tied):
    teacher = make_model(seed=1, tie_word_embeddings=tied)
    trainer = make_trainer(DGRPOTrainer, teacher_model=teacher)
    stays = {name for name, _ in teacher.named_parameters()} - set(trainer.teacher._movable())
    assert stays == {"model.embed_tokens.weight" if tied else "lm_head.weight"}


def test_what_cannot_be_moved_is_refused(make_trainer, saved_teacher, make_model):
    teacher = make_model(seed=1)
    teacher.is_quantized = True
    with pytest.raises(NotImplementedError, match="the teacher is quantized"):
        make_trainer(DGRPOTrainer, teacher_model=teacher, teacher_offload="cpu")
    with pytest.raises(ValueError, match="`teacher_offload` is 'disk'"):
        make_trainer(DGRPOTrainer, teacher_model=saved_teacher, teacher_offload="disk")
    with pytest.raises(ValueError, match="`max_nonfinite_steps` must be at least 1"):
        make_trainer(DGRPOTrainer, teacher_model=saved_teacher, max_nonfinite_steps=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_weights_leave_it(make_trainer, saved_teacher):
    trainer = make_trainer(DGRPOTrainer, teacher_model=saved_teacher, teacher_offload="cpu", use_cpu=False)
    trainer.train()
    devices = {name: parameter.device.type for name, parameter in trainer.teacher.model.named_parameters()}
    assert devices.pop("lm_head.weight") == "cuda" and set(devices.values()) == {"cpu"}
