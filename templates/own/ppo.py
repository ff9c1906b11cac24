"""PPO on gymnasium's CartPole in a plain loop, its agent sparse as a plan says: `python ppo.py plan.yaml`.

supar layout ppo:make --base width=64 --wider width=128 --third width=192 --example ppo:example -o layout.yaml
supar tune-proxy agent.yaml
supar transfer proxy.yaml --width 64 --sparsity 0.875
python ppo.py plan.yaml

It needs `pip install gymnasium`. `supar help rl` shows agent.yaml. The plan says steps (iterations), batch_size (transitions
of an iteration, of all environments together), seed, rates and grad_clip; the other settings are below.
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise

import gymnasium
import numpy as np
import torch
from torch import nn

import supar_cli as supar
from supar_cli.training.optimizer import rate_factor

ENVIRONMENT, ENVIRONMENTS, LONGEST = "CartPole-v1", 8, 500  # its name, how many at once, steps of the longest episode
SCALES = np.array([0.4, 0.5, 5.0, 0.5], np.float32)  # on its observations, so that they are about 1
EPOCHS, MINIBATCHES = 4, 4  # of an iteration
DISCOUNT, TRACE = 0.99, 0.95  # gamma, lambda
CLIP, VALUE, ENTROPY = 0.2, 0.5, 0.01  # of the ratio of probabilities; shares of the loss


def make_layers(width, results, last_std):
    sizes = [4, width, width, width, results]
    linear = [nn.Linear(*pair) for pair in pairwise(sizes)]
    for one in linear:
        nn.init.normal_(one.weight, std=math.sqrt(2 / one.in_features))
        nn.init.zeros_(one.bias)
    nn.init.normal_(linear[-1].weight, std=last_std / math.sqrt(width))
    return nn.Sequential(*[part for one in linear[:-1] for part in (one, nn.ReLU())], linear[-1])


class Agent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.actor = make_layers(width, 2, 0.01)  # at first every action is as likely as any other
        self.critic = make_layers(width, 1, 1.0)

    def forward(self, observations):
        return self.actor(observations), self.critic(observations).squeeze(-1)


def make(width):  # called with the sizes of a layout or of a plan
    return Agent(width)


def example(model):  # the arguments of one forward pass, for `supar layout`
    return (torch.randn(8, 4),)


@dataclass
class Episodes:
    """Environments that begin anew by themselves, and the returns of the episodes that have finished.

    The step after an episode's end only begins the next one: it is no transition, and its observation before it is the
    last one of the episode, whose value an episode needs that was cut off.
    """

    seed: int
    finished: list = field(default_factory=list)  # (iteration, return)

    def __post_init__(self):
        made = gymnasium.make_vec(ENVIRONMENT, ENVIRONMENTS, "vector_entry_point", max_episode_steps=LONGEST)
        self.environments = gymnasium.wrappers.vector.TransformObservation(made, lambda found: found * SCALES)
        self.observation, _ = self.environments.reset(seed=self.seed)
        self.has_ended, self.returns = np.zeros(ENVIRONMENTS, bool), np.zeros(ENVIRONMENTS)

    def play(self, actor, steps, iteration, generator):
        """Observations, one more than steps, and by step actions, rewards, whether terminated, ended, and begun anew."""
        observations, rows = [self.observation], []
        for _ in range(steps):
            chances = actor(torch.from_numpy(self.observation)).softmax(-1)
            actions = torch.multinomial(chances, 1, generator=generator).squeeze(-1)
            self.observation, rewards, terminated, truncated, _ = self.environments.step(actions.numpy())
            begun, self.has_ended = self.has_ended, terminated | truncated
            self.returns += rewards
            self.finished += [(iteration, total) for total in self.returns[self.has_ended]]
            self.returns[self.has_ended] = 0
            observations.append(self.observation)
            rows.append((actions.numpy(), rewards, terminated.copy(), self.has_ended, begun))
        return torch.from_numpy(np.stack(observations)), *map(torch.from_numpy, map(np.stack, zip(*rows, strict=True)))


def estimate_advantages(rewards, values, terminated, ended):
    """Generalised advantages (Schulman et al. 2016): what follows an end counts for nothing, but the value where it was cut off."""
    nexts = values[1:] * ~terminated
    errors = rewards + DISCOUNT * nexts - values[:-1]
    advantages, following = torch.empty_like(errors), torch.zeros_like(errors[0])
    for step in reversed(range(len(errors))):
        following = errors[step] + DISCOUNT * TRACE * ~ended[step] * following
        advantages[step] = following
    return advantages


def loss_of(agent, observations, actions, before, advantages, returns):
    logits, values = agent(observations)
    logs = logits.log_softmax(-1)
    ratios = (logs.gather(-1, actions[:, None]).squeeze(-1) - before).exp()
    gains = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy = -torch.min(gains * ratios, gains * ratios.clamp(1 - CLIP, 1 + CLIP)).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    return policy + VALUE * (values - returns).square().mean() / 2 - ENTROPY * entropy


@torch.no_grad()
def collect(agent, episodes, steps, iteration, generator):
    """The transitions of an iteration: observations, actions, log-probabilities, advantages, returns."""
    observations, actions, rewards, terminated, ended, begun = episodes.play(agent.actor, steps, iteration, generator)
    logits, values = agent(observations)
    before = logits[:-1].log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    advantages = estimate_advantages(rewards, values, terminated, ended)
    return [one[~begun] for one in (observations[:-1], actions, before, advantages, advantages + values[:-1])]


def train(plan):
    """Train an agent as a plan says: the (iteration, return) of each episode that finished, at last nan where it diverged."""
    settings = plan.train
    steps, left = divmod(settings.batch_size, ENVIRONMENTS)
    if left:
        sys.exit(f"train.batch_size: {settings.batch_size}; expected a multiple of {ENVIRONMENTS}, the environments")
    agent = make(**plan.model.target)
    prepared = supar.prepare(agent, plan)
    optimizer = prepared.optimizer()
    generator = torch.Generator().manual_seed(settings.seed)
    episodes = Episodes(settings.seed)
    for iteration in range(settings.steps):
        prepared.set_rate(rate_factor(plan, iteration) * plan.hyperparameters.lr)  # as plan.train.schedule says
        transitions = collect(agent, episodes, steps, iteration, generator)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(transitions[0]), generator=generator).chunk(MINIBATCHES):
                loss = loss_of(agent, *(one[rows] for one in transitions))
                if not loss.isfinite():
                    return [*episodes.finished, (iteration, math.nan)]
                loss.backward()
                prepared.clip_grad_norm_(settings.grad_clip or math.inf)
                optimizer.step()
                optimizer.zero_grad()
    return episodes.finished


def main(path):
    plan = supar.load(path)
    steps, finished = plan.train.steps, train(plan)
    # a tenth of the iterations, and as many that each environment finishes an episode
    last = max(math.ceil(steps / 10), math.ceil((LONGEST + 1) * ENVIRONMENTS / plan.train.batch_size))
    returns = [total for iteration, total in finished if iteration >= steps - last or math.isnan(total)]
    if not returns:
        sys.exit(f"no episode finished in the last {last} iterations; expected a larger train.steps or batch_size")
    mean = np.mean(returns)  # of finished episodes alone: one that still runs has a return that is not known
    supar.report_loss(-mean, steps)
    print(f"mean return of the {len(returns)} episodes that finished in the last {last} iterations: {mean:.1f}")


if __name__ == "__main__":
    main(sys.argv[1])
