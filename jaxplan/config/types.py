"""The building blocks of every configuration section: one decorator, a few ranges.

Sections are frozen pydantic dataclasses. They hash by value, so a section is a static
argument of ``jax.jit``. Nothing here, nor anything it imports, imports JAX.
"""

from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass as pydantic_dataclass

_CONFIG = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)
_T = TypeVar("_T")


@dataclass_transform(frozen_default=True, kw_only_default=True)
def section(cls: type[_T]) -> type[_T]:
    """Turn a class into a frozen, strict, validated section of the run's config."""
    return pydantic_dataclass(frozen=True, kw_only=True, config=_CONFIG)(cls)


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


NumberOnly = BeforeValidator(_refuse_bool)

PositiveInt = Annotated[int, NumberOnly, Field(gt=0)]
NonNegativeInt = Annotated[int, NumberOnly, Field(ge=0)]
PositiveFloat = Annotated[float, NumberOnly, Field(gt=0)]
NonNegativeFloat = Annotated[float, NumberOnly, Field(ge=0)]
Fraction = Annotated[float, NumberOnly, Field(ge=0, le=1)]
