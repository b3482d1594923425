"""Words of messages."""

from typing import Annotated

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from common.wording import wrong_values


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")

    length: int = 1
    width: Annotated[int, Field(ge=1)] = 1
    name: str

    @field_validator("length")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("expected 1 or more")
        return value

    @model_validator(mode="after")
    def _no_square(self) -> "Form":
        if self.length == self.width:
            raise ValueError("no squares")
        return self


def test_wrong_values_in_words() -> None:
    """None of pydantic's own words, and none that a reader of the file does not know."""
    with pytest.raises(ValidationError) as raised:
        Form.model_validate({"length": 0, "width": 0, "lenght": 3})
    assert wrong_values(raised.value.errors()) == (
        "length: expected 1 or more; width: should be greater than or equal to 1; name: missing; lenght: unknown key"
    )
    with pytest.raises(ValidationError) as raised:
        Form.model_validate({"length": 3, "width": 3, "name": "square"})
    assert wrong_values(raised.value.errors()) == "no squares"
