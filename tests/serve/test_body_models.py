"""Models of bodies: a long list of wrong items costs no more than its first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from qaic_ray.serve.batches import routes
from qaic_ray.serve.body_model import BodyModel
from qaic_ray.serve.protocol import models as bodies
from qaic_ray.serve.tools import models as parts

MANY = 1000
FEW = 8
"""More faults than any field tells: one for each type that it may be, and where in it."""


def models(base: type[BodyModel] = BodyModel) -> Iterator[type[BodyModel]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def of_many() -> Iterator[Any]:
    """Each field that takes a list or an object, with one whose items are all wrong."""
    wrong = {"array": [object()] * MANY, "object": dict.fromkeys(map(str, range(MANY)), object())}
    for model in models():
        for name, field in model.model_fields.items():
            kinds = str(TypeAdapter(field.annotation).json_schema())
            for kind, value in wrong.items():
                anything = kind == "object" and "'additionalProperties': True" in kinds
                if f"'type': '{kind}'" in kinds and not anything:
                    yield pytest.param(model, name, value, id=f"{model.__name__}-{name}-{kind}")


@pytest.mark.parametrize(("model", "name", "value"), list(of_many()))
def test_the_first_wrong_item_ends_the_check(
    model: type[BodyModel], name: str, value: object
) -> None:
    if (model, name) == (routes.BatchBody, "output_expires_after"):
        value = {"anchor": "created_at"}  # what else it has is told key by key, of a short body
    with pytest.raises(ValidationError) as told:
        model.model_validate({name: value})
    faults = [fault for fault in told.value.errors() if fault["loc"][0] == name]
    assert 1 <= len(faults) <= FEW


def test_every_body_is_made_of_it() -> None:
    for module in (bodies, parts, routes):
        found = {name: value for name, value in vars(module).items() if name.endswith("Body")}
        assert found
        assert all(issubclass(value, BodyModel) for value in found.values()), module
