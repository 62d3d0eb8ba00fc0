from fxpass import MixedPrecision
from fxpass.ir.marks import MARK
from fxpass.passes import PASSES, passes_for
from tests.support.graphs import graph_of, training_step


def test_no_mark_is_left_and_every_write_is_kept() -> None:
    step, records = graph_of(*training_step(), passes_for(MixedPrecision()))
    assert not [n for n in step.graph.nodes if n.target is MARK]
    writes = [n for n in step.graph.nodes if "copy_" in str(n.target)]
    assert len(writes) >= 4
    assert records[-1].name == "finish"
    assert records[-1].removed > 0


def test_names_files_and_classes_agree() -> None:
    for cls in PASSES:
        assert cls.__module__ == f"fxpass.passes.{cls.name}"
        assert cls.__name__.lower() == cls.name.replace("_", "")
        assert cls.__doc__
