import torch

from fxpass.ir.graph import tensor
from fxpass.ir.marks import GRAD, READ
from fxpass.passes.cast import Cast
from fxpass.passes.unscale import Unscale
from tests.support.graphs import graph_of, inserted_by, targets, training_step


def test_every_gradient_is_unscaled_once_in_float32() -> None:
    step, records = graph_of(*training_step(), [Cast(), Unscale()])
    reads = step.marks(READ)
    assert len(reads) == len(step.marks(GRAD)) == 4
    for read in reads:
        product = read.all_input_nodes[0]
        assert str(product.target) == "aten.mul.Tensor"
        assert tensor(product).dtype is torch.float32
        assert targets([product.all_input_nodes[1]]) == ["aten.reciprocal.default"]
    assert records[1].inserted >= 5


def test_one_reciprocal_for_all_gradients() -> None:
    step, _ = graph_of(*training_step(), [Unscale()], dtype="float32", loss_scale=8.0)
    made = inserted_by(step, "unscale")
    assert targets(made).count("aten.reciprocal.default") == 1


def test_declines_without_a_loss_scale() -> None:
    _, (record,) = graph_of(*training_step(), [Unscale()], loss_scale=None)
    assert (record.inserted, record.declined) == (0, ("no optimizer step or no loss scale",))
