"""Spread a frozen model's weights over the processes of a run, so that each GPU holds its share and gathers a block when it runs.

An adapter on the model is left alone: it stays whole on every GPU, so it is trained by DDP, judged, kept and resumed as without
sharding, and ends with the same bytes. What shrinks is the large part, the weights that nothing trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tribunal.models.residual import blocks, input_device


def shard_frozen(model: nn.Module) -> None:
    """Shard a model's weights block by block, in place; a second call changes nothing.

    torch.distributed must be connected. From then on every process has to run the same forward passes in the same order,
    since each of them gathers weights from all.

    Args:
        model: frozen and without adapter; the same on every process.
    Source: Zhao et al. (2023), arXiv:2304.11277; torch's ``fully_shard``.
    """
    if is_sharded(model):
        return
    assert not any(weight.requires_grad for weight in model.parameters()), "only frozen weights are sharded"
    mesh = init_device_mesh(input_device(model).type, (torch.distributed.get_world_size(),))
    for block in blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def let_go(model: nn.Module) -> None:
    """Give up what the last forward pass without a backward one gathered, so that all processes begin the next pass alike.

    The outermost weights stay gathered after a forward pass; a process that reads the state dict meanwhile gives them up.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def train_by_ddp_alone(model: Any) -> None:
    """Keep DistributedDataParallel, which is put around ``model`` later, off all but its trainable weights.

    Frozen ones are equal everywhere, or sharded: there is nothing to send round when training starts.
    """
    ignored = [name for name, weight in model.named_parameters() if not weight.requires_grad]
    ignored += [name for name, _ in model.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)  # torch has no public name for it
