import pytest
import torch
from torch import Tensor, nn

from fxpass.lower import half_gemm


def reference(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double()).half()


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 17])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 4), (33, 17, 9), (4, 0, 3), (0, 4, 3)])
def test_equals_a_float16_product_with_exact_accumulation(
    shape: tuple[int, int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_gemm, "BLOCK", block)
    m, k, n = shape
    a, b, bias = torch.randn(m, k).half(), torch.randn(n, k).half().t(), torch.randn(n).half()
    torch.testing.assert_close(torch.ops.fxpass.half_mm(a, b), reference(a, b), rtol=2e-3, atol=2e-3)
    expected = (a.double() @ b.double() + bias.double()).half()
    torch.testing.assert_close(torch.ops.fxpass.half_addmm(bias, a, b), expected, rtol=2e-3, atol=2e-3)


def test_overflow_rounds_to_inf() -> None:
    a = torch.full((2, 4), 300.0).half()
    assert torch.isinf(torch.ops.fxpass.half_mm(a, a.t())).all()


def test_fakes_agree() -> None:
    a, b = torch.randn(3, 4).half(), torch.randn(4, 5).half()
    torch.library.opcheck(torch.ops.fxpass.half_mm.default, (a, b))
    torch.library.opcheck(torch.ops.fxpass.half_addmm.default, (torch.randn(5).half(), a, b))


@pytest.mark.parametrize("has_gemm", [True, False])
def test_a_step_gives_the_same_either_way(has_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import fxpass
    from fxpass.lower import callable as lowering

    monkeypatch.setattr(lowering._torch, "cpu_has_half_gemm", lambda: has_gemm)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    @torch.compile(backend=fxpass.MixedPrecision(codegen="eager"))
    def step(x: Tensor) -> Tensor:
        loss = model(x).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        return loss

    losses = [step(torch.linspace(0, 1, 2 * 64).reshape(2, 1, 8, 8)).item() for _ in range(3)]
    assert losses == pytest.approx([0.0118, 0.0106, 0.0095], abs=0.05)
    assert losses == sorted(losses, reverse=True)
