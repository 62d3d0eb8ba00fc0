"""The shapes of CleanRL: several optimizers, target networks, inner loops."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical, Normal

from bench.programs.blocks import mlp
from bench.programs.program import CALLS, Training, program


def _transitions(discrete: bool, rows: int = 16) -> list[tuple[Tensor, ...]]:
    def one() -> tuple[Tensor, ...]:
        action = torch.randint(2, (rows, 1)) if discrete else torch.rand(rows, 2) * 2 - 1
        return (
            torch.randn(rows, 4),
            action,
            torch.rand(rows),
            torch.randn(rows, 4),
            torch.rand(rows).lt(0.2).float(),
        )

    return [one() for _ in range(CALLS)]


@program("reinforcement", "own, in the shape of CleanRL's dqn", quick=True)
def dqn() -> Training:
    """The target network copied every fourth call."""
    q = mlp(4, 24, 24, 2)
    target = copy.deepcopy(q)
    optimizer = torch.optim.Adam(q.parameters(), lr=2.5e-4)

    def step(obs: Tensor, action: Tensor, reward: Tensor, following: Tensor, done: Tensor, i: int) -> Tensor:
        with torch.no_grad():
            best, _ = target(following).max(dim=1)
            goal = reward.flatten() + 0.99 * best * (1 - done.flatten())
        old = q(obs).gather(1, action).squeeze()
        loss = F.mse_loss(goal, old)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if i % 4 == 0:
            for t, p in zip(target.parameters(), q.parameters(), strict=True):
                t.data.copy_(1.0 * p.data + (1.0 - 1.0) * t.data)
        return loss

    return Training(step, [(*batch, i) for i, batch in enumerate(_transitions(True))])


@program("reinforcement", "own, in the shape of CleanRL's c51", quick=True)
def c51() -> Training:
    """A distribution over returns, projected on its atoms with index_add_ by rows in a loop."""
    atoms = torch.linspace(-2, 2, 11)
    q = mlp(4, 24, 22)
    target = copy.deepcopy(q)
    optimizer = torch.optim.Adam(q.parameters(), lr=2.5e-4, eps=0.01 / 16)

    def step(obs: Tensor, action: Tensor, reward: Tensor, following: Tensor, done: Tensor) -> Tensor:
        with torch.no_grad():
            pmfs = target(following).view(-1, 2, 11).softmax(-1)
            best = (pmfs * atoms).sum(2).argmax(1)
            pmf = pmfs[torch.arange(len(best)), best]
            moved = (reward[:, None] + 0.99 * atoms * (1 - done[:, None])).clamp(-2, 2)
            b = (moved + 2) / 0.4
            low, high = b.floor().clamp(0, 10), b.ceil().clamp(0, 10)
            d_low, d_high = (high + (low == high).float() - b) * pmf, (b - low) * pmf
            goal = torch.zeros_like(pmf)
            for i in range(goal.size(0)):
                goal[i].index_add_(0, low[i].long(), d_low[i])
                goal[i].index_add_(0, high[i].long(), d_high[i])
        old = q(obs).view(-1, 2, 11).softmax(-1)[torch.arange(len(obs)), action.flatten()]
        loss = (-(goal * old.clamp(min=1e-5, max=1 - 1e-5).log()).sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    small = [tuple(x[:4] for x in batch) for batch in _transitions(True)]
    return Training(step, small)


class Agent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = mlp(4, 24, 2, act=nn.Tanh), mlp(4, 24, 1, act=nn.Tanh)

    def get_action_and_value(self, x: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        probs = Categorical(logits=self.actor(x))
        return probs.log_prob(action), probs.entropy(), self.critic(x)


@program("reinforcement", "own, in the shape of CleanRL's ppo", quick=True)
def ppo() -> Training:
    """One minibatch: clipped ratios, clipped values, statistics under no_grad, `.item()` in between."""
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=2.5e-4, eps=1e-5)
    clipfracs: list[float] = []

    def step(
        obs: Tensor, actions: Tensor, old_logprob: Tensor, advantages: Tensor, returns: Tensor, values: Tensor
    ) -> Tensor:
        logprob, entropy, newvalue = agent.get_action_and_value(obs, actions.long())
        logratio = logprob - old_logprob
        ratio = logratio.exp()
        with torch.no_grad():
            clipfracs.append(((ratio - 1.0).abs() > 0.2).float().mean().item())
        adv = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        pg_loss = torch.max(-adv * ratio, -adv * torch.clamp(ratio, 0.8, 1.2)).mean()
        newvalue = newvalue.view(-1)
        clipped = values + torch.clamp(newvalue - values, -0.2, 0.2)
        v_loss = 0.5 * torch.max((newvalue - returns) ** 2, (clipped - returns) ** 2).mean()
        loss = pg_loss - 0.01 * entropy.mean() + v_loss * 0.5
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
        optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        r = torch.randn
        return r(16, 4), torch.randint(2, (16,)), -0.7 + 0.1 * r(16), r(16), r(16), 0.1 * r(16)

    return Training(step, [batch() for _ in range(CALLS)])


@program("reinforcement", "own, in the shape of CleanRL's ppo, its epochs inside")
def ppo_epochs() -> Training:
    """Two epochs of two shuffled minibatches in one call: four updates of one optimizer."""
    agent = Agent()
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3)

    def update(obs: Tensor, actions: Tensor, advantages: Tensor, returns: Tensor, order: Tensor) -> Tensor:
        with torch.no_grad():
            old, _, _ = agent.get_action_and_value(obs, actions)
        for epoch in range(2):
            for start in range(0, 16, 8):
                i = order[epoch, start : start + 8]
                logprob, _, value = agent.get_action_and_value(obs[i], actions[i])
                ratio = (logprob - old[i]).exp()
                a = advantages[i]
                loss = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean() + F.mse_loss(
                    value.view(-1), returns[i]
                )
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
                optimizer.step()
        return loss

    def batch() -> tuple[Tensor, ...]:
        order = torch.stack([torch.randperm(16) for _ in range(2)])
        return torch.randn(16, 4), torch.randint(2, (16,)), torch.randn(16), torch.randn(16), order

    return Training(update, [batch() for _ in range(CALLS)])


def _follow(target: nn.Module, source: nn.Module, tau: float = 0.005) -> None:
    for t, p in zip(target.parameters(), source.parameters(), strict=True):
        t.data.copy_(tau * p.data + (1 - tau) * t.data)


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(6, 24, 1)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        return self.net(torch.cat([x, a], 1))


@program("reinforcement", "own, in the shape of CleanRL's td3")
def td3() -> Training:
    """Twin critics, smoothed targets, the actor every other call: two graphs."""
    actor, q1, q2 = nn.Sequential(mlp(4, 24, 2), nn.Tanh()), Q(), Q()
    targets = [copy.deepcopy(net) for net in (actor, q1, q2)]
    q_optimizer = torch.optim.Adam(list(q1.parameters()) + list(q2.parameters()), lr=1e-3)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-3)

    def step(
        obs: Tensor, action: Tensor, reward: Tensor, following: Tensor, done: Tensor, noise: Tensor, i: int
    ) -> Tensor:
        with torch.no_grad():
            moved = (targets[0](following) + (noise * 0.2).clamp(-0.5, 0.5)).clamp(-1, 1)
            best = torch.min(targets[1](following, moved), targets[2](following, moved)).view(-1)
            goal = reward + (1 - done) * 0.99 * best
        loss = F.mse_loss(q1(obs, action).view(-1), goal) + F.mse_loss(q2(obs, action).view(-1), goal)
        q_optimizer.zero_grad()
        loss.backward()
        q_optimizer.step()
        if i % 2 == 0:
            actor_loss = -q1(obs, actor(obs)).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()
            for target, net in zip(targets, (actor, q1, q2), strict=True):
                _follow(target, net)
        return loss

    return Training(step, [(*batch, torch.randn(16, 2), i) for i, batch in enumerate(_transitions(False))])


@program("reinforcement", "own, in the shape of CleanRL's ddpg")
def ddpg() -> Training:
    """Actor and critic with targets of both."""
    actor, q = nn.Sequential(mlp(4, 24, 2), nn.Tanh()), Q()
    target_actor, target_q = copy.deepcopy(actor), copy.deepcopy(q)
    q_optimizer, actor_optimizer = (
        torch.optim.Adam(q.parameters(), lr=1e-3),
        torch.optim.Adam(actor.parameters(), lr=1e-3),
    )

    def step(
        obs: Tensor, action: Tensor, reward: Tensor, following: Tensor, done: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            goal = reward + (1 - done) * 0.99 * target_q(following, target_actor(following)).view(-1)
        loss = F.mse_loss(q(obs, action).view(-1), goal)
        q_optimizer.zero_grad()
        loss.backward()
        q_optimizer.step()
        actor_loss = 1 - q(obs, actor(obs)).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        _follow(target_actor, actor)
        _follow(target_q, q)
        return loss, actor_loss

    return Training(step, _transitions(False))


@program("reinforcement", "own, in the shape of CleanRL's sac_continuous_action")
def sac() -> Training:
    """Three optimizers, one of them for the temperature; squashed normal actions."""
    actor, q1, q2 = mlp(4, 24, 4), Q(), Q()
    q1_target, q2_target = copy.deepcopy(q1), copy.deepcopy(q2)
    q_optimizer = torch.optim.Adam(list(q1.parameters()) + list(q2.parameters()), lr=3e-4)
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=3e-4)
    log_alpha = torch.zeros(1, requires_grad=True)
    a_optimizer = torch.optim.Adam([log_alpha], lr=1e-3)

    def act(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = actor(x).chunk(2, -1)
        normal = Normal(mean, (-5 + 3.5 * (torch.tanh(log_std) + 1)).exp())
        x_t = normal.rsample()
        y_t = torch.tanh(x_t)
        log_prob = normal.log_prob(x_t) - torch.log(1 - y_t.pow(2) + 1e-6)
        return y_t, log_prob.sum(1, keepdim=True)

    def losses(obs: Tensor, action: Tensor, reward: Tensor, following: Tensor, done: Tensor) -> Tensor:
        alpha = log_alpha.exp().item()
        with torch.no_grad():
            moved, log_pi = act(following)
            best = torch.min(q1_target(following, moved), q2_target(following, moved)) - alpha * log_pi
            goal = reward + (1 - done) * 0.99 * best.view(-1)
        return F.mse_loss(q1(obs, action).view(-1), goal) + F.mse_loss(q2(obs, action).view(-1), goal)

    def step(obs: Tensor, action: Tensor, reward: Tensor, following: Tensor, done: Tensor) -> Tensor:
        loss = losses(obs, action, reward, following, done)
        q_optimizer.zero_grad()
        loss.backward()
        q_optimizer.step()
        alpha = log_alpha.exp().item()
        pi, log_pi = act(obs)
        actor_loss = ((alpha * log_pi) - torch.min(q1(obs, pi), q2(obs, pi))).mean()
        actor_optimizer.zero_grad()
        actor_loss.backward()
        actor_optimizer.step()
        with torch.no_grad():
            _, log_pi = act(obs)
        alpha_loss = (-log_alpha.exp() * (log_pi - 2.0)).mean()
        a_optimizer.zero_grad()
        alpha_loss.backward()
        a_optimizer.step()
        _follow(q1_target, q1)
        _follow(q2_target, q2)
        return loss

    data = _transitions(False, 64)
    return Training(step, data, lambda: losses(*data[0]))


@program("reinforcement", "own, in the shape of CleanRL's rnd")
def random_distillation() -> Training:
    """A predictor of a frozen random network, trained on a random share of the batch."""
    predictor, target, agent = mlp(4, 24, 8), mlp(4, 24, 8), Agent()
    for p in target.parameters():
        p.requires_grad = False
    optimizer = torch.optim.Adam(list(agent.parameters()) + list(predictor.parameters()), lr=1e-3)

    def step(obs: Tensor, actions: Tensor, adv: Tensor, keep: Tensor) -> Tensor:
        forward_loss = F.mse_loss(predictor(obs), target(obs).detach(), reduction="none").mean(-1)
        mask = (keep < 0.5).float()
        forward_loss = (forward_loss * mask).sum() / torch.max(mask.sum(), torch.tensor([1.0]))
        logprob, entropy, value = agent.get_action_and_value(obs, actions)
        loss = (
            -(adv * logprob).mean()
            - 0.01 * entropy.mean()
            + 0.5 * (value.view(-1) - adv).pow(2).mean()
            + forward_loss
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(list(agent.parameters()) + list(predictor.parameters()), 0.5)
        optimizer.step()
        return loss

    batch = lambda: (torch.randn(16, 4), torch.randint(2, (16,)), torch.randn(16), torch.rand(16))  # noqa: E731
    return Training(step, [batch() for _ in range(CALLS)])
