"""Objects of frozen dataclasses made fast are the same objects."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import pytest

from kvmtrace.events import KINDS, Event, Exit
from kvmtrace.model import CorrelatedEvent, Incident, IncidentStatus
from kvmtrace.quick import maker


@pytest.mark.parametrize("cls", [*KINDS.values(), CorrelatedEvent])
def test_it_is_what_the_class_makes(cls: type[Event]) -> None:
    values = list(range(len(dataclasses.fields(cls))))
    made, expected = maker(cls)(*values), cls(*values)
    assert type(made) is cls
    assert (made, repr(made), hash(made)) == (expected, repr(expected), hash(expected))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(made, dataclasses.fields(cls)[0].name, 1)
    assert dataclasses.replace(made) == expected


def test_defaults_are_the_classes() -> None:
    assert maker(Exit)(1, 2, None, 14, 39, annotated=True) == Exit(1, 2, None, 14, 39, True)
    of = ("id", IncidentStatus.LATENT, None, None, None, None, ())
    one, other = maker(Incident)(*of), maker(Incident)(*of)
    assert one == Incident(*of)
    assert one.vm_identities is not other.vm_identities
    with pytest.raises(TypeError):
        maker(Exit)(1)


def test_a_class_that_does_more_is_refused() -> None:
    @dataclass(frozen=True)
    class WithoutSlots:
        one: int = 1

    @dataclass(frozen=True, slots=True)
    class Checked:
        one: list[int] = field(default_factory=list)

        def __post_init__(self) -> None:
            raise ValueError

    for cls in (WithoutSlots, Checked):
        with pytest.raises(TypeError, match=cls.__name__):
            maker(cls)
