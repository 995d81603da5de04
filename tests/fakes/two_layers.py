"""Three small layers whose weights GaLore trains, and their training on random rows."""

import torch

from peftlib.optim.galore import GaLoreAdamW


class TwoLayers(torch.nn.Module):
    """A tall, a wide and a square projected weight, and a plain vector."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(12, 20, bias=False)
        self.down = torch.nn.Linear(20, 12, bias=False)
        self.square = torch.nn.Linear(12, 12, bias=False)
        self.norm = torch.nn.Parameter(torch.ones(12))

    def forward(self, x):
        return self.square(torch.tanh(self.down(torch.tanh(self.up(x))))) * self.norm


def make(seed=0, *, rank=3, gap=4, **settings):
    torch.manual_seed(seed)
    model = TwoLayers()
    projected = [model.up.weight, model.down.weight, model.square.weight]
    groups = [{"params": projected, "rank": rank, "update_gap": gap, "scale": 0.25}, {"params": [model.norm]}]
    return model, GaLoreAdamW(groups, lr=1e-2, **settings)


def rows(step, n=8):
    g = torch.Generator().manual_seed(100 + step)
    return torch.randn(n, 12, generator=g), torch.randn(n, 12, generator=g)


def train(model, optimizer, steps, pieces=((0, 8),), scale=1.0):
    for step in steps:
        x, y = rows(step)
        for lo, hi in pieces:
            ((model(x[lo:hi]) - y[lo:hi]).square().sum() / len(x) * scale).backward()
        norm, found_inf = optimizer.finish_accumulation(1 / scale)
        assert found_inf == 0
        optimizer.step()
        optimizer.zero_grad()
    return norm


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])
