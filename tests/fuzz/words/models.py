"""Models: what they compute from `x` is `h`, of shape (rows, 4), which a last Linear maps to logits."""

from __future__ import annotations

from tests.fuzz.words.word import Word

MODELS = (
    Word(
        "mlp",
        code="h = self.second(torch.relu(self.first(x)))",
        init="""
            self.first = nn.Linear(4, 5)
            self.second = nn.Linear(5, 4)
        """,
        weight=3,
    ),
    Word(
        "sequential",
        whole="""
            nn.Sequential()
            model.first = nn.Linear(4, 4)
            model.tanh = nn.Tanh()
            model.head = nn.Linear(4, 3)
        """,
        clashes=("trick",),
        likes=("print in a loop", "item in a loop", "disabled callee"),
        weight=2,
    ),
    Word(
        "three equal layers",
        code="h = torch.tanh(self.layers(x))",
        init="self.layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])",
        likes=("Neighbour", "Averaging"),
        weight=2,
    ),
    Word(
        "teacher",
        init="""
            self.first = nn.Linear(4, 4)
            self.teacher = nn.Linear(4, 4).requires_grad_(False)
        """,
        code="""
            with torch.no_grad():
                target = self.teacher(x).tanh()
            h = self.first(x).tanh() - target
        """,
    ),
    Word(
        "list of parameters",
        init="self.weights = nn.ParameterList([torch.randn(4, 4) * 0.4 for _ in range(3)])",
        code="""
            h = x
            for weight in self.weights:
                h = torch.tanh(h @ weight)
        """,
        likes=("Averaging", "Neighbour"),
    ),
    Word("one layer", code="h = torch.tanh(self.first(x))", init="self.first = nn.Linear(4, 4, bias=False)"),
    Word(
        "layer norm",
        code="h = F.gelu(self.norm(self.first(x)))",
        init="""
            self.first = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)
        """,
        weight=2,
    ),
    Word(
        "group norm",
        code="h = F.silu(self.norm(self.first(x)))",
        init="""
            self.first = nn.Linear(4, 4)
            self.norm = nn.GroupNorm(2, 4)
        """,
    ),
    Word(
        "batch norm",
        code="h = torch.relu(self.norm(self.first(x)))",
        init="""
            self.first = nn.Linear(4, 4)
            self.norm = nn.BatchNorm1d(4)
        """,
        clashes=("single row", "small chunks"),
    ),
    Word(
        "shared layer",
        code="h = self.first(torch.tanh(self.first(x)))",
        init="self.first = nn.Linear(4, 4)",
    ),
    Word(
        "transposed weight",
        code="h = F.linear(torch.tanh(self.first(x)), self.first.weight.t())",
        init="self.first = nn.Linear(4, 5, bias=False)",
    ),
    Word(
        "tied parameter",
        code="h = self.second(torch.sigmoid(self.first(x)))",
        init="""
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)
            self.second.weight = self.first.weight
        """,
    ),
    Word(
        "bare parameters",
        code="h = torch.tanh(x @ self.matrix + self.matrix.diagonal()) * self.gain",
        init="""
            self.matrix = nn.Parameter(torch.randn(4, 4) * 0.5)
            self.gain = nn.Parameter(torch.tensor(1.5))
        """,
    ),
    Word(
        "weight normalised",
        code="""
            weight = self.direction / self.direction.norm(dim=1, keepdim=True) * self.length
            h = torch.tanh(F.linear(x, weight))
        """,
        init="""
            self.direction = nn.Parameter(torch.randn(4, 4))
            self.length = nn.Parameter(torch.ones(4, 1))
        """,
    ),
    Word(
        "unfolded input",
        code="h = torch.relu(self.first(x.unfold(1, 2, 1).reshape(x.shape[0], 6)))",
        init="self.first = nn.Linear(6, 4)",
    ),
    Word(
        "expanded parameter",
        code="h = self.first(x) * self.scale.expand(x.shape[0], 4)",
        init="""
            self.first = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(1))
        """,
    ),
    Word(
        "running mean",
        code="""
            h = self.first(x)
            with torch.no_grad():
                self.mean.lerp_(h.mean(0), 0.1)
            h = h - self.mean
        """,
        init="""
            self.first = nn.Linear(4, 4)
            self.register_buffer("mean", torch.zeros(4))
        """,
    ),
    Word(
        "unused layer",
        code="h = torch.tanh(self.first(x))",
        init="""
            self.first = nn.Linear(4, 4)
            self.unused = nn.Linear(4, 2)
        """,
    ),
    Word(
        "embedding",
        code="h = self.embedding(x).mean(1)",
        init="self.embedding = nn.Embedding(7, 4)",
        inputs="tokens",
        likes=("warmup from 0", "lr 0 in the middle"),
        weight=3,
    ),
    Word(
        "embedding of int32",
        code="h = self.embedding(x).sum(1)",
        init="self.embedding = nn.Embedding(7, 4)",
        inputs="tokens32",
    ),
    Word(
        "embedding with padding",
        code="h = torch.tanh(self.first(self.embedding(x).mean(1)))",
        init="""
            self.embedding = nn.Embedding(7, 4, padding_idx=0)
            self.first = nn.Linear(4, 4)
        """,
        inputs="tokens",
        likes=("warmup from 0",),
    ),
    Word(
        "embedding tied to a linear",
        code="h = torch.tanh(self.out(self.embedding(x).mean(1)))[:, :4]",
        init="""
            self.embedding = nn.Embedding(7, 4)
            self.out = nn.Linear(4, 7, bias=False)
            self.out.weight = self.embedding.weight
        """,
        inputs="tokens",
        likes=("warmup from 0",),
    ),
    Word(
        "convolution",
        code="h = torch.relu(self.conv(x)).mean((2, 3))",
        init="self.conv = nn.Conv2d(2, 4, 3, padding=1)",
        inputs="image",
    ),
    Word(
        "convolution and batch norm",
        code="h = F.max_pool2d(torch.relu(self.norm(self.conv(x))), 2).mean((2, 3))",
        init="""
            self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(4)
        """,
        inputs="image",
    ),
    Word(
        "convolution and group norm",
        code="h = F.relu(self.norm(self.conv(x))).amax((2, 3))",
        init="""
            self.conv = nn.Conv2d(2, 4, 3)
            self.norm = nn.GroupNorm(2, 4)
        """,
        inputs="image",
    ),
    Word(
        "attention",
        code="""
            q, k, v = self.qkv(x).chunk(3, -1)
            h = self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)).mean(1)
        """,
        init="""
            self.qkv = nn.Linear(4, 12)
            self.proj = nn.Linear(4, 4)
        """,
        inputs="sequence",
    ),
    Word(
        "attention by hand",
        code="""
            q, k, v = self.qkv(x).chunk(3, -1)
            scores = (q @ k.mT / 2).masked_fill(self.mask, float("-inf"))
            h = (scores.softmax(-1) @ v)[:, -1]
        """,
        init="""
            self.qkv = nn.Linear(4, 12)
            self.register_buffer("mask", torch.ones(5, 5).tril() == 0)
        """,
        inputs="sequence",
    ),
    Word(
        "two heads",
        code="h = self.attention(x, x, x, need_weights=False)[0].mean(1)",
        init="self.attention = nn.MultiheadAttention(4, 2, batch_first=True)",
        inputs="sequence",
    ),
    Word(
        "recurrent cell",
        code="""
            h = x.new_zeros(x.shape[0], 4)
            for token in x.unbind(1)[:3]:
                h = self.cell(token, h)
        """,
        init="self.cell = nn.GRUCell(4, 4)",
        inputs="sequence",
    ),
)

# On `h`, before the last layer.
TRICKS = (
    Word("constant tensor", code="h = h * torch.tensor(0.5)", weight=2),
    Word("constant vector", code="h = h + torch.tensor([0.1, 0.2, 0.3, 0.4])"),
    Word(
        "write of a column",
        code="""
            h = h.clone()
            h[..., 0] = 0
        """,
        weight=2,
    ),
    Word(
        "write by a mask",
        code="""
            h = h.clone()
            h[h > 0.5] = 0.
        """,
        weight=2,
    ),
    Word(
        "write into a view",
        code="""
            h = h.clone()
            h[:, 1:3].mul_(0.5)
        """,
    ),
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
    Word("rolled", code="h = h.roll(1, -1) + h.flip(0)"),
    Word("top values", code="h = torch.cat([h.topk(2, -1).values, h[:, :2]], -1)"),
    Word("einsum", code="h = torch.einsum('ri,rj,rj->ri', h, h, h)"),
    Word("cumulative", code="h = h.cumsum(-1) / torch.arange(1, 5)"),
    Word("softmax over rows", code="h = h.softmax(0) + h.log_softmax(-1)"),
    Word("float64", code="h = (h.double() * 0.5).float()"),
    Word("standardised", code="h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True) + 1e-5).sqrt()"),
    Word("padded", code="h = F.pad(h, (1, 1))[:, :4]"),
    Word("stacked", code="h = torch.stack(h.unbind(-1)[::-1], -1)"),
    Word("functional layer norm", code="h = F.layer_norm(h, (4,), eps=1e-6)"),
    Word("put by index", code="h = h.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(0.5))"),
    Word("exponential", code="h = (h.clamp(-3, 3) * 2).exp() * 0.1"),
    Word("tiny constant", code="h = h / (h.abs() + 1e-5) + h * 1e-6"),
    Word("large constant", code="h = torch.tanh(h * 1000 / 3000) + (h - 70000.0) * 0 + h"),
    Word("sorted", code="h = h.sort(-1).values"),
    Word("scatter", code="h = torch.zeros_like(h).scatter_add(1, h.argsort(-1), h)"),
    Word(
        "inverse",
        code="h = h @ torch.linalg.inv(3 * torch.eye(4) + 0.1 * h.mT @ h)",
        clashes=("overflow",),
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
        code="""
            h = h * 1.0
            if h.requires_grad:
                h.register_hook(lambda g: g * 0.5)
        """,
        refusable=True,
    ),
    Word("assert", code='assert not (h > 1e30).any(), "too large"', clashes=("overflow",), refusable=True),
)
