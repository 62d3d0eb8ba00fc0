"""Graph networks of PyG, trained as its examples do."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.programs.program import CALLS, Program, Training, add, program


def _register(name: str, conv: str, *sizes: int, **settings: Any) -> None:
    add(Program(name, "graphs", "torch_geometric", lambda: _nodes(conv, sizes, settings)))


def _nodes(conv: str, sizes: tuple[int, ...], settings: dict[str, Any]) -> Training:
    import torch_geometric.nn as gnn

    kind = getattr(gnn, conv)
    layers = nn.ModuleList([kind(8, sizes[0], **settings), kind(sizes[1], 4)])
    optimizer = torch.optim.Adam(layers.parameters(), lr=0.01, weight_decay=5e-4)

    def train(x: Tensor, edges: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        layers.train()
        optimizer.zero_grad()
        out = layers[1](F.relu(layers[0](x, edges)), edges)
        loss = F.cross_entropy(out[mask], y[mask])
        loss.backward()
        optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        return torch.randn(12, 8), torch.randint(12, (2, 30)), torch.randint(4, (12,)), torch.rand(12) < 0.6

    return Training(train, [batch() for _ in range(CALLS)])


_register("pyg_gcn", "GCNConv", 16, 16)
_register("pyg_gat", "GATConv", 8, 16, heads=2)
_register("pyg_sage", "SAGEConv", 16, 16)


@program("graphs", "torch_geometric")
def pyg_gin_graphs() -> Training:
    """Whole graphs in a batch, pooled by index."""
    from torch_geometric.nn import GINConv, global_add_pool

    def layer(a: int, b: int) -> nn.Module:
        return GINConv(nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(), nn.Linear(b, b)))

    first, second, head = layer(6, 16), layer(16, 16), nn.Linear(16, 3)
    model = nn.ModuleList([first, second, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)

    def train(x: Tensor, edges: Tensor, batch: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        h = F.relu(second(F.relu(first(x, edges)), edges))
        loss = F.cross_entropy(head(global_add_pool(h, batch)), y)
        loss.backward()
        optimizer.step()
        return loss

    def graphs() -> tuple[Tensor, ...]:
        edges = torch.cat([torch.randint(5, (2, 10)) + 5 * i for i in range(4)], 1)
        return torch.randn(20, 6), edges, torch.arange(20) // 5, torch.randint(3, (4,))

    return Training(train, [graphs() for _ in range(CALLS)])
