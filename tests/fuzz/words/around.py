"""What is done to the model, the optimizer and between the calls: hooks, evaluation, checkpoints."""

from __future__ import annotations

from tests.fuzz.words.word import Word

AROUND = (
    Word("frozen", setup="params.pop(0).requires_grad_(False)"),
    Word("hook on a parameter", setup="params[-1].register_hook(lambda g: g * 0.5)", weight=2),
    Word(
        "hook that freezes a row",
        setup="params[0].register_hook(lambda g: torch.cat([g[:1] * 0, g[1:]]) if g.ndim else g)",
    ),
    Word("hook that clamps", setup="params[0].register_hook(lambda g: g.clamp(-0.01, 0.01))"),
    Word(
        "hook added later",
        before="""
            if call == 1:
                params[-1].register_hook(lambda g: g * 0.5)
        """,
        refusable=True,
    ),
    Word(
        "hook after accumulation",
        setup="params[-1].register_post_accumulate_grad_hook(halve_one)",
        preamble="""
            def halve_one(p):
                p.grad.mul_(0.5)
        """,
        refusable=True,
    ),
    Word(
        "backward hook",
        setup="model.head.register_full_backward_hook(lambda m, i, o: (i[0] * 0.5,))",
        refusable=True,
    ),
    Word("forward hook", setup="model.head.register_forward_hook(lambda m, i, o: o * 1.5)"),
    Word(
        "hook before the update",
        ready="optimizer.register_step_pre_hook(lambda o, a, k: None)",
        refusable=True,
    ),
    Word(
        "hook before the update added later",
        before="""
            if call == 1:
                optimizer.register_step_pre_hook(lambda o, a, k: halve(params))
        """,
        preamble="""
            def halve(params):
                for p in params:
                    if p.grad is not None:
                        p.grad.mul_(0.5)
        """,
        refusable=True,
    ),
    Word(
        "update replaced later",
        before="""
            if call == 1:
                plain = optimizer.step
                optimizer.step = lambda: (params[0].grad.mul_(0.5), plain())
        """,
        clashes=("unused layer", "frozen"),
        refusable=True,
    ),
    Word(
        "evaluation",
        before="""
            if call:
                with torch.no_grad():
                    model.eval()(probe)
                model.train()
        """,
        weight=2,
    ),
    Word(
        "evaluation compiled",
        setup="""
            def evaluate(x):
                return model(x).softmax(-1)
        """,
        before="""
            if call:
                with torch.no_grad():
                    compile(evaluate)(probe)
        """,
        weight=2,
    ),
    Word(
        "gradients from before",
        before="""
            if call == 0:
                model(probe).square().mean().backward()
        """,
        clashes=("batch norm", "convolution and batch norm", "running mean", "gan with switches"),
    ),
    Word(
        "frozen later",
        before="""
            if call == 1:
                params[0].requires_grad_(False)
        """,
        clashes=("autograd.grad", "sharpness aware"),
    ),
    Word(
        "storage replaced",
        before="""
            if call == 1:
                model.head.weight.data = model.head.weight.data.clone()
        """,
    ),
    Word(
        "weights written",
        before="""
            if call == 1:
                with torch.no_grad():
                    model.head.weight.mul_(0.5)
        """,
    ),
    Word(
        "state reloaded",
        before="""
            if call == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        """,
    ),
    Word(
        "model reloaded",
        before="""
            if call == 1:
                model.load_state_dict(model.state_dict())
        """,
    ),
)
