import torch

from fxpass.ir.graph import tensor
from fxpass.ir.marks import SEED
from fxpass.passes.scale_loss import ScaleLoss
from tests.support.graphs import graph_of, inserted_by, targets, training_step


def test_multiplies_the_seed_in_float32() -> None:
    step, (record,) = graph_of(*training_step(), [ScaleLoss()])
    assert record.inserted == 1
    (product,) = inserted_by(step, "scale_loss")
    assert targets([product]) == ["aten.mul.Tensor"]
    assert product.args[1] is step.scaler["scale"]
    assert tensor(product).dtype is torch.float32
    assert step.marks(SEED)[0].args[0] is product


def test_leaves_the_loss_of_the_user_alone() -> None:
    step, _ = graph_of(*training_step(), [ScaleLoss()])
    output = next(n for n in reversed(step.graph.nodes) if n.op == "output")
    assert not any("mul" in str(n.target) for n in output.all_input_nodes)


def test_every_backward_of_the_step_is_scaled() -> None:
    model = torch.nn.Linear(4, 2)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(x: torch.Tensor) -> None:
        for part in x.chunk(3):
            model(part).square().mean().backward()
        opt.step()
        opt.zero_grad()

    graph, (record,) = graph_of(step, [torch.randn(6, 4)], [ScaleLoss()])
    assert record.inserted == 3
    assert len(graph.marks(SEED)) == 3


def test_declines_without_a_loss_scale() -> None:
    _, (record,) = graph_of(*training_step(), [ScaleLoss()], loss_scale=None)
    assert record.inserted == 0
    assert record.declined == ("no optimizer step or no loss scale",)
