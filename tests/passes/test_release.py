import torch

from fxpass.ir.graph import Phase, phase
from fxpass.passes.cast import Cast
from fxpass.passes.release import Release
from fxpass.passes.scale_loss import ScaleLoss
from tests.graphs import graph_of, inserted_by, training_step


def test_casts_of_weights_in_backward_depend_on_the_loss() -> None:
    step, (_, _, record) = graph_of(*training_step(), [ScaleLoss(), Cast(), Release()])
    ties = [n for n in inserted_by(step, "release") if "where" in str(n.target)]
    assert record.inserted == len(ties) + 3
    assert ties
    assert all(phase(n) is Phase.BACKWARD for n in ties)
    for tie in ties:
        (cast,) = tie.users
        assert cast.kwargs["dtype"] is torch.float16


def test_the_tie_is_bitwise_the_weight() -> None:
    for loss in (0.0, 1.5, float("inf"), float("-inf"), float("nan")):
        value = torch.tensor(loss)
        never = torch.logical_and(value != value, value == value)
        weight = torch.tensor([0.0, -0.0, 1.0, float("inf"), 1e-40])
        assert torch.equal(torch.where(never, 0.0, weight).view(torch.int32), weight.view(torch.int32))


def test_leaves_a_float32_step_alone() -> None:
    step, (record,) = graph_of(*training_step(), [Release()], dtype="float32")
    assert record.inserted == 0
    assert not inserted_by(step, "release")
