"""What every parameter is held against, whoever gives it: the types and bounds of its annotation.

::

    @dataclass
    class Recipe:
        rule: Annotated[str, RULES] = "csn"
        steps: Positive = 100

        def __post_init__(self):
            check(self)

    @checked
    def select_layers(alphas, fraction: Share = 0.5, seed: Seed = 0): ...
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from .errors import LabError


class Must(NamedTuple):
    """A bound on a number, in words and as a test (which NaN never passes)."""

    be: str
    holds: Callable[[float], bool]


Count = Annotated[int, Must("0 or more", lambda n: n >= 0)]
Positive = Annotated[int, Must("1 or more", lambda n: n >= 1)]
Seed = Annotated[int, Must("from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63)]
Share = Annotated[float, Must("between 0 and 1", lambda x: 0 <= x <= 1)]
Part = Annotated[float, Must("more than 0 and less than 1", lambda x: 0 < x < 1)]
Rate = Annotated[float, Must("more than 0 and finite", lambda x: 0 < x < math.inf)]
Factor = Annotated[float, Must("0 or more and finite", lambda x: 0 <= x < math.inf)]
Duration = Annotated[float, Must("0 or more", lambda x: x >= 0)]


def check(config: object) -> None:
    """Hold the fields of a dataclass against their annotations.

    Raises:
        LabError: a value of another type, out of bounds or not among the words that are valid.
    """
    for name, hint in _hints(type(config)).items():
        _hold(name, getattr(config, name), hint)


def checked(function: Callable) -> Callable:
    """A function whose arguments are held against their annotations first, as by ``check``."""
    signature = inspect.signature(function)

    @wraps(function)
    def held(*args, **kwargs):
        hints = _hints(function)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            _hold(name, value, hints.get(name))
        return function(*args, **kwargs)

    return held


def choose(name: str, value: str, valid: Collection[str]) -> str:
    """``value`` if it is one of ``valid``, else a LabError that lists them."""
    if value not in tuple(valid):  # a list given is no key of a dict, but it can be compared
        raise LabError(f"unknown {name}={value!r}; use one of {', '.join(valid)}")
    return value


def choices(name: str, valid: Collection[str], shown: Collection[str] | None = None) -> str:
    """The end of a sentence about an unknown name: the nearest one, and ``shown`` of the valid."""
    near = difflib.get_close_matches(name, valid, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} valid names: {', '.join(valid if shown is None else shown) or 'none'}"


@cache
def _hints(annotated: Callable) -> dict[str, object]:
    return get_type_hints(annotated, include_extras=True)


def _hold(name: str, value: object, hint: object) -> None:
    """Kinds of annotations that are not named here allow everything."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        _hold(name, value, args[0])
        for rule in args[1:]:
            if isinstance(rule, Must):
                if not rule.holds(value):
                    raise LabError(f"{name}={value!r} must be {rule.be}")
            elif isinstance(rule, (tuple, dict)):
                choose(name, value, rule)
    elif origin is Literal:
        choose(name, value, args)
    elif origin in (Union, UnionType):
        _any(name, value, args)
    elif origin in (Sequence, Iterable, tuple) and args[0] is str:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise LabError(f"{name}={value!r} must be a list of texts; write [{value!r}]")
        if isinstance(value, Sequence) and not all(isinstance(each, str) for each in value):
            raise LabError(f"{name}={value!r} must hold texts only; quote them")
    elif origin is Mapping and isinstance(value, Mapping):
        for key, each in value.items():
            _hold(f"{name}[{key!r}]", each, args[1])
    elif isinstance(hint, type) and hint in _KINDS:
        kind, words = _KINDS[hint]
        if not isinstance(value, kind) or (isinstance(value, bool) and hint is not bool):
            raise LabError(f"{name}={value!r} must be {words}")


def _any(name: str, value: object, hints: tuple) -> None:
    wrong = []
    for hint in hints:
        try:
            return _hold(name, value, hint)
        except LabError as error:
            wrong.append(error)
    raise wrong[0]


_KINDS = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),  # numpy's, too
    float: (Real, "a number"),
    str: ((str, PathLike), "a text"),
    NoneType: (NoneType, "None"),
}
