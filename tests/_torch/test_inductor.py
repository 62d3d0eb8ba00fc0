"""What Inductor is told while it lowers a step."""

from __future__ import annotations

from torch._inductor.dtype_propagation import DtypePropagationOpsHandler

from fxpass._torch.inductor import dtype_rules_once


def test_the_table_of_dtype_rules_is_one_and_made_once() -> None:
    before = DtypePropagationOpsHandler()
    rules = {name: value for name, value in vars(DtypePropagationOpsHandler).items() if callable(value)}
    with dtype_rules_once():
        inside = DtypePropagationOpsHandler()
        assert inside is before, "one object for all: making it again changes nothing"
        assert DtypePropagationOpsHandler.__init__ is not rules["__init__"]
        assert all(getattr(inside, name, None) for name in rules)
    assert DtypePropagationOpsHandler.__init__ is rules["__init__"]
    assert DtypePropagationOpsHandler() is before
