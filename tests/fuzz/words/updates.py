"""What a step does around its update, to gradients and to weights."""

from __future__ import annotations

from tests.fuzz.words.word import Word

# Between backward and the update.
EDITS = (
    Word("user clip by norm", code="torch.nn.utils.clip_grad_norm_(params, 0.1)", weight=2),
    Word("user clip by value", code="torch.nn.utils.clip_grad_value_(params, 0.05)"),
    Word(
        "halved",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(0.5)
        """,
        weight=2,
    ),
    Word(
        "divided by rows",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad /= x.shape[0]
        """,
    ),
    Word(
        "decay by hand",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad.add_(p.detach(), alpha=0.1)
        """,
    ),
    Word(
        "another weight",
        code="""
            if params[0].grad is not None:
                params[0].grad.add_(0.1 * params[-1].detach().sum())
        """,
    ),
    Word(
        "normalised gradient",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad.div_(p.grad.norm() + 1e-3)
        """,
    ),
    Word(
        "centralised",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad.sub_(p.grad.mean(dim=0, keepdim=True) if p.ndim > 1 else 0.0)
        """,
    ),
    Word(
        "shifted",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad.add_(torch.full_like(p.grad, 0.01))
        """,
    ),
    Word(
        "diagonal kept for later",
        code="""
            seen = model.head.weight.detach().diagonal()
            old = seen.sum()
        """,
        setup='line = extras["line"] = torch.zeros(3)',
        behind="line.copy_(seen + old)",
    ),
    Word(
        "unfolded for later",
        code="old = model.head.weight.detach().unfold(1, 2, 2).sum((1, 2))",
        setup='line = extras["line"] = torch.zeros(3)',
        behind="line.copy_(old)",
    ),
    Word(
        "diagonal of another weight",
        code="""
            if params[0].grad is not None:
                params[0].grad.add_(0.1 * model.head.weight.detach().diagonal().sum())
        """,
    ),
    Word("dropped", code="params[0].grad = None"),
    Word("zeroed", code="if params[0].grad is not None:\n    params[0].grad.zero_()"),
    Word("copied", code="if params[0].grad is not None:\n    params[0].grad.copy_(params[0].detach() * 0.1)"),
    Word(
        "fixed noise",
        setup="noise = [0.01 * torch.randn(p.shape) for p in params]",
        code="""
            for p, n in zip(params, noise):
                if p.grad is not None:
                    p.grad = p.grad + n
        """,
    ),
    Word(
        "sum of gradients kept",
        setup='total = extras["total"] = torch.zeros(())',
        code="total.add_(sum(p.grad.sum() for p in params if p.grad is not None))",
        tainted=("total",),
        likes=("inf",),
    ),
    Word(
        "replaced",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad = p.grad.clone() * 0.9
        """,
    ),
    Word(
        "gain that overflows",
        code="""
            for p in params:
                if p.grad is not None:
                    p.grad.mul_(gain)
        """,
        setup='gain = extras["gain"] = torch.ones(())',
        before='gain.fill_(float("inf") if call == 1 else 1.0)',
        clashes=(
            "two updates",
            "gan",
            "gan with switches",
            "item in a loop",
            "two optimizers",
            "rotated",
            "clamped",
            "log",
            "sharpness aware",
        ),
    ),
    Word(
        "one gradient overflows",
        code="""
            if params[0].grad is not None:
                params[0].grad.mul_(gain)
        """,
        setup='gain = extras["gain"] = torch.ones(())',
        before='gain.fill_(float("inf") if call == 1 else 1.0)',
        clashes=(
            "gain that overflows",
            "two updates",
            "gan",
            "gan with switches",
            "item in a loop",
            "two optimizers",
            "rotated",
            "clamped",
            "log",
            "sharpness aware",
            "Neighbour",
        ),
    ),
    Word(
        "running norm",
        code="""
            norm = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
            with torch.no_grad():
                running.mul_(0.9).add_(0.1 * norm)
            for p in params:
                if p.grad is not None:
                    p.grad.mul_((running / (norm + 1e-6)).clamp(max=1.0))
        """,
        setup='running = extras["running"] = torch.ones(())',
        tainted=("running",),
        likes=("inf", "nan"),
        weight=2,
    ),
    Word(
        "fisher information",
        code="""
            with torch.no_grad():
                for f, p in zip(fisher, params):
                    if p.grad is not None:
                        f.add_(p.grad.square())
        """,
        setup='fisher = extras["fisher"] = [torch.zeros_like(p) for p in params]',
        tainted=("fisher",),
        likes=("inf", "nan"),
    ),
)

# After the update.
AFTER = (
    Word(
        "ema",
        code="""
            with torch.no_grad():
                for e, p in zip(ema, params):
                    e.lerp_(p, 0.1)
        """,
        setup='ema = extras["ema"] = [p.detach().clone() for p in params]',
        weight=2,
    ),
    Word(
        "norm of the weights",
        code="""
            with torch.no_grad():
                size.copy_(torch.stack([p.norm() for p in params]).sum())
        """,
        setup='size = extras["size"] = torch.zeros(())',
    ),
    Word(
        "diagonal of a weight",
        code="line.copy_(model.head.weight.detach().diagonal())",
        setup='line = extras["line"] = torch.zeros(3)',
        weight=2,
    ),
    Word(
        "unfolded weight",
        code="line.copy_(model.head.weight.detach().unfold(1, 2, 2).sum((1, 2)))",
        setup='line = extras["line"] = torch.zeros(3)',
    ),
    Word(
        "rotated",
        code="""
            with torch.no_grad():
                model.head.weight.copy_(model.head.weight @ rotation)
        """,
        setup="rotation = torch.linalg.qr(torch.randn(4, 4))[0]",
        clashes=("overflow",),
    ),
    Word(
        "rotated there and back",
        code="""
            with torch.no_grad():
                weight = model.head.weight
                frame.copy_(1.0 + weight @ rotation @ rotation.t() - weight)
        """,
        setup="""
            rotation = torch.linalg.qr(torch.randn(4, 4))[0]
            frame = extras["frame"] = torch.zeros(3, 4)
        """,
        exact=("frame",),
    ),
    Word(
        "projected",
        code="""
            with torch.no_grad():
                for p in params:
                    p.mul_(p.norm().clamp(max=2.0) / (p.norm() + 1e-6))
        """,
        clashes=("overflow",),
    ),
    Word(
        "target network",
        setup="""
            target = nn.Linear(4, 3)
            target.load_state_dict(model.head.state_dict())
            models.append(target)
        """,
        code="""
            with torch.no_grad():
                for t, p in zip(target.parameters(), model.head.parameters()):
                    t.mul_(0.9).add_(p, alpha=0.1)
        """,
        clashes=("gan", "gan with switches"),
    ),
    Word(
        "clamped",
        code="""
            with torch.no_grad():
                model.head.weight.clamp_(-0.4, 0.4)
        """,
        clashes=("overflow",),
    ),
    Word(
        "log",
        code="log.append(loss.detach())",
        setup='log = extras["log"] = []',
        clashes=("overflow",),
        calls=10,
    ),
    Word("counter", code='counter["steps"] += 1', setup='counter = {"steps": 0}', calls=10),
    Word(
        "mean of the logits",
        code="seen.lerp_(out.detach().mean(0), 0.1)",
        setup='seen = extras["seen"] = torch.zeros(3)',
        clashes=("overflow",),
    ),
    Word(
        "second look",
        code="""
            with torch.no_grad():
                look.copy_(model.head.weight.square().sum() + model.head.bias.sum())
        """,
        setup='look = extras["look"] = torch.zeros(())',
    ),
    Word(
        "scheduler inside",
        code="inside.step()",
        ready="inside = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)",
        clashes=("schedule",),
    ),
    Word("print after", code="print(end='')"),
)
