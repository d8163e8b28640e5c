"""The one rule for a cell that is no text: what each type becomes, what counts as missing, what is refused.

`docs/how-to/own-data.md` has the rule as a table. It holds for local files of every format and for data sets from the hub.
"""

from __future__ import annotations

import datetime
import json
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow
from pyarrow import types

from fedtune.errors import UsageError

_NS_OF_UNIT = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_FLOAT_DIGITS = 17
"""A 64-bit float is fully told by so many significant digits."""


class ValueRefusedError(ValueError):
    """A value has no text; says why, in words that follow "is" or "holds"."""


class Number(str):
    """A JSON number of which a float would lose digits, as it is written."""

    __slots__ = ()


def to_text(value: Any) -> str | None:
    """Return a cell as text, None for a missing value.

    Raises:
        ValueRefusedError: the value has no text: an infinite number, bytes that are no UTF-8, an object of another type.
    """
    if isinstance(value, str):
        return _whole(str(value))
    if is_missing(value):
        return None
    if isinstance(value, Mapping | list | tuple | np.ndarray):
        try:
            return _json(value)
        except RecursionError:
            raise ValueRefusedError("nested too deeply") from None
    return _single(value)


def is_missing(value: Any) -> bool:
    """Whether a value says that there is none: None, NaN of any type, pandas' NaT and NA."""
    if value is None or type(value).__name__ in ("NAType", "NaTType"):
        return True
    if isinstance(value, Decimal):
        return value.is_nan()
    return isinstance(value, float | np.floating) and bool(value != value)


def texts(values: Iterable[Any], place: Callable[[int], str], *, strict: bool = True) -> list[str | None]:
    """Return a column's values as texts, None for missing ones.

    Args:
        values: The column's values, by row.
        place: Names the cell in a row (from 0), for the error.
        strict: Refuse a value that has no text; otherwise it becomes None.

    Raises:
        UsageError: a value has no text; names the cell.
    """
    found: list[str | None] = []
    for row, value in enumerate(values):
        try:
            found.append(to_text(value))
        except ValueRefusedError as error:
            if strict:
                raise UsageError(
                    f"{place(row)}: the value is {error}.", hint="The how-to on own data lists what each type becomes."
                ) from None
            found.append(None)
    return found


def arrow_texts(column: pyarrow.ChunkedArray, place: Callable[[int], str], *, strict: bool = True) -> list[str | None]:
    """Return an Arrow column's values as texts; see `texts`."""
    if types.is_string(column.type) or types.is_large_string(column.type):
        try:
            strings: list[str | None] = column.to_pylist()
        except UnicodeDecodeError:
            pass  # found again below, with its row
        else:
            return strings
    return texts((_Scalar(scalar) for scalar in column), place, strict=strict)


def parse_float(text: str) -> float | Number:
    """Return a JSON number with a fraction or an exponent as a float, or as it is written where a float loses digits."""
    value = float(text)
    digits = re.split("[eE]", text)[0].replace(".", "").lstrip("-0").rstrip("0")
    is_exact = len(digits) <= _FLOAT_DIGITS and np.isfinite(value) and bool(value) == bool(digits)
    return value if is_exact else Number(text)


class _Scalar:
    """An Arrow value that is turned into a Python value when its text is needed, so that an error is that cell's."""

    __slots__ = ("scalar",)

    def __init__(self, scalar: pyarrow.Scalar) -> None:
        self.scalar = scalar


def _whole(text: str) -> str:
    """Return a text that is one: half of a surrogate pair is no character, and no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueRefusedError("text with half of a surrogate pair, which is no character") from None
    return text


def _single(value: Any) -> str | None:
    """Return the text of a value that holds no others."""
    match value:
        case _Scalar():
            return to_text(_from_arrow(value.scalar))
        case bool() | np.bool_():
            return "true" if value else "false"
        case int() | np.integer():
            return _integer(int(value))
        case float() | np.floating():
            # The shortest digits that mean this very number at its own width: 0.1, not 0.10000000149.
            text = repr(float(str(value)))
            if "inf" in text:
                raise ValueRefusedError("an infinite number")
            return text
        case Decimal():
            if not value.is_finite():
                raise ValueRefusedError("an infinite number")
            return format(value, "f")
        case bytes() | bytearray() | memoryview():
            try:
                return bytes(value).decode("utf-8")
            except UnicodeDecodeError:
                raise ValueRefusedError("bytes that are no UTF-8 text") from None
        case datetime.timedelta():
            whole_us = (value.days * 86_400 + value.seconds) * 10**6 + value.microseconds
            return _iso_duration(whole_us * 1000 + int(getattr(value, "nanoseconds", 0)))
        case datetime.date() | datetime.time():  # a datetime is a date, and a pandas Timestamp is a datetime
            return value.isoformat()
        case uuid.UUID():
            return str(value)
    raise ValueRefusedError(f"of the type {type(value).__name__}, which has no text")


def _integer(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # Python writes at most 4,300 digits
        raise ValueRefusedError("an integer of more than 4,300 digits") from None


def _json(value: Any) -> str:
    """Return a value inside a nested one as JSON; a missing one is null."""
    if isinstance(value, Number):
        return str(value)
    if isinstance(value, str):
        return json.dumps(_whole(value), ensure_ascii=False)
    if is_missing(value):
        return "null"
    if isinstance(value, Mapping):
        members: dict[str, str] = {}
        for key, item in value.items():
            name = to_text(key)
            if name is None or name in members:
                raise ValueRefusedError(f"a map with {'a missing key' if name is None else f'two keys {name!r}'}")
            members[name] = _json(item)
        return (
            "{" + ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {item}" for name, item in members.items()) + "}"
        )
    if isinstance(value, list | tuple | np.ndarray):
        return "[" + ", ".join(_json(item) for item in value) + "]"
    text = str(_single(value))
    is_plain = isinstance(value, bool | int | float | Decimal | np.bool_ | np.number)
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _iso_duration(nanoseconds: int) -> str:
    """Return a duration in ISO 8601: `P1DT2H3M4.5S`, `-PT1S`, `PT0S`."""
    seconds, fraction = divmod(abs(nanoseconds), 10**9)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    digits = f".{fraction:09d}".rstrip("0").rstrip(".")
    date = f"{days}D" if days else ""
    time = "".join(f"{count}{letter}" for count, letter in ((hours, "H"), (minutes, "M")) if count)
    if seconds or fraction or not (date or time):
        time += f"{seconds}{digits}S"
    return f"{'-' if nanoseconds < 0 else ''}P{date}{'T' if time else ''}{time}"


def _from_arrow(scalar: pyarrow.Scalar) -> Any:
    """Return an Arrow value as a Python value with its text; `as_py` alone loses nanoseconds and the width of floats."""
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if isinstance(scalar, pyarrow.UuidScalar):
        return scalar.as_py()
    if isinstance(scalar, pyarrow.ExtensionScalar | pyarrow.DictionaryScalar):
        return _from_arrow(scalar.value)
    if types.is_run_end_encoded(kind):
        return _from_arrow(pyarrow.scalar(scalar.as_py(), kind.value_type))
    if types.is_float16(kind) or types.is_float32(kind):
        return (np.float16 if types.is_float16(kind) else np.float32)(scalar.as_py())
    if types.is_map(kind):
        pairs = [(_from_arrow(key), _from_arrow(item)) for key, item in _pairs(scalar)]
        if len({str(key) for key, _ in pairs}) < len(pairs):
            raise ValueRefusedError("a map with one key twice")
        return {_key(key): item for key, item in pairs}
    if isinstance(scalar, pyarrow.ListScalar):  # the base of every kind of list
        return [_from_arrow(item) for item in scalar.values]
    if types.is_struct(kind):
        if len({field.name for field in kind}) < kind.num_fields:
            raise ValueRefusedError("a struct with one field name twice")
        return {kind.field(place).name: _from_arrow(scalar[place]) for place in range(kind.num_fields)}
    if types.is_duration(kind):
        return _iso_duration(scalar.value * _NS_OF_UNIT[kind.unit])
    if types.is_time64(kind) and kind.unit == "ns" and scalar.value % 1000:
        seconds, fraction = divmod(scalar.value, 10**9)
        start = datetime.datetime.min + datetime.timedelta(seconds=seconds)
        return f"{start.time().isoformat()}.{fraction:09d}"
    if types.is_union(kind) or types.is_interval(kind):
        raise ValueRefusedError(f"of the Arrow type {kind}, which has no text")
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise ValueRefusedError("a string that is no UTF-8 text") from None
    except (ValueError, OverflowError):
        raise ValueRefusedError(f"a {kind} outside of the years 1 to 9999") from None


def _pairs(scalar: pyarrow.Scalar) -> list[tuple[pyarrow.Scalar, pyarrow.Scalar]]:
    entries = scalar.values  # an array of structs with two fields
    return list(zip(entries.field(0), entries.field(1), strict=True))


def _key(key: Any) -> Any:
    """Return a map's key as something that a dict takes."""
    return key if key is None or isinstance(key, str | int | float | bytes) else to_text(key)
