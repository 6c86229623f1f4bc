"""Parts of a recipe: a ``type``, looked up in a registry, and parameters, checked against its builder's signature.

YAML never names code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from distill.config import complaint, nearest, one_line, shortened
from distill.contracts import UserError
from distill.data_config import Part


def check_part(registry: Mapping[str, Callable[..., Any]], part: Part, where: str, given: Iterable[str] = ()) -> None:
    """Check a part's type and parameters against its builder's signature, without building.

    Args:
        registry: type -> builder.
        part: the type and its parameters.
        where: dotted path of the part, for the message.
        given: parameters that the caller adds, which the part may leave out.

    Raises:
        UserError: unknown type, unknown parameter, one of the wrong type, or a required one is missing.
    """
    if part.type not in registry:
        raise UserError(f"{where}: unknown type {part.type!r}; {nearest(part.type, registry)}")
    builder, added = registry[part.type], set(given)
    signature = inspect.signature(builder).parameters
    settable = [name for name in signature if name not in added and name != "self"]
    hints = get_type_hints(getattr(builder, "__init__") if inspect.isclass(builder) else builder)  # noqa: B009
    for name, value in part.params.items():
        if name not in settable:
            raise UserError(f"{where}: {part.type} has no parameter {name!r}; {nearest(name, settable)}")
        check_type(hints.get(name, Any), value, f"{where}.{name}")
    for name in settable:
        if signature[name].default is inspect.Parameter.empty and name not in part.params:
            raise UserError(f"{where}: {part.type} needs the parameter {name!r}; add it")


def check_type(hint: Any, value: Any, where: str) -> None:
    """Check a value that a recipe gives against a type hint, with its bounds if it has any.

    Raises:
        UserError: it is of another type, beyond the bounds, or a number that is not finite.
    """
    try:
        TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value, strict=True)
    except ValidationError as error:
        raise UserError(f"{where} is {shortened(value)}: {complaint(error.errors()[0])}") from error
    except PydanticUserError:
        return  # a class of our own, which no recipe can hold: the builder is the judge


def build_part(registry: Mapping[str, Callable[..., Any]], part: Part, where: str, **given: Any) -> Any:
    """Build a part after :func:`check_part`; ``given`` are arguments that the caller adds.

    Raises:
        UserError: as :func:`check_part`, or the builder refuses a value.
    """
    check_part(registry, part, where, given)
    try:
        return registry[part.type](**given, **part.params)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {part.type} cannot be built: {one_line(error)}") from error
