"""The base of every configuration that is read from YAML by pydantic."""

from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class StrictModel(BaseModel):
    """Section of a builder's configuration: an unknown key or a value of another type is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_ranges(self) -> Self:
        """Of each `min_x` with a `max_x`, the first is not the larger."""
        values = {name: value for name, value in self if value is not None}
        for name, least in values.items():
            other = f"max_{name[4:]}"
            if name.startswith("min_") and other in values and least > values[other]:
                raise ValueError(
                    f"`{name}` is {least} and `{other}` {values[other]}. Nothing is both. Lower the first, or raise "
                    "the second."
                )
        return self
