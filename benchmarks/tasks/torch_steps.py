"""The cleaning example's CNN in PyTorch: a plain step, and those of its bilevel libraries.

Eager PyTorch, as its libraries run: with a network this small the time is that of launching
kernels. Both libraries take the hypergradient at one inner step: TorchOpt unrolls it, Betty
differentiates it implicitly with finite differences (its default). Neither keeps an adjoint.

References:
    J. Ren et al. TorchOpt: an efficient library for differentiable optimization. JMLR 2023.
    S. K. Choe, W. Neiswanger, P. Xie, E. Xing. Betty: an automatic differentiation library for
    multilevel optimization. ICLR 2023.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def make(batch: dict[str, np.ndarray]) -> dict[str, Callable[[], Any]]:
    """One step of each variant by name, on the GPU where there is one.

    Args:
        batch: "image" float32 [batch, 28, 28, 1], "label" and "domain" int32 [batch].

    Raises:
        ImportError: no PyTorch. A library that is not there is left out.
    """
    torch = importlib.import_module("torch")
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images = torch.as_tensor(batch["image"]).permute(0, 3, 1, 2).contiguous().to(device)
    labels, domains = (torch.as_tensor(batch[k]).long().to(device) for k in ("label", "domain"))
    count = int(domains.max()) + 1

    def inner_loss(network, x):
        losses = torch.nn.functional.cross_entropy(network(images), labels, reduction="none")
        return (torch.softmax(x, 0)[domains] * count * losses).mean()

    def outer_loss(network):
        return torch.nn.functional.cross_entropy(network(images), labels)

    def weights():
        return torch.nn.Parameter(torch.zeros(count, device=device))

    def network():
        return _cnn(torch).to(device)

    steps = {"plain": _plain(torch, network(), weights(), inner_loss)}
    for name, library, rival in (
        ("TorchOpt, one step unrolled", "torchopt", _torchopt),
        ("Betty, finite differences", "betty", _betty),
    ):
        try:
            importlib.import_module(library)
        except ImportError:
            continue
        steps[name] = rival(torch, network(), weights(), inner_loss, outer_loss)
    return steps


def seconds(step: Callable[[], Any], spend: float) -> float:
    """Of a step, the best of some turns of at least 8.

    Args:
        step: of `make`.
        spend: seconds to be spent in all.
    """
    torch = importlib.import_module("torch")
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None

    def turn(count):
        wait()
        began = time.perf_counter()
        for _ in range(count):
            step()
        wait()
        return (time.perf_counter() - began) / count

    turn(2)
    best, ends = turn(8), time.perf_counter() + spend
    while time.perf_counter() < ends:
        best = min(best, turn(int(np.clip(spend / 4 / best, 8, 200))))
    return best


def _cnn(torch: Any) -> Any:
    """`examples/mnist_hypercleaning`'s, without dropout."""
    layers: list[Any] = []
    for inputs, channels in ((1, 16), (16, 32)):
        layers += [
            torch.nn.Conv2d(inputs, channels, 3, 2, 1, bias=False),
            torch.nn.BatchNorm2d(channels),
            torch.nn.ReLU(),
        ]
    head = [torch.nn.Linear(32 * 7 * 7, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), *head)


def _plain(torch: Any, network: Any, x: Any, inner_loss: Callable[..., Any]):
    optimiser = torch.optim.AdamW(network.parameters(), 1e-4)

    def step():
        optimiser.zero_grad()
        inner_loss(network, x.detach()).backward()
        optimiser.step()

    return step


def _torchopt(torch: Any, network: Any, x: Any, inner_loss: Any, outer_loss: Any):
    torchopt = importlib.import_module("torchopt")
    inner, outer = torchopt.MetaAdamW(network, lr=1e-4), torch.optim.SGD([x], 0.01)

    def step():
        inner.step(inner_loss(network, x))
        outer.zero_grad()
        outer_loss(network).backward()
        outer.step()
        torchopt.stop_gradient(network)
        torchopt.stop_gradient(inner)

    return step


def _betty(torch: Any, network: Any, x: Any, inner_loss: Any, outer_loss: Any):
    engine = importlib.import_module("betty.engine")
    problems = importlib.import_module("betty.problems")
    configs = importlib.import_module("betty.configs")

    class Weights(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x = x

        def forward(self):
            return self.x

    class Outer(problems.ImplicitProblem):
        def training_step(self, batch):
            return outer_loss(self.inner)

    class Inner(problems.ImplicitProblem):
        def training_step(self, batch):
            return inner_loss(self, self.outer())

    loader, module = [(0,)], Weights()  # the losses hold the minibatch
    outer = Outer(
        name="outer",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), 0.01),
        train_data_loader=loader,
        config=configs.Config(),
    )
    inner = Inner(
        name="inner",
        module=network,
        optimizer=torch.optim.AdamW(network.parameters(), 1e-4),
        train_data_loader=loader,
        config=configs.Config(type="darts", unroll_steps=1),
    )
    dependencies = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
    run = engine.Engine(problems=[outer, inner], dependencies=dependencies)
    run.train()

    def step():
        run.global_step += 1
        run.train_step()

    return step
