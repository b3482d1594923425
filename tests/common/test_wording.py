"""Words of messages."""

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from common.wording import wrong_values


class Form(BaseModel):
    model_config = ConfigDict(extra="forbid")

    length: int = 1

    @field_validator("length")
    @classmethod
    def _positive(cls, value: int) -> int:
        if value < 1:
            raise ValueError("expected 1 or more")
        return value


def test_wrong_values_in_words() -> None:
    with pytest.raises(ValidationError) as raised:
        Form.model_validate({"length": 0, "lenght": 3})
    assert wrong_values(raised.value.errors()) == "length: expected 1 or more; lenght: unknown key"
