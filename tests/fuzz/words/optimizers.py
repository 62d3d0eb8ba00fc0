"""Optimizers, of torch and of users, their parameter groups and schedules."""

from __future__ import annotations

from tests.fuzz.words.word import Word

_LION = """
class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr, "beta": 0.9})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["m"] = torch.zeros_like(p)
                update = torch.tanh(50 * (0.9 * state["m"] + 0.1 * p.grad))
                p.add_(update, alpha=-group["lr"])
                state["m"].mul_(group["beta"]).add_(p.grad, alpha=1 - group["beta"])
"""
_NEIGHBOUR = '''
class Neighbour(torch.optim.Optimizer):
    """Every parameter is drawn to where the next one of its shape was."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            olds = [p.clone() for p in params]
            for i, p in enumerate(params):
                near = next((old for old in olds[i + 1 :] + olds if old.shape == p.shape), p)
                p.add_(p.grad + 0.1 * near, alpha=-group["lr"])
'''
_AVERAGING = '''
class Averaging(torch.optim.Optimizer):
    """SGD that keeps the mean of all weights: its state does not follow from the gradient."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["mean"] = torch.zeros_like(p)
                old = state["mean"].clone()
                state["step"] += 1
                state["mean"].lerp_(p, 1 / state["step"])
                p.add_(p.grad + 0.01 * old, alpha=-group["lr"])
'''


def _stock(*texts: str) -> tuple[Word, ...]:
    odd = ("ASGD", "Rprop", "RMSprop", "Adadelta", "NAdam", "RAdam")  # state that gradients alone do not move
    likes = ("skip='tensor'", "one gradient overflows", "inf at first", "lr by call")
    return tuple(
        Word(
            text,
            code=f"torch.optim.{text.replace('(', '(trained, ', 1)}",
            likes=likes if text.startswith(odd) else ("momentum changes",) if "dampening" in text else (),
        )
        for text in texts
    )


OPTIMIZERS = (
    *_stock(
        "SGD(lr=0.1)",
        "SGD(lr=0.05, momentum=0.9, nesterov=True)",
        "SGD(lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.1)",
        "SGD(lr=0.05, momentum=0.8, maximize=True)",
        "Adam(lr=0.01)",
        "Adam(lr=0.01, amsgrad=True, weight_decay=0.1)",
        "Adam(lr=0.01, betas=(0.0, 0.99))",
        "Adam(lr=0.01, maximize=True, foreach=True)",
        "AdamW(lr=0.01)",
        "AdamW(lr=0.01, amsgrad=True)",
        "AdamW(lr=0.01, eps=0.0)",
        "AdamW(lr=0.01, weight_decay=0.0, betas=(0.9, 0.9999))",
        "NAdam(lr=0.01)",
        "NAdam(lr=0.01, decoupled_weight_decay=True, weight_decay=0.1)",
        "RAdam(lr=0.01)",
        "RAdam(lr=0.01, betas=(0.5, 0.6))",
        "Adamax(lr=0.01)",
        "RMSprop(lr=0.01)",
        "RMSprop(lr=0.01, centered=True, momentum=0.9)",
        "Adagrad(lr=0.05)",
        "Adagrad(lr=0.05, lr_decay=0.1, initial_accumulator_value=0.1)",
        "Adadelta(lr=1.0)",
        "ASGD(lr=0.05, t0=1.0)",
        "ASGD(lr=0.05, lambd=0.1)",
        "Rprop(lr=0.01)",
        "Adafactor(lr=0.01)",
        "SGD(lr=0.1, foreach=True, weight_decay=0.01)",
        "Adam(lr=torch.tensor(0.01), betas=(0.0, 0.0))",
        "Adagrad(lr=0.05, maximize=True, eps=0.0)",
        "Adadelta(lr=0.5, weight_decay=0.1, maximize=True)",
        "Rprop(lr=0.01, etas=(0.8, 1.1), step_sizes=(1e-4, 0.1))",
        "RMSprop(lr=0.01, alpha=0.5, weight_decay=0.1, maximize=True)",
        "Adamax(lr=0.01, weight_decay=0.1)",
        "NAdam(lr=0.01, momentum_decay=0.5)",
    ),
    Word("Lion", code="Lion(trained)", preamble=_LION),
    Word("Neighbour", code="Neighbour(trained)", preamble=_NEIGHBOUR, clashes=("skip='tensor'",), weight=2),
    Word("Averaging", likes=("inf",), code="Averaging(trained)", preamble=_AVERAGING, weight=2),
)

PARAMS = (
    Word("named", code="[(n, p) for n, p in model.named_parameters()]"),
    Word("reversed list", code="params[::-1]"),
    Word("generator", code="(p for p in params)"),
    Word(
        "groups",
        code="""
            [
                {"params": [p for p in params if p.ndim > 1], "lr": 0.02},
                {"params": [p for p in params if p.ndim < 2]},
            ]
        """,
        weight=2,
    ),
    Word("groups, one frozen by lr 0", code='[{"params": params[1:]}, {"params": params[:1], "lr": 0.0}]'),
)

SCHEDULES = (
    Word(
        "warmup from 0",
        ready="scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 2))",
        before="""
            if call:
                scheduler.step()
        """,
        weight=2,
    ),
    Word(
        "lr 0 in the middle",
        before="""
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if call == 1 else 0.02
        """,
    ),
    Word(
        "lr by call",
        before="""
            for group in optimizer.param_groups:
                group["lr"] = 0.01 / (call + 1)
        """,
    ),
    Word(
        "lr tensor",
        before="""
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.02 / (call + 1))
        """,
        clashes=("Adam(lr=0.01, maximize=True, foreach=True)",),
    ),
    Word(
        "lr number, tensor, number",
        before="""
            for group in optimizer.param_groups:
                group["lr"] = torch.tensor(0.05) if call == 1 else 0.01
        """,
        clashes=("Adam(lr=0.01, maximize=True, foreach=True)",),
    ),
    Word(
        "weight decay changes",
        before="""
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.1 * call
        """,
        clashes=("Lion", "Neighbour", "Averaging"),
    ),
    Word(
        "one cycle",
        ready="""
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.05, total_steps=200, cycle_momentum=False
            )
        """,
        before="""
            if call:
                scheduler.step()
        """,
    ),
    Word(
        "betas change",
        before="""
            for group in optimizer.param_groups:
                if "betas" in group:
                    group["betas"] = (0.9 - 0.1 * call, 0.99)
        """,
    ),
    Word(
        "cosine",
        ready="scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)",
        before="""
            if call:
                scheduler.step()
        """,
    ),
    Word(
        "momentum changes",
        before="""
            for group in optimizer.param_groups:
                if group.get("momentum"):
                    group["momentum"] = 0.0 if call == 2 else 0.5
        """,
    ),
)
