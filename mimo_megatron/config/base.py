"""The strict pydantic base: frozen, unknown keys refused."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
