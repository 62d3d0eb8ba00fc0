"""The shapes of pytorch/examples and of PyTorch's tutorials."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical

from bench.programs.blocks import conv_net, mlp
from bench.programs.program import CALLS, Training, program


def images(rows: int = 8, channels: int = 1, side: int = 16) -> Tensor:
    return torch.rand(rows, channels, side, side)


@program("examples", "own, in the shape of pytorch/examples mnist", quick=True)
def mnist() -> Training:
    """Adadelta, StepLR each epoch, a line of log now and then."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(288, 10),
    )
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)

    def train(data: Tensor, target: Tensor, batch: int) -> Tensor:
        model.train()
        optimizer.zero_grad()
        output = F.log_softmax(model(data), dim=1)
        loss = F.nll_loss(output, target)
        loss.backward()
        optimizer.step()
        if batch % 4 == 3:
            print(f"batch {batch}, loss {loss.item():.6f}") if batch > 100 else None
            scheduler.step()
        return loss

    return Training(train, [(images(), torch.randint(10, (8,)), i) for i in range(CALLS)])


@program("examples", "own, in the shape of pytorch/examples imagenet")
def imagenet() -> Training:
    """Top-k accuracies and running meters beside the loss, SGD with Nesterov momentum."""
    model = conv_net(3, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    criterion = nn.CrossEntropyLoss()
    meters: dict[str, list[Tensor]] = {"loss": [], "top1": [], "top5": []}

    def accuracy(output: Tensor, target: Tensor, topk: tuple[int, ...]) -> list[Tensor]:
        with torch.no_grad():
            _, pred = output.topk(max(topk), 1, True, True)
            correct = pred.t().eq(target.view(1, -1).expand_as(pred.t()))
            return [
                correct[:k].reshape(-1).float().sum(0, keepdim=True).mul_(100.0 / target.size(0))
                for k in topk
            ]

    def train(data: Tensor, target: Tensor) -> Tensor:
        output = model(data)
        loss = criterion(output, target)
        top1, top5 = accuracy(output, target, (1, 5))
        meters["loss"].append(loss.detach())
        meters["top1"].append(top1)
        meters["top5"].append(top5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(train, [(images(8, 3), torch.randint(10, (8,))) for _ in range(CALLS)])


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.mean, self.log_var = nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(32, 8)
        self.up = mlp(8, 32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = F.relu(self.down(x.view(-1, 64)))
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        return torch.sigmoid(self.up(z)), mean, log_var


@program("examples", "own, in the shape of pytorch/examples vae", quick=True)
def vae() -> Training:
    """Reconstruction and KL, both summed; the running loss is a float."""
    model = Vae()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    total = [0.0]

    def loss_function(recon: Tensor, x: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
        entropy = F.binary_cross_entropy(recon, x.view(-1, 64), reduction="sum")
        return entropy - 0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())

    def train(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = loss_function(*_rest(x))
        loss.backward()
        total[0] += loss.item()
        optimizer.step()
        return loss

    def _rest(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        recon, mean, log_var = model(x)
        return recon, x, mean, log_var

    data = [(images(8, 1, 8),) for _ in range(CALLS)]
    return Training(train, data, lambda: loss_function(*_rest(data[0][0])))


@program("examples", "own, in the shape of pytorch/examples super_resolution")
def super_resolution() -> Training:
    """Sub-pixel convolution, orthogonal weights."""
    model = nn.Sequential(
        nn.Conv2d(1, 16, 5, 1, 2),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3, 1, 1),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, 1, 1),
        nn.PixelShuffle(2),
    )
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            nn.init.orthogonal_(layer.weight)
    optimizer, criterion = torch.optim.Adam(model.parameters(), lr=1e-3), nn.MSELoss()

    def train(low: Tensor, high: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(low), high)
        loss.backward()
        optimizer.step()
        return loss

    return Training(train, [(images(4, 1, 8), images(4, 1, 16)) for _ in range(CALLS)])


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn, self.decoder = nn.Embedding(40, 24), nn.LSTM(24, 24, 2), nn.Linear(24, 40)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor, hidden: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, hidden = self.rnn(self.encoder(x), hidden)
        return F.log_softmax(self.decoder(out).view(-1, 40), dim=1), hidden


@program("examples", "own, in the shape of pytorch/examples word_language_model", quick=True)
def word_language_model() -> Training:
    """Truncated backpropagation: the hidden state is carried and detached, parameters updated by SGD."""
    model = LanguageModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    hidden = [(torch.zeros(2, 4, 24), torch.zeros(2, 4, 24))]

    def train(data: Tensor, targets: Tensor) -> Tensor:
        model.train()
        model.zero_grad()
        state = tuple(h.detach() for h in hidden[0])
        output, hidden[0] = model(data, state)
        loss = F.nll_loss(output, targets.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        optimizer.step()
        return loss

    return Training(train, [(torch.randint(40, (6, 4)), torch.randint(40, (6, 4))) for _ in range(CALLS)])


@program("examples", "own, in the shape of pytorch/examples siamese_network")
def siamese() -> Training:
    """One network for both images, a binary loss on the pair."""
    body, head = conv_net(1, 16), nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))
    model = nn.ModuleList([body, head])
    optimizer, criterion = torch.optim.Adadelta(model.parameters(), lr=1.0), nn.BCEWithLogitsLoss()

    def train(a: Tensor, b: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        output = head(torch.cat((body(a), body(b)), 1)).squeeze()
        loss = criterion(output, target)
        loss.backward()
        optimizer.step()
        return loss

    return Training(train, [(images(), images(), torch.randint(2, (8,)).float()) for _ in range(CALLS)])


@program("examples", "own, in the shape of pytorch/examples actor_critic", quick=True)
def actor_critic() -> Training:
    """The losses of an episode, step by step in a Python loop; returns normalised."""
    body, actor, critic = nn.Linear(4, 32), nn.Linear(32, 2), nn.Linear(32, 1)
    model = nn.ModuleList([body, actor, critic])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)

    def finish_episode(states: Tensor, actions: Tensor, rewards: list[float]) -> Tensor:
        policy_losses, value_losses, returns, total = [], [], [], 0.0
        for r in rewards[::-1]:
            total = r + 0.99 * total
            returns.insert(0, total)
        goals = torch.tensor(returns)
        goals = (goals - goals.mean()) / (goals.std() + 1e-6)
        for state, action, goal in zip(states, actions, goals, strict=True):
            h = F.relu(body(state))
            log_prob = Categorical(F.softmax(actor(h), -1), validate_args=False).log_prob(action)
            value = critic(h)
            policy_losses.append(-log_prob * (goal - value.detach().squeeze()))
            value_losses.append(F.smooth_l1_loss(value.squeeze(), goal))
        optimizer.zero_grad()
        loss = torch.stack(policy_losses).mean() + torch.stack(value_losses).mean()
        loss.backward()
        optimizer.step()
        return loss

    episode = lambda: (torch.randn(5, 4), torch.randint(2, (5,)), [1.0, 1.0, 1.0, 1.0, 0.0])  # noqa: E731
    return Training(finish_episode, [episode() for _ in range(CALLS)])


@program("examples", "own, in the shape of pytorch/examples reinforce")
def reinforce() -> Training:
    """Log-probabilities times returns, with torch.distributions as it is."""
    policy = mlp(4, 32, 2)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)

    def step(states: Tensor, actions: Tensor, returns: Tensor) -> Tensor:
        returns = (returns - returns.mean()) / (returns.std() + 1e-8)
        m = Categorical(F.softmax(policy(states), dim=1))
        policy_loss = [-log_prob * R for log_prob, R in zip(m.log_prob(actions), returns, strict=True)]
        optimizer.zero_grad()
        loss = torch.stack(policy_loss).mean()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(6, 4), torch.randint(2, (6,)), torch.rand(6)) for _ in range(CALLS)])


@program("examples", "own, in the shape of pytorch/examples fast_neural_style")
def neural_style() -> Training:
    """A frozen network's features compare the output of a trained one: content and Gram matrices."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3, padding=1),
    )
    features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    for p in features.parameters():
        p.requires_grad = False
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)

    def gram(y: Tensor) -> Tensor:
        b, ch, h, w = y.size()
        flat = y.view(b, ch, w * h)
        return flat.bmm(flat.transpose(1, 2)) / (ch * h * w)

    style = gram(features(torch.randn(1, 3, 16, 16))).detach()

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        y = net(x)
        fy, fx = features(y), features(x)
        content = 10.0 * F.mse_loss(fy, fx)
        loss = content + 100.0 * F.mse_loss(gram(fy), style.expand(x.shape[0], -1, -1))
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(images(4, 3),) for _ in range(CALLS)])


@program("examples", "own, in the shape of pytorch/examples mnist_forward_forward", quick=True)
def forward_forward() -> Training:
    """A layer at a time: one optimizer and one backward each, nothing flows between them."""
    layers = [nn.Linear(16, 24), nn.Linear(24, 24)]
    optimizers = [torch.optim.Adam(layer.parameters(), lr=0.03) for layer in layers]

    def step(pos: Tensor, neg: Tensor) -> Tensor:
        for layer, optimizer in zip(layers, optimizers, strict=True):
            outs = [torch.relu(layer(x / (x.norm(2, 1, keepdim=True) + 1e-4))) for x in (pos, neg)]
            goodness = [o.pow(2).mean(1) for o in outs]
            loss = F.softplus(torch.cat([2.0 - goodness[0], goodness[1] - 2.0])).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pos, neg = outs[0].detach(), outs[1].detach()
        return loss

    return Training(step, [(torch.randn(8, 16), torch.randn(8, 16)) for _ in range(CALLS)])


@program("examples", "own, in the shape of pytorch/examples regression")
def polynomial_regression() -> Training:
    """No optimizer of torch's in the original; here SGD on one linear layer."""
    fc = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    target = torch.randn(4, 1) * 5

    def step(x: Tensor) -> Tensor:
        features = torch.cat([x.unsqueeze(1) ** i for i in range(1, 5)], 1)
        loss = F.smooth_l1_loss(fc(features), features.mm(target) + 0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return Training(step, [(torch.randn(16),) for _ in range(CALLS)])


@program("examples", "own, in the shape of PyTorch's time_sequence_prediction")
def time_sequence() -> Training:
    """LSTM cells in float64, step by step."""
    cell1, cell2, head = nn.LSTMCell(1, 12), nn.LSTMCell(12, 12), nn.Linear(12, 1)
    model = nn.ModuleList([cell1, cell2, head]).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def step(x: Tensor, y: Tensor) -> Tensor:
        h1 = c1 = h2 = c2 = torch.zeros(x.size(0), 12, dtype=torch.double)
        outputs = []
        for part in x.split(1, dim=1):
            h1, c1 = cell1(part, (h1, c1))
            h2, c2 = cell2(h1, (h2, c2))
            outputs.append(head(h2))
        loss = F.mse_loss(torch.cat(outputs, dim=1), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    wave = torch.sin(torch.arange(7).double() + torch.randn(4, 1).double())
    return Training(step, [(wave[:, :-1], wave[:, 1:]) for _ in range(CALLS)])
