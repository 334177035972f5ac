"""A vLLM server that goes away and comes back: the run waits for it.

Generation is asked for by the main process alone, and the others wait for its answer: an error there would leave them
waiting for ever. So a lost server travels to all of them as the answer, and each raises [`ServerLost`] at that place.
"""

import time
from collections.abc import Callable
from typing import Any, NoReturn

import requests
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list


logger = get_logger(__name__)

_SECONDS_BETWEEN_TRIES = 2.0
_SECONDS_BETWEEN_MESSAGES = 30.0


class ServerLost(RuntimeError):
    """The vLLM server cannot be reached, or is on its way down or up."""


class _Lost:
    """Stands for an answer that did not come; whoever reads it learns why."""

    def __init__(self, reason: str):
        self.reason = reason

    def __iter__(self) -> NoReturn:
        raise ServerLost(self.reason)


def report_losses(client: Any) -> None:
    """Lets `client.generate` answer with a loss where the server does not answer, instead of raising.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`]):
            That of the main process.
    """
    generate: Callable[..., dict] = client.generate

    def generate_or_report(*args, **kwargs) -> dict:
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
    """Waits until the server is up, with messages. A collective call.

    Args:
        client ([`~trl.generation.vllm_client.VLLMClient`], *optional*):
            `None` on all ranks but the main one.
        accelerator ([`~accelerate.Accelerator`]):
            Brings the outcome to all ranks.
        limit_seconds (`float`):
            Longest wait.

    Returns:
        `bool`: whether the server was away. It may have started anew, with the weights that it read from disk.

    Raises:
        ServerLost: On all ranks, if it does not come up in time.
    """
    outcome: list[str | bool] = [False]
    if accelerator.is_main_process and not is_up(client):
        start = said = time.monotonic()
        logger.warning(f"The vLLM server at {client.base_url} is away. The run waits, up to {limit_seconds:.0f} s.")
        while True:
            time.sleep(_SECONDS_BETWEEN_TRIES)
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
            if now - said > _SECONDS_BETWEEN_MESSAGES:
                logger.warning(f"Still waiting for the vLLM server, for {now - start:.0f} s.")
                said = now
    broadcast_object_list(outcome, from_process=0)
    if isinstance(outcome[0], str):
        raise ServerLost(outcome[0])
    return outcome[0]
