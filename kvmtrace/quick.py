"""Make objects of frozen dataclasses at the price of ordinary ones.

``__init__`` of a frozen dataclass goes through ``object.__setattr__`` for each field, which takes
five times as long. A recording may have millions of events, and a model tens of thousands of
objects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")


def maker(cls: type[_T]) -> Callable[..., _T]:
    """Return a function that takes what ``cls`` takes and returns an equal object.

    ``cls``: a dataclass with slots and without ``__post_init__``. Raises TypeError for another one.
    """
    if hasattr(cls, "__post_init__") or "__slots__" not in vars(cls):
        raise TypeError(f"{cls.__name__} is not made of its fields alone")
    # A class of the same layout, whose attributes can be set; its object then becomes one of cls.
    own: dict[str, Any] = {
        "__slots__": vars(cls)["__slots__"],
        "__setattr__": object.__setattr__,
        "__delattr__": object.__delattr__,
    }
    names: dict[str, Any] = {"cls": cls, "new": object.__new__, "unset": object()}
    names["Blank"] = type(cls.__name__, cls.__bases__, own)
    parameters = []
    lines = []
    for field in dataclasses.fields(cls):
        name = field.name
        parameters.append(name)
        if field.default is not dataclasses.MISSING:
            names[f"default_{name}"] = field.default
            parameters[-1] += f"=default_{name}"
        elif field.default_factory is not dataclasses.MISSING:
            names[f"factory_{name}"] = field.default_factory
            parameters[-1] += "=unset"
            lines.append(f" if {name} is unset: {name} = factory_{name}()")
        lines.append(f" made_.{name} = {name}")
    lines = [f"def make({', '.join(parameters)}):", " made_ = new(Blank)", *lines]
    exec("\n".join([*lines, " made_.__class__ = cls", " return made_"]), names)
    made: Callable[..., _T] = names["make"]
    return made
