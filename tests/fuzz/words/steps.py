"""The step: losses, the order of its parts, what it returns."""

from __future__ import annotations

from tests.fuzz.words.word import Word

# From `out` and `y` to `loss`.
LOSSES = (
    Word("mse", code="loss = F.mse_loss(out, y)", weight=3),
    Word("cross entropy", code="loss = F.cross_entropy(out, y.argmax(-1))", weight=3),
    Word(
        "weighted cross entropy",
        code="loss = F.cross_entropy(out, y.argmax(-1), weight=torch.tensor([1.0, 2.0, 0.5]))",
    ),
    Word(
        "bce by hand",
        code="""
            p, t = torch.sigmoid(out), (y > 0).float()
            loss = -(t * torch.log(p + 1e-8) + (1 - t) * torch.log(1 - p + 1e-8)).mean()
        """,
        likes=("float16",),
        weight=2,
    ),
    Word("huber", code="loss = F.huber_loss(out, y, delta=0.5)"),
    Word("sum", code="loss = (out - y).square().sum()"),
    Word(
        "several",
        code="loss = F.mse_loss(out, y) + 0.1 * out.abs().mean() + 0.01 * out.logsumexp(-1).mean()",
    ),
    Word(
        "weight decay in the loss",
        code="loss = F.mse_loss(out, y) + 0.01 * sum(p.square().sum() for p in model.parameters())",
    ),
    Word("one-hot", code="loss = (out.softmax(-1) - F.one_hot(y.argmax(-1), 3)).square().mean()"),
    Word("kl", code='loss = F.kl_div(out.log_softmax(-1), y.softmax(-1), reduction="batchmean")'),
    Word("label smoothing", code="loss = F.cross_entropy(out, y.argmax(-1), label_smoothing=0.1)"),
    Word("cosine", code="loss = 1 - F.cosine_similarity(out, y, dim=-1, eps=1e-6).mean()"),
    Word(
        "masked",
        code="""
            out = out.clone()
            out[y < -0.5] = 0.
            loss = F.mse_loss(out, y)
        """,
    ),
    Word("constant", code="loss = F.mse_loss(out, y) * torch.tensor(0.7)"),
    Word(
        "annealed float",
        code='loss = F.mse_loss(out, y) * anneal["t"]',
        setup='anneal = {"t": 1.0}',
        before='anneal["t"] *= 0.9',
        calls=10,
    ),
)

# `$loss` computes `out` and `loss` from `x` and `y`.
FORMS = (
    Word(
        "zero_grad first",
        code="""
            optimizer.zero_grad()
            $loss
            loss.backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        weight=4,
    ),
    Word(
        "zero_grad last",
        code="""
            $loss
            loss.backward()
            $edit
            optimizer.step()
            $after
            optimizer.zero_grad()
            return $result
        """,
        weight=2,
    ),
    Word(
        "model.zero_grad",
        code="""
            model.zero_grad()
            $loss
            loss.backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
    ),
    Word(
        "zeros kept, first",
        code="""
            optimizer.zero_grad(set_to_none=False)
            $loss
            loss.backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        clashes=("keeps gradients",),
    ),
    Word(
        "zeros kept, last",
        code="""
            $loss
            loss.backward()
            $edit
            optimizer.step()
            $after
            optimizer.zero_grad(set_to_none=False)
            return $result
        """,
    ),
    Word(
        "accumulation",
        code="""
            optimizer.zero_grad()
            for x, y in zip(x.chunk(2), y.chunk(2)):
                $loss
                (loss / 2).backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        clashes=("batch norm",),
        weight=2,
    ),
    Word(
        "two backwards",
        code="""
            optimizer.zero_grad()
            $loss
            loss.backward(retain_graph=True)
            out.square().mean().backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
    ),
    Word(
        "retained",
        code="""
            optimizer.zero_grad()
            $loss
            loss.backward(retain_graph=True)
            $edit
            optimizer.step()
            $after
            return $result
        """,
    ),
    Word(
        "autograd.backward",
        code="""
            optimizer.zero_grad()
            $loss
            torch.autograd.backward(loss)
            $edit
            optimizer.step()
            $after
            return $result
        """,
        refusable=True,
    ),
    Word(
        "autograd.grad",
        code="""
            optimizer.zero_grad()
            $loss
            for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True)):
                p.grad = None if g is None else g.clone()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        refusable=True,
    ),
    Word(
        "two updates",
        code="""
            for _ in range(2):
                optimizer.zero_grad()
                $loss
                loss.backward()
                $edit
                optimizer.step()
            $after
            return $result
        """,
        clashes=("overflow", "skip='tensor'", "tainted"),
    ),
    Word(
        "two optimizers",
        code="""
            optimizer.zero_grad()
            odd.zero_grad()
            $loss
            loss.backward()
            $edit
            optimizer.step()
            odd.step()
            $after
            return $result
        """,
        setup="""
            trained = params[::2]
            odd = torch.optim.SGD(params[1::2], lr=0.05, momentum=0.9)
            optimizers.append(odd)
        """,
        clashes=("params", "overflow"),
    ),
    Word(
        "gan",
        code="""
            critic_optimizer.zero_grad()
            fake = model(x)
            (F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(y)).mean()).backward()
            critic_optimizer.step()
            optimizer.zero_grad()
            $loss
            loss = loss + F.softplus(-critic(fake)).mean()
            loss.backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        setup="""
            critic = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(), nn.Linear(4, 1))
            models.append(critic)
            critic_optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
            optimizers.append(critic_optimizer)
        """,
        clashes=("overflow", "skip='tensor'", "keeps gradients", "batch norm", "tainted", "running mean"),
    ),
    Word(
        "gan with switches",
        code="""
            critic.requires_grad_(True)
            critic_optimizer.zero_grad()
            (F.softplus(critic(model(x).detach())).mean() + F.softplus(-critic(y)).mean()).backward()
            critic_optimizer.step()
            critic.requires_grad_(False)
            optimizer.zero_grad()
            $loss
            loss = loss + F.softplus(-critic(out)).mean()
            loss.backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        setup="""
            critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
            models.append(critic)
            critic_optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)
            optimizers.append(critic_optimizer)
        """,
        clashes=("overflow", "skip='tensor'", "keeps gradients", "batch norm", "tainted", "running mean"),
        refusable=True,
    ),
    Word(
        "gradient penalty",
        code="""
            optimizer.zero_grad()
            x = x.detach().requires_grad_()
            $loss
            (g,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True)
            loss = loss + 0.1 * g.square().mean()
            loss.backward()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        clashes=("tokens", "attention", "two heads"),
        refusable=True,
    ),
    Word(
        "every second call",
        setup='turn = {"calls": 0}',
        code="""
            $loss
            loss.backward()
            turn["calls"] += 1
            if turn["calls"] % 2 == 0:
                $edit
                optimizer.step()
                $after
                optimizer.zero_grad()
            return $result
        """,
        refusable=True,
        clashes=("overflow",),
    ),
    Word(
        "branch on data",
        code="""
            optimizer.zero_grad()
            $loss
            if loss.detach() < 1e9:
                loss.backward()
                $edit
                optimizer.step()
                $after
            return $result
        """,
        refusable=True,
    ),
    Word(
        "function of a function",
        code="""
            def forward(x, y):
                $loss
                return out, loss

            def update():
                $edit
                optimizer.step()

            optimizer.zero_grad()
            out, loss = forward(x, y)
            loss.backward()
            update()
            $after
            return $result
        """,
        clashes=("diagonal kept for later", "unfolded for later"),
    ),
    Word(
        "print in a loop",
        code="""
            optimizer.zero_grad()
            for i in range(2):
                $loss
                (loss / 2).backward()
                print(end='')
            $edit
            optimizer.step()
            $after
            return $result
        """,
        refusable=True,
    ),
    Word(
        "item in a loop",
        code="""
            total = 0.0
            for i in range(2):
                optimizer.zero_grad()
                $loss
                loss.backward()
                total += loss.item()
                $edit
                optimizer.step()
            $after
            return $result
        """,
        clashes=("overflow", "skip='tensor'", "tainted"),
        refusable=True,
    ),
    Word(
        "item before the update",
        code="""
            optimizer.zero_grad()
            $loss
            loss.backward()
            seen = loss.item()
            $edit
            optimizer.step()
            $after
            return $result
        """,
        refusable=True,
    ),
    Word(
        "disabled callee",
        code="""
            optimizer.zero_grad()
            $loss
            update(loss)
            $after
            return $result
        """,
        setup="""
            @torch.compiler.disable
            def update(loss):
                loss.backward()
                optimizer.step()
        """,
        clashes=("edit",),
        refusable=True,
    ),
    Word(
        "sharpness aware",
        code="""
            optimizer.zero_grad()
            $loss
            loss.backward()
            with torch.no_grad():
                steps = [None if p.grad is None else 0.05 * p.grad / (p.grad.norm() + 1e-6) for p in params]
                for p, e in zip(params, steps):
                    if e is not None:
                        p.add_(e)
            optimizer.zero_grad()
            $loss
            loss.backward()
            with torch.no_grad():
                for p, e in zip(params, steps):
                    if e is not None:
                        p.sub_(e)
            $edit
            optimizer.step()
            $after
            return $result
        """,
        clashes=("overflow", "skip='tensor'", "release"),
        refusable=True,
    ),
)

RESULTS = (
    Word("loss", code="loss", weight=3),
    Word("loss detached", code="loss.detach()"),
    Word("dict", code='{"loss": loss, "out": out}'),
    Word("tuple", code="loss, out.detach()"),
    Word("logits", code="out"),
    Word("nothing", code="None"),
    Word("list with a number", code="[loss, x.shape[0]]"),
    Word("norm of a weight", code="loss.detach(), model.head.weight.norm().detach()"),
)
