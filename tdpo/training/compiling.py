"""torch.compile within PyTorch's limits, and a warning where it gives up: of the blocks of models, and of FlexAttention."""

import logging
from collections.abc import Iterable

import torch
from torch import nn

from tdpo.utils import get_logger

log = get_logger(__name__)

# Graphs per function, PyTorch's default 8. All blocks of policy and reference are one function, which is compiled anew for one row and for
# several, for training, eval and the recomputing of activations; FlexAttention for several masks too.
GRAPHS = 64


def allow_graphs() -> None:
    """Raise PyTorch's limit of graphs, and warn in a line where a function reaches it, which then runs uncompiled."""
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    logger = logging.getLogger("torch._dynamo.convert_frame")
    for old in [each for each in logger.filters if isinstance(each, _Fallback)]:
        logger.removeFilter(old)
    logger.addFilter(_Fallback())


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Compile blocks in place, for any length."""
    allow_graphs()
    for block in blocks:
        block.compile(dynamic=True)


class _Fallback(logging.Filter):
    """Replaces PyTorch's messages about its limit, of which there is one for every function, by one warning."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "torch._dynamo hit config." not in record.getMessage():
            return True
        if not self.said:
            log.warning("torch.compile: some shapes are computed uncompiled, because PyTorch's limit of graphs for a function is reached")
        self.said = True
        return False
