"""The base of all sections of the configuration, and the types of their settings."""

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
Numbers = Annotated[tuple[NotNegative, ...], Field(strict=False)]
Texts = Annotated[tuple[Text, ...], Field(strict=False)]


def _single_error(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Raise one error for a wrong value; pydantic alone would report one for each type of a union."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("neither") from None


NotNegativeOrAuto = Annotated[NotNegative | Literal["auto"], WrapValidator(_single_error)]


class Section(BaseModel):
    """The base of all sections: strict types, frozen, finite numbers, no unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )
