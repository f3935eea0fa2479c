"""Stage "optimizers": fused and foreach optimizers against the plain loops of PyTorch."""

import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from benchmarks.gpu_stages.rows import FAILED, Check, Row, Sizes, Worst, attempted, distance, judged, last_line, skipped
from tdpo.optimizers import make_optimizer

PLAIN = {"foreach": False, "fused": False}
# By optimizer: options whose steps are compared with those of PLAIN.
FASTER = {
    "AdamW": ({"fused": True}, {"foreach": True}),
    "Adam": ({"fused": True}, {"foreach": True}),
    "Adagrad": ({"fused": True}, {"foreach": True}),
    "SGD": ({"fused": True}, {"foreach": True}),
    "RMSprop": ({"foreach": True},),
}
STEPS = 5


def after_steps(name: str, parameters: list[nn.Parameter], options: Mapping[str, bool], device: torch.device) -> torch.Tensor:
    """Return the change of the weights over some steps with drawn gradients, in one vector."""
    own = copy.deepcopy(parameters)
    optimizer = make_optimizer(name, [own], 1e-2, options, device=device)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for parameter in own:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        optimizer.step()
    return torch.cat([(after.detach() - before.detach()).flatten() for after, before in zip(own, parameters)])


def compared(name: str, options: Mapping[str, bool], label: str, parameters: list[nn.Parameter], device: torch.device) -> Iterator[Row]:
    """Compare an optimizer with those options with its plain loop."""
    plain = {key: value for key, value in PLAIN.items() if name != "RMSprop" or key == "foreach"}  # which has no fused form
    expected, worst = after_steps(name, parameters, plain, device), Worst()
    try:
        found = after_steps(name, parameters, options, device)
    except NotImplementedError as error:  # PyTorch 2.11 of a fused Adagrad
        yield Check(label, FAILED, f"PyTorch {torch.__version__} lacks this step on {device.type}: {last_line(error)}"[:300])
        return
    worst.add(distance(found, expected), "")
    yield worst.check(f"{label}: as the plain loop", 1e-5)


def stage(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Compare all optimizers that have a fused or a foreach form."""
    torch.manual_seed(0)
    shapes = ((64, 32), (32,), (17, 5), (1,))
    parameters = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for name in FASTER:
        for options in (*FASTER[name], {}):
            label = f"{name}, {', '.join(f'{key}={value}' for key, value in options.items()) or 'as trained'}"
            yield from attempted(label, partial(compared, name, options, label, parameters, device))
    if device.type == "cuda":
        fused = make_optimizer("AdamW", [parameters], 1e-3, {}, device=device).defaults["fused"]
        yield judged("AdamW is fused on a GPU", bool(fused))
    else:
        yield skipped("AdamW is fused on a GPU")
