"""How a server is reached, and how much is asked of it."""

from typing import Any, Literal

from pydantic import Field

from ..strict_model import StrictModel


class ServerConfig(StrictModel):
    """A model behind an OpenAI-compatible server. The key is read from the environment and kept nowhere."""

    base_url: str = Field(
        pattern="^https?://", description="Address of the API, with its version: `http://localhost:8000/v1`."
    )
    model: str = Field(description="Name of the model at the server.")
    api_key_env: str = Field("OPENAI_API_KEY", description="Environment variable that holds the key, if there is one.")
    max_concurrency: int = Field(  # 1,000: the connections of the HTTP client
        64, ge=1, le=1000, description="Requests in flight at most; fewer while the server is busy."
    )
    requests_per_minute: float | None = Field(None, gt=0, description="Most requests per minute. Default: no limit.")
    timeout_seconds: float = Field(600, gt=0, description="Longest time for one complete reply.")
    max_retries: int = Field(6, ge=0, description="Number of times that a failed request is sent again.")
    backoff_seconds: float = Field(1, gt=0, description="Wait before the first retry; doubled with each.")
    max_backoff_seconds: float = Field(60, gt=0, description="Longest wait before a retry.")
    max_outage_seconds: float = Field(600, ge=0, description="Wait while it is unreachable or rejects all requests.")
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="What the server calls the longest reply; newer models of OpenAI take the second."
    )
    max_model_tokens: int | None = Field(
        None, ge=1, description="Context: tokens of prompt and reply. Default: the server says when it is full."
    )
    tokenizer: str | None = Field(None, description="Counts prompts: path or Hub id. Default: a byte is a token.")
    structured_output: Literal["auto", "json_schema", "vllm", "none"] = Field(
        "none",
        description="How replies are held to a JSON schema: OpenAI's `response_format`; vLLM's `structured_outputs`; "
        "`auto` tries the first and remembers a refusal. On vLLM a schema switches thinking off, unless the server "
        "runs with a reasoning parser; `none` leaves the form to the prompt.",
    )
    temperature: float | None = Field(None, ge=0, description="Sampling temperature. Default: the server's.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling. Default: the server's.")
    seed: int | None = Field(None, description="Seed of sampling; repeated draws add to it. Default: not sent.")
    extra_body: dict[str, Any] = Field(default_factory=dict, description="More keys of the request: `top_k`, ...")

    @property
    def generation(self) -> dict[str, Any]:
        """What decides a reply, beside the messages."""
        names = ("model", "temperature", "top_p", "seed", "extra_body")
        return {name: getattr(self, name) for name in names}
