"""The configuration of a build: one YAML file, checked as a whole before anything is read."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from ...llm import ServerConfig
from ...recipe import did_you_mean, read_recipe
from ...strict_model import StrictModel
from ..questions.blocks import BlocksConfig
from ..questions.llm_engine import LLMEngineConfig
from ..questions.rule_engine import RuleEngineConfig
from ..questions.verification import VerificationConfig
from ..sources.reading import SourceConfig
from .card import CardConfig
from .cleaning import CleaningConfig
from .decontamination import DecontaminationConfig
from .deduplication import DeduplicationConfig
from .mixing import MixingConfig
from .publish import PublishConfig, published_schema
from .responses import ResponsesConfig


# The stages in their order, each with the sections that decide what it makes, besides those of the stages before it
_SECTIONS: dict[str, tuple[str, ...]] = {
    "sources": ("tokenizer", "documents_per_part", "sources", "cleaning", "deduplication"),
    "deduplication": ("deduplication",),
    "blocks": ("blocks",),
    "questions": ("questions",),
    "verification": ("verification",),
    "responses": ("responses",),
    "decontamination": ("decontamination",),
    "mixing": ("mixing",),
    "card": (),
    "publish": (),
}
STAGES = tuple(_SECTIONS)
# The stages that see all parts at once; the others can be shared out among processes
GLOBAL_STAGES = ("deduplication", "mixing", "card", "publish")


class BuildConfig(StrictModel):
    """What to build. Every key of every section is described where its model is defined, and checked."""

    name: str = Field(pattern=r"^[\w][\w.-]*$", description="Name of the build, and of its folder.")
    tokenizer: str | None = Field(None, description="Counts lengths: path or Hub id. Default: four bytes per token.")
    documents_per_part: int = Field(32, ge=1, description="Documents per part, the unit that a crash may cost.")
    sources: tuple[SourceConfig, ...] = Field(min_length=1, description="Where documents come from.")
    cleaning: CleaningConfig = CleaningConfig()
    deduplication: DeduplicationConfig = DeduplicationConfig()
    blocks: BlocksConfig = BlocksConfig()
    servers: dict[str, ServerConfig] = Field(
        default_factory=dict, description="Models to ask, by the names that other sections use."
    )
    questions: Annotated[RuleEngineConfig | LLMEngineConfig, Field(discriminator="engine")]
    verification: VerificationConfig = VerificationConfig()
    responses: ResponsesConfig = ResponsesConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    mixing: MixingConfig = MixingConfig()
    card: CardConfig = CardConfig()
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _check(self) -> "BuildConfig":
        names = [source.name for source in self.sources]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"`sources` holds {repeated} more than once. The name tells the sources of the data set apart. Give "
                "each its own."
            )
        for stage in STAGES:
            for name in self.servers_of(stage):
                if name not in self.servers:
                    raise ValueError(
                        f"The section `{stage}` asks the server {name!r}, which is not among `servers`: "
                        f"{sorted(self.servers)}. There is no model to ask. Add it, or name one of these."
                    )
        published_schema(self.response_models)  # raises where two models would share a column
        return self

    def servers_of(self, stage: str) -> tuple[str, ...]:
        """Names of the servers that a stage asks."""
        names: dict[str, tuple[str | None, ...]] = {
            "questions": (self.questions.server if isinstance(self.questions, LLMEngineConfig) else None,),
            "verification": (self.verification.answerer, self.verification.judge),
            "responses": tuple(teacher.server for teacher in self.responses.teachers),
        }
        return tuple(dict.fromkeys(name for name in names.get(stage, ()) if name is not None))

    @property
    def response_models(self) -> list[str]:
        """Teachers, as their columns name them."""
        return [teacher.name or self.servers[teacher.server].model for teacher in self.responses.teachers]

    def settings(self, stage: str) -> dict[str, Any]:
        """What decides the output of a stage: not where a server is or how fast it is asked."""
        settings = {name: self.model_dump(mode="json")[name] for name in _SECTIONS[stage]}
        if stage in ("questions", "responses") and self.servers_of(stage):  # asked again for the right language
            settings["verification.language"] = self.verification.language
        for name in self.servers_of(stage):
            server = self.servers[name]
            settings[f"servers.{name}"] = {
                **server.generation,
                "max_model_tokens": server.max_model_tokens,
                "structured_output": server.structured_output,
            }
        return settings

    def public_yaml(self) -> str:
        """The configuration as it may be shown: what is set, with the addresses of servers replaced."""
        values = self.model_dump(mode="json", exclude_unset=True)
        for server in values.get("servers", {}).values():
            server["base_url"] = "http://localhost:8000/v1"
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    @property
    def fingerprint(self) -> str:
        """Identifies the configuration by all that decides the rows: 16 hex digits."""
        content = json.dumps({stage: self.settings(stage) for stage in STAGES}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> BuildConfig:
    """Reads a YAML file; `overrides` are values by nested key, as for [`recipe.override`].

    Raises:
        ValueError: If the file cannot be read, or a key is unknown, is missing or has a wrong value; names each.
    """
    try:
        return BuildConfig.model_validate(read_recipe(path, overrides))
    except ValidationError as error:
        problems = list(map(_problem, error.errors()))
        raise ValueError(
            f"The configuration {str(path)!r} has {len(problems)} mistakes. Nothing was built. Correct them:\n  "
            + "\n  ".join(problems)
        ) from error


def _problem(error: ErrorDetails) -> str:
    """One mistake that pydantic found; for an unknown key, the nearest of all keys."""
    hint = ""
    if error["type"] == "extra_forbidden":
        schema = BuildConfig.model_json_schema()
        sections = (schema, *schema["$defs"].values())
        known = {key for section in sections for key in section.get("properties", ())}
        hint = did_you_mean(str(error["loc"][-1]), known)
    return f"`{'.'.join(map(str, error['loc'])) or 'the whole'}`: {error['msg']}.{hint}"
