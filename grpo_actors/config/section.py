"""What all sections of the configuration share: strict types, and what a number or a text may be."""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
# TOML and JSON give lists; a frozen setting is a tuple.
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


def _one_complaint(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Pydantic complains once for each type of a union; a setting is wrong once."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("neither") from None


NotNegativeOrAuto = Annotated[NotNegative | Literal["auto"], WrapValidator(_one_complaint)]


class Section(BaseModel):
    """What all sections share: strict, frozen, finite, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )
