"""A vLLM server that becomes unreachable and comes back: the run waits for it.

The main process alone asks for generations, and the others wait for its answer: an error there would leave them
waiting for ever. So a lost server travels to all of them as the answer, and each raises [`ServerLost`] when it reads
that.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import requests
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from trl import GRPOTrainer

from ..trl_compat import forget_loaded_weights


logger = get_logger(__name__)

SECONDS_BETWEEN_TRIES = 2.0
_SECONDS_BETWEEN_MESSAGES = 30.0

_Generated = TypeVar("_Generated")


class ServerLost(RuntimeError):
    """The vLLM server is unreachable, or stopping or starting."""


class _Lost:
    """Stands for an answer that did not come; reading it raises the reason."""

    def __init__(self, reason: str):
        self.reason = reason

    def __iter__(self) -> NoReturn:
        raise ServerLost(self.reason)


class ServerOutages(GRPOTrainer):
    """Waits for a server that is unreachable, and generates when it is back. A base of the trainer."""

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> tuple:
        generate: Callable[[], tuple] = functools.partial(super()._generate_single_turn, prompt_ids, *args, **kwargs)
        if not (self.use_vllm and self.vllm_mode == "server"):
            return generate()
        return generate_through_outages(
            generate,
            getattr(self.vllm_generation, "vllm_client", None),  # of the main process alone
            self.accelerator,
            self.args.vllm_server_timeout,
            functools.partial(forget_loaded_weights, self),
        )


def report_losses(client: Any) -> None:
    """Lets `client.generate` answer with a loss where the server does not answer, instead of raising."""
    generate: Callable[..., dict] = client.generate

    def generate_or_report(*args: Any, **kwargs: Any) -> dict:
        try:
            return generate(*args, **kwargs)
        except requests.RequestException as error:
            reason = str(error)
        except Exception as error:  # what the client raises for any status but 200
            if not str(error).startswith("Request failed: 5"):
                raise
            reason = str(error)
        return dict.fromkeys(("prompt_ids", "completion_ids", "logprobs"), _Lost(reason))

    client.generate = generate_or_report


def is_up(client: Any) -> bool:
    """Whether the server says that it is healthy."""
    try:
        return requests.get(f"{client.base_url}/health", timeout=10).status_code == 200
    except requests.RequestException:
        return False


def wait_for_server(client: Any | None, accelerator: Accelerator, limit_seconds: float) -> bool:
    """Waits until the server is up, with messages. A collective call; only the main rank has a client.

    Returns whether the server was unreachable: it may have restarted, with the weights that it read from disk. Raises
    [`ServerLost`] on all ranks if it does not come up in `limit_seconds`.
    """
    outcome: list[str | bool] = [False]
    if client is not None and not is_up(client):
        start = last_logged = time.monotonic()
        logger.warning(
            f"The vLLM server at {client.base_url} is unreachable. The run waits, up to {limit_seconds:.0f} s."
        )
        while True:
            time.sleep(SECONDS_BETWEEN_TRIES)
            now = time.monotonic()
            if is_up(client):
                outcome = [True]
                logger.warning(f"The vLLM server is back after {now - start:.0f} s.")
                break
            if now - start > limit_seconds:
                outcome = [
                    f"The vLLM server at {client.base_url} did not come back in {limit_seconds:.0f} s. There are no "
                    "rollouts without it. Start it, then this run with `resume_from_checkpoint: auto`; "
                    "`vllm_server_timeout` is how long a run waits."
                ]
                break
            if now - last_logged > _SECONDS_BETWEEN_MESSAGES:
                logger.warning(f"Still waiting for the vLLM server, for {now - start:.0f} s.")
                last_logged = now
    broadcast_object_list(outcome, from_process=0)
    if isinstance(outcome[0], str):
        raise ServerLost(outcome[0])
    return outcome[0]


def generate_through_outages(
    generate: Callable[[], _Generated],
    client: Any | None,
    accelerator: Accelerator,
    limit_seconds: float,
    forget_weights: Callable[[], None],
) -> _Generated:
    """Generates as soon as the server is up, again where it was lost meanwhile. A collective call.

    `generate` raises [`ServerLost`] on all ranks, see [`report_losses`]; `forget_weights` makes the next one send the
    student's weights first; the rest is as in [`wait_for_server`].
    """
    was_lost = False
    while True:
        # One that was lost in the middle of a request may be up again before it is looked for, with other weights
        if wait_for_server(client, accelerator, limit_seconds) or was_lost:
            if client is not None:
                client.init_communicator(device=accelerator.device)
            forget_weights()
        try:
            return generate()
        except ServerLost as error:
            was_lost = True
            logger.warning(f"The vLLM server was lost while it generated: {error}")
