"""Values that compare by their arguments, and print as the call that made them."""

import re
from dataclasses import MISSING, Field, fields, is_dataclass
from types import EllipsisType
from typing import Any


class Value:
    """Base of frozen dataclasses that a lower-case factory makes.

    ``TopK`` prints as a call of ``top_k``: with what is positional in its fields, and
    by name what is keyword-only and not its default. Make the dataclass with
    ``repr=False``.
    """

    def __repr__(self) -> str:
        factory = re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()
        arguments: list[str] = []
        own: tuple[Field[Any], ...] = fields(self) if is_dataclass(self) else ()
        for field in own:
            value = getattr(self, field.name)
            if field.metadata.get("variadic"):
                arguments += map(repr, value)
            elif not field.kw_only:
                arguments.append(_written(value))
            elif _differs(field, value):
                arguments.append(f"{field.name}={_written(value)}")
        return f"{factory}({', '.join(arguments)})"


def _differs(field: Field[Any], value: Any) -> bool:
    return field.default is MISSING or value != field.default


def _written(value: Any) -> str:
    if isinstance(value, tuple) and any(isinstance(v, EllipsisType) for v in value):
        return repr(value).replace("Ellipsis", "...")
    return repr(value)
