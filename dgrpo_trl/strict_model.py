"""The base of every configuration that is read from YAML by pydantic."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Section of a builder's configuration: an unknown key or a value of another type is an error, not a default."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
