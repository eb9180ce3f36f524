"""A base that is shared out over several GPUs while it is trained: each keeps a part of every frozen weight (FSDP2).

The adapter is whole on every GPU, as its gradients are summed up anyway. Only the steps are sharded: what comes before
them (prior images, the targets of prior preservation) reads the weights from main memory, as ``layer_offload`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..config.train import TrainConfig
from ..core.errors import Fix, UserError
from ..models.offload import release
from .distributed import World


def check_sharding(config: TrainConfig, world: World) -> None:
    """Refuse to shard where there is nothing to share, or where one process alone would ask the base something.

    Raises:
        UserError: so it is.
    """
    if not config.shard_base:
        return
    off = Fix("shard_base", "false")
    if world.count == 1:
        raise UserError(
            "shard_base needs several processes, each with a GPU: accelerate launch -m spectral_diffusion.cli train ….",
            off,
        )
    if config.quantization != "none":
        raise UserError("A quantized base is not sharded.", Fix("quantization", "none"), off)
    alone = {
        "validation.every": (config.validation.every, "0"),
        "interference.erasure_prob": (config.interference.erasure_prob, "0"),
    }
    for name, (asked, value) in alone.items():
        if asked:
            raise UserError(f"With a sharded base all processes compute together, which {name} does not.",
                            Fix(name, value), off)  # fmt: skip


@contextmanager
def sharded(network: nn.Module, world: World, shard: bool) -> Iterator[None]:
    """Shard a network's blocks, and the rest of it, over the processes of ``world`` if ``shard`` says so.

    Its trained parameters stay whole. It must be off the GPU (:func:`..models.offload.offload`), and is of no other use
    afterwards.
    """
    if not shard:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    release(network)
    trained = {parameter for parameter in network.parameters() if parameter.requires_grad}
    mesh = init_device_mesh(world.state.device.type, (world.count,))
    blocks = [block for parent in network.modules() if isinstance(parent, nn.ModuleList) for block in parent]
    inner = {id(child) for block in blocks for child in block.modules() if child is not block}
    for block in blocks:
        if id(block) not in inner and any(parameter not in trained for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=trained)
    fully_shard(network, mesh=mesh, ignored_params=trained)
    yield
