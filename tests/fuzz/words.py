"""The words of the grammar: every feature of a program is one entry here, text and facts about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Word:
    """A feature: text for the holes of the program's template, and what may stand beside it."""

    name: str
    code: str = ""  # fills the hole that the word was drawn for
    init: str = ""  # lines of Model.__init__
    whole: str = ""  # the model as an expression, instead of a class
    setup: str = ""  # lines of build(), behind the model
    behind: str = ""  # lines of the step, after the update
    ready: str = ""  # lines of build(), behind the optimizer
    before: str = ""  # lines that the host runs before each call of the step; `call` counts from 0
    preamble: str = ""  # lines of the module
    inputs: str = "floats"  # what the model takes: floats, tokens, tokens32, sequence or image
    tainted: tuple[str, ...] = ()  # names in `extras` whose value depends on a gradient
    exact: tuple[str, ...] = ()  # names in `extras` that no dtype may round
    clashes: tuple[str, ...] = ()  # names of words, or of their kinds, that it cannot stand beside
    likes: tuple[str, ...] = ()  # names of words that it is often drawn with: together they find faults
    refusable: bool = False  # an FxpassError is a right answer
    calls: int = 0  # how many calls it takes to matter
    weight: float = 1.0


MODELS = (
    Word(
        "mlp",
        init="self.first = nn.Linear(4, 5)\nself.second = nn.Linear(5, 4)",
        code="h = self.second(torch.relu(self.first(x)))",
        weight=3,
    ),
    Word(
        "sequential",
        whole="nn.Sequential()\nmodel.first = nn.Linear(4, 4)\nmodel.tanh = nn.Tanh()\nmodel.head = nn.Linear(4, 3)",
        clashes=("trick",),
        likes=("print in a loop", "item in a loop", "disabled callee"),
        weight=2,
    ),
    Word(
        "three equal layers",
        init="self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])",
        code="h = torch.tanh(self.layers(x))",
        likes=("Neighbour", "Averaging"),
        weight=2,
    ),
    Word("one layer", init="self.first = nn.Linear(4, 4, bias=False)", code="h = torch.tanh(self.first(x))"),
    Word(
        "layer norm",
        init="self.first = nn.Linear(4, 4)\nself.norm = nn.LayerNorm(4)",
        code="h = F.gelu(self.norm(self.first(x)))",
        weight=2,
    ),
    Word(
        "group norm",
        init="self.first = nn.Linear(4, 4)\nself.norm = nn.GroupNorm(2, 4)",
        code="h = F.silu(self.norm(self.first(x)))",
    ),
    Word(
        "batch norm",
        init="self.first = nn.Linear(4, 4)\nself.norm = nn.BatchNorm1d(4)",
        code="h = torch.relu(self.norm(self.first(x)))",
        clashes=("single row", "small chunks"),
    ),
    Word(
        "shared layer",
        init="self.first = nn.Linear(4, 4)",
        code="h = self.first(torch.tanh(self.first(x)))",
    ),
    Word(
        "transposed weight",
        init="self.first = nn.Linear(4, 5, bias=False)",
        code="h = F.linear(torch.tanh(self.first(x)), self.first.weight.t())",
    ),
    Word(
        "tied parameter",
        init="self.first = nn.Linear(4, 4)\nself.second = nn.Linear(4, 4)\n"
        "self.second.weight = self.first.weight",
        code="h = self.second(torch.sigmoid(self.first(x)))",
    ),
    Word(
        "bare parameters",
        init="self.matrix = nn.Parameter(torch.randn(4, 4) * 0.5)\nself.gain = nn.Parameter(torch.tensor(1.5))",
        code="h = torch.tanh(x @ self.matrix + self.matrix.diagonal()) * self.gain",
    ),
    Word(
        "weight normalised",
        init="self.direction = nn.Parameter(torch.randn(4, 4))\nself.length = nn.Parameter(torch.ones(4, 1))",
        code="weight = self.direction / self.direction.norm(dim=1, keepdim=True) * self.length\n"
        "h = torch.tanh(F.linear(x, weight))",
    ),
    Word(
        "unfolded input",
        init="self.first = nn.Linear(6, 4)",
        code="h = torch.relu(self.first(x.unfold(1, 2, 1).reshape(x.shape[0], 6)))",
    ),
    Word(
        "expanded parameter",
        init="self.first = nn.Linear(4, 4)\nself.scale = nn.Parameter(torch.ones(1))",
        code="h = self.first(x) * self.scale.expand(x.shape[0], 4)",
    ),
    Word(
        "running mean",
        init='self.first = nn.Linear(4, 4)\nself.register_buffer("mean", torch.zeros(4))',
        code="h = self.first(x)\nwith torch.no_grad():\n    self.mean.lerp_(h.mean(0), 0.1)\nh = h - self.mean",
    ),
    Word(
        "unused layer",
        init="self.first = nn.Linear(4, 4)\nself.unused = nn.Linear(4, 2)",
        code="h = torch.tanh(self.first(x))",
    ),
    Word(
        "embedding",
        likes=(
            "warmup from 0",
            "lr 0 in the middle",
        ),
        init="self.embedding = nn.Embedding(7, 4)",
        code="h = self.embedding(x).mean(1)",
        inputs="tokens",
        weight=3,
    ),
    Word(
        "embedding of int32",
        init="self.embedding = nn.Embedding(7, 4)",
        code="h = self.embedding(x).sum(1)",
        inputs="tokens32",
    ),
    Word(
        "embedding with padding",
        likes=("warmup from 0",),
        init="self.embedding = nn.Embedding(7, 4, padding_idx=0)\nself.first = nn.Linear(4, 4)",
        code="h = torch.tanh(self.first(self.embedding(x).mean(1)))",
        inputs="tokens",
    ),
    Word(
        "embedding tied to a linear",
        likes=("warmup from 0",),
        init="self.embedding = nn.Embedding(7, 4)\nself.out = nn.Linear(4, 7, bias=False)\n"
        "self.out.weight = self.embedding.weight",
        code="h = torch.tanh(self.out(self.embedding(x).mean(1)))[:, :4]",
        inputs="tokens",
    ),
    Word(
        "convolution",
        init="self.conv = nn.Conv2d(2, 4, 3, padding=1)",
        code="h = torch.relu(self.conv(x)).mean((2, 3))",
        inputs="image",
    ),
    Word(
        "convolution and batch norm",
        init="self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)\nself.norm = nn.BatchNorm2d(4)",
        code="h = F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).mean((2, 3))",
        inputs="image",
    ),
    Word(
        "convolution and group norm",
        init="self.conv = nn.Conv2d(2, 4, 3)\nself.norm = nn.GroupNorm(2, 4)",
        code="h = F.relu(self.norm(self.conv(x))).amax((2, 3))",
        inputs="image",
    ),
    Word(
        "attention",
        init="self.qkv = nn.Linear(4, 12)\nself.proj = nn.Linear(4, 4)",
        code="q, k, v = self.qkv(x).chunk(3, -1)\n"
        "h = self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1)",
        inputs="sequence",
    ),
    Word(
        "attention by hand",
        init='self.qkv = nn.Linear(4, 12)\nself.register_buffer("mask", torch.ones(5, 5).tril() == 0)',
        code="q, k, v = self.qkv(x).chunk(3, -1)\n"
        'scores = (q @ k.mT / 2).masked_fill(self.mask, float("-inf"))\n'
        "h = (scores.softmax(-1) @ v)[:, -1]",
        inputs="sequence",
    ),
    Word(
        "two heads",
        init="self.attention = nn.MultiheadAttention(4, 2, batch_first=True)",
        code="h = self.attention(x, x, x, need_weights=False)[0].mean(1)",
        inputs="sequence",
    ),
    Word(
        "recurrent cell",
        init="self.cell = nn.GRUCell(4, 4)",
        code="h = x.new_zeros(x.shape[0], 4)\nfor token in x.unbind(1)[:3]:\n    h = self.cell(token, h)",
        inputs="sequence",
    ),
)

# On the hidden activations `h`, of shape (rows, 4), before the last layer.
TRICKS = (
    Word("constant tensor", code="h = h * torch.tensor(0.5)", weight=2),
    Word("constant vector", code="h = h + torch.tensor([0.1, 0.2, 0.3, 0.4])"),
    Word("write of a column", code="h = h.clone()\nh[..., 0] = 0", weight=2),
    Word("write by a mask", code="h = h.clone()\nh[h > 0.5] = 0.", weight=2),
    Word("write into a view", code="h = h.clone()\nh[:, 1:3].mul_(0.5)"),
    Word("in place", code="h = (h * 1.0).add_(0.1).relu_()"),
    Word("chunks swapped", code="h = torch.cat(h.chunk(2, -1)[::-1], -1)"),
    Word("unfold", code="h = h.unfold(-1, 2, 2).flatten(-2)"),
    Word("diagonal", code="h = h + h.unsqueeze(-1).expand(-1, -1, 4).diagonal(dim1=-2, dim2=-1)"),
    Word("normalised", code="h = h / (h.norm(dim=-1, keepdim=True) + 1e-6)"),
    Word("where", code="h = torch.where(h > 0, h, torch.zeros(()))"),
    Word("masked fill", code="h = h.masked_fill(h < -1, -1.0)"),
    Word("arange", code="h = h + 0.1 * torch.arange(4.0)"),
    Word("rows of ones", code="h = h + torch.ones(h.shape[0], 1)"),
    Word("cast of float32", code="h = h.to(x.device, torch.float32)"),
    Word("detached mean", code="h = h - h.detach().mean()"),
    Word("index of rows", code="h = h[torch.arange(h.shape[0]).flip(0)]"),
    Word("sorted", code="h = h.sort(-1).values"),
    Word("scatter", code="h = torch.zeros_like(h).scatter_add(1, h.argsort(-1), h)"),
    Word(
        "inverse", code="h = h @ torch.linalg.inv(3 * torch.eye(4) + 0.1 * h.mT @ h)", clashes=("overflow",)
    ),
    Word("cholesky", code="h = h @ torch.linalg.cholesky(torch.eye(4) + h.mT @ h)", clashes=("overflow",)),
    Word(
        "checkpoint",
        code="h = checkpoint(lambda z: torch.tanh(z) * z, h, use_reentrant=False)",
        preamble="from torch.utils.checkpoint import checkpoint",
    ),
    Word(
        "straight-through clamp",
        code="h = Clamped.apply(h)",
        preamble="""
class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, g):
        return g.clamp(-0.01, 0.01)
""",
        refusable=True,
    ),
    Word(
        "straight-through sign",
        code="h = Signed.apply(h)",
        preamble="""
class Signed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, g):
        return g / (g.norm() + 1e-3)
""",
        refusable=True,
    ),
    Word(
        "hook on an activation",
        code="h = h * 1.0\nif h.requires_grad:\n    h.register_hook(lambda g: g * 0.5)",
        refusable=True,
    ),
    Word("assert", code='assert not (h > 1e30).any(), "too large"', refusable=True, clashes=("overflow",)),
)

LOSSES = (
    Word("mse", code="loss = F.mse_loss(out, y)", weight=3),
    Word("cross entropy", code="loss = F.cross_entropy(out, y.argmax(-1))", weight=3),
    Word(
        "weighted cross entropy",
        code="loss = F.cross_entropy(out, y.argmax(-1), weight=torch.tensor([1.0, 2.0, 0.5]))",
    ),
    Word(
        "bce by hand",
        likes=("float16",),
        code="p, t = torch.sigmoid(out), (y > 0).float()\n"
        "loss = -(t * torch.log(p + 1e-8) + (1 - t) * torch.log(1 - p + 1e-8)).mean()",
        weight=2,
    ),
    Word("huber", code="loss = F.huber_loss(out, y, delta=0.5)"),
    Word("sum", code="loss = (out - y).square().sum()"),
    Word(
        "several", code="loss = F.mse_loss(out, y) + 0.1 * out.abs().mean() + 0.01 * out.logsumexp(-1).mean()"
    ),
    Word(
        "weight decay in the loss",
        code="loss = F.mse_loss(out, y) + 0.01 * sum(p.square().sum() for p in model.parameters())",
    ),
    Word(
        "one-hot",
        code="loss = (out.softmax(-1) - F.one_hot(y.argmax(-1), 3)).square().mean()",
    ),
    Word("kl", code='loss = F.kl_div(out.log_softmax(-1), y.softmax(-1), reduction="batchmean")'),
    Word("label smoothing", code="loss = F.cross_entropy(out, y.argmax(-1), label_smoothing=0.1)"),
    Word("cosine", code="loss = 1 - F.cosine_similarity(out, y, dim=-1, eps=1e-6).mean()"),
    Word("masked", code="out = out.clone()\nout[y < -0.5] = 0.\nloss = F.mse_loss(out, y)"),
    Word("constant", code="loss = F.mse_loss(out, y) * torch.tensor(0.7)"),
    Word(
        "annealed float",
        setup='anneal = {"t": 1.0}',
        before='anneal["t"] *= 0.9',
        code='loss = F.mse_loss(out, y) * anneal["t"]',
        calls=10,
    ),
)

# The step: $loss computes `out` and `loss` from x and y.
FORMS = (
    Word(
        "zero_grad first",
        code="optimizer.zero_grad()\n$loss\nloss.backward()\n$edit\noptimizer.step()\n$after\nreturn $result",
        weight=4,
    ),
    Word(
        "zero_grad last",
        code="$loss\nloss.backward()\n$edit\noptimizer.step()\n$after\noptimizer.zero_grad()\nreturn $result",
        weight=2,
    ),
    Word(
        "model.zero_grad",
        code="model.zero_grad()\n$loss\nloss.backward()\n$edit\noptimizer.step()\n$after\nreturn $result",
    ),
    Word(
        "zeros kept, first",
        code="optimizer.zero_grad(set_to_none=False)\n$loss\nloss.backward()\n$edit\noptimizer.step()\n$after\n"
        "return $result",
        clashes=("keeps gradients",),
    ),
    Word(
        "zeros kept, last",
        code="$loss\nloss.backward()\n$edit\noptimizer.step()\n$after\noptimizer.zero_grad(set_to_none=False)\n"
        "return $result",
    ),
    Word(
        "accumulation",
        code="optimizer.zero_grad()\nfor x, y in zip(x.chunk(2), y.chunk(2)):\n    $loss\n    (loss / 2).backward()\n"
        "$edit\noptimizer.step()\n$after\nreturn $result",
        clashes=("batch norm",),
        weight=2,
    ),
    Word(
        "two backwards",
        code="optimizer.zero_grad()\n$loss\nloss.backward(retain_graph=True)\nout.square().mean().backward()\n"
        "$edit\noptimizer.step()\n$after\nreturn $result",
    ),
    Word(
        "retained",
        code="optimizer.zero_grad()\n$loss\nloss.backward(retain_graph=True)\n"
        "$edit\noptimizer.step()\n$after\nreturn $result",
    ),
    Word(
        "autograd.backward",
        code="optimizer.zero_grad()\n$loss\ntorch.autograd.backward(loss)\n"
        "$edit\noptimizer.step()\n$after\nreturn $result",
        refusable=True,
    ),
    Word(
        "autograd.grad",
        code="optimizer.zero_grad()\n$loss\n"
        "for p, g in zip(params, torch.autograd.grad(loss, params, allow_unused=True)):\n    p.grad = None if g is None else g.clone()\n"
        "$edit\noptimizer.step()\n$after\nreturn $result",
        refusable=True,
    ),
    Word(
        "two updates",
        code="for _ in range(2):\n    optimizer.zero_grad()\n    $loss\n    loss.backward()\n    $edit\n"
        "    optimizer.step()\n$after\nreturn $result",
        clashes=("overflow", "skip='tensor'", "tainted"),
    ),
    Word(
        "two optimizers",
        setup="trained = params[::2]\nodd = torch.optim.SGD(params[1::2], lr=0.05, momentum=0.9)\noptimizers.append(odd)",
        code="optimizer.zero_grad()\nodd.zero_grad()\n$loss\nloss.backward()\n$edit\noptimizer.step()\nodd.step()\n"
        "$after\nreturn $result",
        clashes=("params", "overflow"),
    ),
    Word(
        "gan",
        setup="critic = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(), nn.Linear(4, 1))\nmodels.append(critic)\n"
        "critic_optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)\noptimizers.append(critic_optimizer)",
        code="critic_optimizer.zero_grad()\nfake = model(x)\n"
        "(F.softplus(critic(fake.detach())).mean() + F.softplus(-critic(y)).mean()).backward()\n"
        "critic_optimizer.step()\noptimizer.zero_grad()\n$loss\n"
        "loss = loss + F.softplus(-critic(fake)).mean()\nloss.backward()\n$edit\noptimizer.step()\n$after\n"
        "return $result",
        clashes=("overflow", "skip='tensor'", "keeps gradients", "batch norm", "tainted", "running mean"),
    ),
    Word(
        "gan with switches",
        setup="critic = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))\nmodels.append(critic)\n"
        "critic_optimizer = torch.optim.SGD(critic.parameters(), lr=0.05)\noptimizers.append(critic_optimizer)",
        code="critic.requires_grad_(True)\ncritic_optimizer.zero_grad()\n"
        "(F.softplus(critic(model(x).detach())).mean() + F.softplus(-critic(y)).mean()).backward()\n"
        "critic_optimizer.step()\ncritic.requires_grad_(False)\noptimizer.zero_grad()\n$loss\n"
        "loss = loss + F.softplus(-critic(out)).mean()\nloss.backward()\n$edit\noptimizer.step()\n$after\n"
        "return $result",
        clashes=("overflow", "skip='tensor'", "keeps gradients", "batch norm", "tainted", "running mean"),
        refusable=True,
    ),
    Word(
        "print in a loop",
        code="optimizer.zero_grad()\nfor i in range(2):\n    $loss\n    (loss / 2).backward()\n    print(end='')\n"
        "$edit\noptimizer.step()\n$after\nreturn $result",
        refusable=True,
    ),
    Word(
        "item in a loop",
        code="total = 0.0\nfor i in range(2):\n    optimizer.zero_grad()\n    $loss\n    loss.backward()\n"
        "    total += loss.item()\n    $edit\n    optimizer.step()\n$after\nreturn $result",
        clashes=("overflow", "skip='tensor'", "tainted"),
        refusable=True,
    ),
    Word(
        "item before the update",
        code="optimizer.zero_grad()\n$loss\nloss.backward()\nseen = loss.item()\n$edit\noptimizer.step()\n$after\n"
        "return $result",
        refusable=True,
    ),
    Word(
        "disabled callee",
        setup="@torch.compiler.disable\ndef update(loss):\n    loss.backward()\n    optimizer.step()",
        code="optimizer.zero_grad()\n$loss\nupdate(loss)\n$after\nreturn $result",
        refusable=True,
        clashes=("edit",),
    ),
    Word(
        "sharpness aware",
        code="optimizer.zero_grad()\n$loss\nloss.backward()\nwith torch.no_grad():\n"
        "    steps = [None if p.grad is None else 0.05 * p.grad / (p.grad.norm() + 1e-6) for p in params]\n"
        "    for p, e in zip(params, steps):\n        if e is not None:\n            p.add_(e)\n"
        "optimizer.zero_grad()\n$loss\nloss.backward()\nwith torch.no_grad():\n    for p, e in zip(params, steps):\n"
        "        if e is not None:\n            p.sub_(e)\n$edit\noptimizer.step()\n$after\nreturn $result",
        clashes=("overflow", "skip='tensor'", "release"),
        refusable=True,
    ),
)

_EACH = "for p in params:\n    if p.grad is not None:\n        "

# Between backward and the update.
EDITS = (
    Word("user clip by norm", code="torch.nn.utils.clip_grad_norm_(params, 0.1)", weight=2),
    Word("user clip by value", code="torch.nn.utils.clip_grad_value_(params, 0.05)"),
    Word("halved", code=_EACH + "p.grad.mul_(0.5)", weight=2),
    Word("divided by rows", code=_EACH + "p.grad /= x.shape[0]"),
    Word("decay by hand", code=_EACH + "p.grad.add_(p, alpha=0.1)"),
    Word(
        "another weight",
        code="if params[0].grad is not None:\n    params[0].grad.add_(0.1 * params[-1].detach().sum())",
    ),
    Word("normalised gradient", code=_EACH + "p.grad.div_(p.grad.norm() + 1e-3)"),
    Word("centralised", code=_EACH + "p.grad.sub_(p.grad.mean(dim=0, keepdim=True) if p.ndim > 1 else 0.0)"),
    Word("shifted", code=_EACH + "p.grad.add_(torch.full_like(p.grad, 0.01))"),
    Word(
        "diagonal kept for later",
        setup='line = extras["line"] = torch.zeros(3)',
        code="seen = model.head.weight.detach().diagonal()\nold = seen.sum()",
        behind="line.copy_(seen + old)",
    ),
    Word(
        "unfolded for later",
        setup='line = extras["line"] = torch.zeros(3)',
        code="old = model.head.weight.detach().unfold(1, 2, 2).sum((1, 2))",
        behind="line.copy_(old)",
    ),
    Word(
        "diagonal of another weight",
        code="if params[0].grad is not None:\n    params[0].grad.add_(0.1 * model.head.weight.detach().diagonal().sum())",
    ),
    Word("replaced", code=_EACH + "p.grad = p.grad.clone() * 0.9"),
    Word(
        "gain that overflows",
        setup='gain = extras["gain"] = torch.ones(())',
        before='gain.fill_(float("inf") if call == 1 else 1.0)',
        code=_EACH + "p.grad.mul_(gain)",
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
        setup='gain = extras["gain"] = torch.ones(())',
        before='gain.fill_(float("inf") if call == 1 else 1.0)',
        code="if params[0].grad is not None:\n    params[0].grad.mul_(gain)",
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
        likes=(
            "inf",
            "nan",
        ),
        setup='running = extras["running"] = torch.ones(())',
        code="norm = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()\n"
        "with torch.no_grad():\n    running.mul_(0.9).add_(0.1 * norm)\n"
        "for p in params:\n    if p.grad is not None:\n        p.grad.mul_((running / (norm + 1e-6)).clamp(max=1.0))",
        tainted=("running",),
        weight=2,
    ),
    Word(
        "fisher information",
        likes=(
            "inf",
            "nan",
        ),
        setup='fisher = extras["fisher"] = [torch.zeros_like(p) for p in params]',
        code="with torch.no_grad():\n    for f, p in zip(fisher, params):\n        if p.grad is not None:\n"
        "            f.add_(p.grad.square())",
        tainted=("fisher",),
    ),
)

# After the update.
AFTER = (
    Word(
        "ema",
        setup='ema = extras["ema"] = [p.detach().clone() for p in params]',
        code="with torch.no_grad():\n    for e, p in zip(ema, params):\n        e.lerp_(p, 0.1)",
        weight=2,
    ),
    Word(
        "norm of the weights",
        setup='size = extras["size"] = torch.zeros(())',
        code="with torch.no_grad():\n    size.copy_(torch.stack([p.norm() for p in params]).sum())",
    ),
    Word(
        "diagonal of a weight",
        setup='line = extras["line"] = torch.zeros(3)',
        code="line.copy_(model.head.weight.detach().diagonal())",
        weight=2,
    ),
    Word(
        "unfolded weight",
        setup='line = extras["line"] = torch.zeros(3)',
        code="line.copy_(model.head.weight.detach().unfold(1, 2, 2).sum((1, 2)))",
    ),
    Word(
        "rotated",
        setup="rotation = torch.linalg.qr(torch.randn(4, 4))[0]",
        code="with torch.no_grad():\n    model.head.weight.copy_(model.head.weight @ rotation)",
        clashes=("overflow",),
    ),
    Word(
        "rotated there and back",
        setup="rotation = torch.linalg.qr(torch.randn(4, 4))[0]\n"
        'frame = extras["frame"] = torch.zeros(3, 4)',
        code="with torch.no_grad():\n    weight = model.head.weight\n"
        "    frame.copy_(1.0 + weight @ rotation @ rotation.t() - weight)",
        exact=("frame",),
    ),
    Word(
        "clamped",
        code="with torch.no_grad():\n    model.head.weight.clamp_(-0.4, 0.4)",
        clashes=("overflow",),
    ),
    Word(
        "log",
        setup='log = extras["log"] = []',
        code="log.append(loss.detach())",
        clashes=("overflow",),
        calls=10,
    ),
    Word(
        "counter",
        setup='counter = {"steps": 0}',
        code='counter["steps"] += 1',
        calls=10,
    ),
    Word(
        "mean of the logits",
        setup='seen = extras["seen"] = torch.zeros(3)',
        code="seen.lerp_(out.detach().mean(0), 0.1)",
        clashes=("overflow",),
    ),
    Word(
        "second look",
        setup='look = extras["look"] = torch.zeros(())',
        code="with torch.no_grad():\n    look.copy_(model.head.weight.square().sum() + model.head.bias.sum())",
    ),
    Word(
        "scheduler inside",
        ready="inside = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)",
        code="inside.step()",
        clashes=("schedule",),
    ),
    Word("print after", code="print(end='')"),
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
    ),
    Word("Lion", code="Lion(trained)", preamble=_LION),
    Word("Neighbour", code="Neighbour(trained)", preamble=_NEIGHBOUR, clashes=("skip='tensor'",), weight=2),
    Word("Averaging", likes=("inf",), code="Averaging(trained)", preamble=_AVERAGING, weight=2),
)

PARAMS = (
    Word("reversed list", code="params[::-1]"),
    Word("generator", code="(p for p in params)"),
    Word(
        "groups",
        code='[{"params": [p for p in params if p.ndim > 1], "lr": 0.02},'
        ' {"params": [p for p in params if p.ndim < 2]}]',
        weight=2,
    ),
    Word(
        "groups, one frozen by lr 0",
        code='[{"params": params[1:]}, {"params": params[:1], "lr": 0.0}]',
    ),
)

_EACH_GROUP = "for group in optimizer.param_groups:\n    "
SCHEDULES = (
    Word(
        "warmup from 0",
        ready="scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 2))",
        before="if call:\n    scheduler.step()",
        weight=2,
    ),
    Word("lr 0 in the middle", before=_EACH_GROUP + 'group["lr"] = 0.0 if call == 1 else 0.02'),
    Word("lr by call", before=_EACH_GROUP + 'group["lr"] = 0.01 / (call + 1)'),
    Word(
        "lr tensor",
        before=_EACH_GROUP + 'group["lr"] = torch.tensor(0.02 / (call + 1))',
        clashes=("Adam(lr=0.01, maximize=True, foreach=True)",),
    ),
    Word(
        "lr number, tensor, number",
        before=_EACH_GROUP + 'group["lr"] = torch.tensor(0.05) if call == 1 else 0.01',
        clashes=("Adam(lr=0.01, maximize=True, foreach=True)",),
    ),
    Word(
        "weight decay changes",
        before=_EACH_GROUP + 'group["weight_decay"] = 0.1 * call',
        clashes=("Lion", "Neighbour", "Averaging"),
    ),
    Word(
        "cosine",
        ready="scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)",
        before="if call:\n    scheduler.step()",
    ),
    Word(
        "momentum changes",
        before=_EACH_GROUP
        + 'if group.get("momentum"):\n        group["momentum"] = 0.0 if call == 2 else 0.5',
    ),
)

# What else is done to the model or around the step.
AROUND = (
    Word("frozen", setup="params.pop(0).requires_grad_(False)"),
    Word("hook on a parameter", setup="params[-1].register_hook(lambda g: g * 0.5)", weight=2),
    Word(
        "hook that freezes a row",
        setup="params[0].register_hook(lambda g: torch.cat([torch.zeros_like(g[:1]), g[1:]]) if g.ndim else g)",
    ),
    Word("hook that clamps", setup="params[0].register_hook(lambda g: g.clamp(-0.01, 0.01))"),
    Word(
        "hook added later",
        before="if call == 1:\n    params[-1].register_hook(lambda g: g * 0.5)",
        refusable=True,
    ),
    Word(
        "hook after accumulation",
        setup="params[-1].register_post_accumulate_grad_hook(halve_one)",
        preamble="def halve_one(p):\n    p.grad.mul_(0.5)",
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
        before="if call == 1:\n    optimizer.register_step_pre_hook(lambda o, a, k: halve(params))",
        preamble="def halve(params):\n    for p in params:\n        if p.grad is not None:\n            p.grad.mul_(0.5)",
        refusable=True,
    ),
    Word(
        "update replaced later",
        before="if call == 1:\n    plain = optimizer.step\n    optimizer.step = lambda: (params[0].grad.mul_(0.5), plain())",
        refusable=True,
        clashes=("unused layer", "frozen"),
    ),
    Word(
        "evaluation",
        before="if call:\n    with torch.no_grad():\n        model.eval()(probe)\n    model.train()",
        weight=2,
    ),
    Word(
        "evaluation compiled",
        before="if call:\n    with torch.no_grad():\n        compile(evaluate)(probe)",
        setup="def evaluate(x):\n    return model(x).softmax(-1)",
        weight=2,
    ),
    Word("state reloaded", before="if call == 1:\n    optimizer.load_state_dict(optimizer.state_dict())"),
    Word("model reloaded", before="if call == 1:\n    model.load_state_dict(model.state_dict())"),
)

# Options: lines of the dict.
DTYPES = (
    Word("float32", code='"dtype": "float32"', weight=5),
    Word(
        "float16",
        likes=(
            "rotated",
            "bce by hand",
        ),
        code='"loss_scale": fxpass.DynamicLossScale(init_scale=256.0, growth_interval=2)',
        weight=2,
    ),
    Word("float16, headroom", code='"loss_scale": fxpass.HeadroomLossScale(init_scale=256.0)'),
    Word("float16, static", code='"loss_scale": 256.0'),
    Word("bfloat16", code='"dtype": "bfloat16"', weight=1.5),
)
SCALES = (
    Word(
        "dynamic scale",
        code='"loss_scale": fxpass.DynamicLossScale(init_scale=1024.0, growth_interval=2)',
        clashes=("float16", "float16, static", "float16, headroom"),
        weight=2,
    ),
    Word(
        "static scale",
        code='"loss_scale": 128.0',
        clashes=("float16", "float16, static", "float16, headroom"),
    ),
)
CLIPS = (
    Word("max_norm", code='"max_norm": 0.1', clashes=("skip='tensor'",), weight=2),
    Word("max_norm, inf", code='"max_norm": 0.05, "norm_type": float("inf")', clashes=("skip='tensor'",)),
    Word("max_norm per group", code='"max_norm": 0.1, "clip_per": "group"', clashes=("skip='tensor'",)),
    Word(
        "max_norm per optimizer", code='"max_norm": 0.1, "clip_per": "optimizer"', clashes=("skip='tensor'",)
    ),
    Word("max_norm per parameter", code='"max_norm": 0.05, "clip_per": "parameter"'),
    Word("clip_value", code='"clip_value": 0.02'),
    Word("adaptive_clip", code='"adaptive_clip": 0.05'),
)
MODES = (
    Word(
        "skip='tensor'",
        likes=(
            "diagonal of a weight",
            "unfolded weight",
            "one gradient overflows",
            "Neighbour",
        ),
        code='"skip": "tensor"',
        weight=2,
    ),
    Word("release", code='"release": True', clashes=("skip='tensor'", "keeps gradients"), weight=2),
    Word("keeps gradients", code='"grads": "keep"', weight=2),
    Word("no activations kept", code='"memory_budget": 0.0'),
    Word("half of the activations", code='"memory_budget": 0.5'),
    Word("no outlining", code='"outline": "off"'),
    Word("head in float32", code='"keep_fp32": ("*head*",)'),
)

# Rows of the batch of each call, from the third on repeated.
SIZES = (
    Word("a smaller last batch", code="[4, 4, 3]", weight=2),
    Word("every size", code="[3, 4, 5, 2, 6]"),
    Word("single row", code="[4, 1, 4]"),
    Word("single row first", code="[1, 4, 4]", clashes=("batch norm", "running mean")),
)
OVERFLOWS = (
    Word("inf", code='if call == 1:\n    $poisoned[0, 0] = float("inf")'),
    Word("inf at first", code='if call == 0:\n    $poisoned[0, 0] = float("inf")'),
    Word("nan", code='if call == 1:\n    $poisoned[0, 0] = float("nan")'),
    Word(
        "huge", code="if call == 2:\n    $poisoned[0, 0] = 1e30",
        clashes=("layer norm", "group norm", "batch norm", "convolution and batch norm", "convolution and group norm",
                 "normalised"),  # whether their variance overflows is up to the kernel
    ),
)
