"""The arguments of a tool: their schema, their validation, and what to say when they do not fit.

Annotations become one strict pydantic-core validator, built once when the tool is declared. Strict means what
JSON means: ``"3"`` is no integer and ``1`` no boolean, but an integer is a number, a list fits a tuple or set,
and text fits what JSON has no type for (dates, decimals, UUIDs, enums). A pydantic model in an annotation keeps
its own configuration. Source: docs/protocol.md, "Errors" (INVALID_ARGUMENT).
"""

from __future__ import annotations

import inspect
import json
import re
import typing
from collections.abc import Callable
from typing import Any, Final, NotRequired, Required

from pydantic import ConfigDict, TypeAdapter, with_config
from pydantic.errors import PydanticUserError
from pydantic.fields import FieldInfo
from pydantic_core import SchemaValidator, ValidationError
from typing_extensions import TypedDict  # pydantic does not take typing's before Python 3.12

from mcp_broker.errors import InvalidArgument
from mcp_broker.worker import faults
from mcp_broker.worker.bytestream import ByteStream
from mcp_broker.worker.context import ToolContext

#: core schemas that accept look-alikes (text for a number) unless they are told not to
_SCALARS: Final = frozenset({"int", "float", "bool", "str", "bytes"})
#: parts of a core schema that hold no further schema of a value; a payload's map keys are text,
#: so that ``dict[int, str]`` needs the lax reading of its keys
_OPAQUE: Final = frozenset({"metadata", "serialization", "default", "cls", "ref", "keys_schema", "config"})

_MODULES: Final = re.compile(r"\b(?:\w+\.)+(?=\w)")


def _strict(schema: Any) -> Any:
    """Copy a core schema with its scalars made strict, where its author did not say otherwise."""
    if isinstance(schema, list | tuple):
        return type(schema)(_strict(item) for item in schema)
    if not isinstance(schema, dict):
        return schema
    copy = {key: value if key in _OPAQUE else _strict(value) for key, value in schema.items()}
    if copy.get("type") in _SCALARS:
        copy.setdefault("strict", True)
    return copy


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Resolve a function's annotations, text included.

    Raises:
        TypeError: a name in them does not exist at run time (the tool author's fault).
    """
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"{function.__qualname__}: the annotation names {error.name!r}, which does not exist at run time; "
            "import it outside `if TYPE_CHECKING`"
        ) from error


class Arguments:
    """What a tool takes.

    Args:
        function: the tool's function.
        hints: its resolved annotations.
        tool: the tool's name, for messages.

    Attributes:
        schema: JSON Schema of the arguments, an object.
        signature: for people, ``word_count(text: str, top: int = 10)``.
        context_parameter: the name of the parameter that takes the :class:`ToolContext`, or None.
        stream_parameter: the name of the one that takes a :class:`ByteStream`, or None.
        check: the arguments of a call -> keyword arguments; raises pydantic's ValidationError.

    Raises:
        TypeError: the function cannot be a tool (its author's fault).
    """

    def __init__(self, function: Callable[..., Any], hints: dict[str, Any], tool: str) -> None:
        self._tool = tool
        self.context_parameter: str | None = None
        self.stream_parameter: str | None = None
        fields: dict[str, Any] = {}
        defaults: dict[str, Any] = {}
        for parameter in inspect.signature(function).parameters.values():
            hint = hints.get(parameter.name, Any)
            if isinstance(hint, type) and issubclass(hint, ToolContext):
                self.context_parameter = parameter.name
                continue
            _check(parameter, tool)
            if hint is ByteStream or ByteStream in typing.get_args(hint):
                if self.stream_parameter is not None:
                    raise TypeError(
                        f"{tool}: {self.stream_parameter} and {parameter.name} are both ByteStreams; a tool has one at most"
                    )
                self.stream_parameter = parameter.name
            if parameter.default is parameter.empty:
                fields[parameter.name] = Required[hint]
            else:
                fields[parameter.name] = NotRequired[hint]
                defaults[parameter.name] = parameter.default
        adapter = _adapter(fields, tool)
        self.schema = _schema(adapter, hints, defaults)
        self.names = tuple(fields)
        self.signature = _signature(function, self.context_parameter)
        self.check: Callable[[dict[str, Any]], dict[str, Any]] = SchemaValidator(
            _strict(adapter.core_schema)
        ).validate_python

    def validate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Check a call's arguments; the defaults of absent ones are the function's own.

        Raises:
            InvalidArgument: they do not fit (the caller's fault); ``details["faults"]`` lists every fault as
                {path, expected, received, message}, ``details["signature"]`` the signature.
        """
        try:
            return self.check(arguments)
        except ValidationError as error:
            raise self.refusal(arguments, error) from None

    def refusal(self, arguments: dict[str, Any], error: ValidationError) -> InvalidArgument:
        """Turn what :attr:`check` raised into the error that names every fault."""
        found = faults.explain(error, arguments, self.schema)
        told = "; ".join(fault["message"] for fault in found[: faults.TOLD_MAX])
        more = len(found) - faults.TOLD_MAX
        if more > 0:
            told += f"; and {more} more"
        return InvalidArgument(
            f"{self._tool}: {told}. Signature: {self.signature}"[:4000],
            {"faults": found[: faults.LISTED_MAX], "count": len(found), "signature": self.signature},
        )


def _check(parameter: inspect.Parameter, tool: str) -> None:
    if parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY}:
        raise TypeError(f"{tool}: arguments go by name, so {parameter} cannot be one")
    if isinstance(parameter.default, FieldInfo):
        raise TypeError(
            f"{tool}: write {parameter.name}: Annotated[type, Field(...)] = default, not a Field as the default"
        )


def _adapter(fields: dict[str, Any], tool: str) -> TypeAdapter[Any]:
    # a TypedDict validates into the very dict that the function is called with, in half the time of a model
    shape = with_config(ConfigDict(extra="forbid"))(TypedDict("Arguments", fields))  # type: ignore[operator]
    try:
        return TypeAdapter(shape)
    except PydanticUserError as error:
        raise TypeError(f"{tool}: an argument's type cannot be checked: {error}") from error


def _schema(adapter: TypeAdapter[Any], hints: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    schema = adapter.json_schema()
    schema.pop("title", None)
    properties = schema.setdefault("properties", {})
    for name, value in properties.items():
        value.pop("title", None)
        if name in defaults:
            plain = TypeAdapter(hints.get(name, Any)).dump_python(defaults[name], mode="json", warnings=False)
            properties[name] = {**value, "default": plain}
    # what cannot stand in JSON cannot stand in a schema: found here, not at the first registration
    json.dumps(schema)
    return schema


def _signature(function: Callable[..., Any], context_parameter: str | None) -> str:
    hints = typing.get_type_hints(function)  # without Annotated's extras, which are not for people
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == context_parameter:
            continue
        text = parameter.name
        if parameter.name in hints:
            text += f": {type_text(hints[parameter.name])}"
        if parameter.default is not parameter.empty:
            text += f" = {parameter.default!r}"
        shown.append(text)
    return f"{function.__name__}({', '.join(shown)})"


def type_text(hint: Any) -> str:
    """Write a type as its author would have."""
    text = inspect.formatannotation(hint)
    # module names are noise to a caller; inside quotes a dot means something else
    return text if "'" in text else _MODULES.sub("", text)
