"""A stage under SyncBatchNorm in processes of its own: ``python sync_job.py RANK WORLD FOLDER``.

Every process runs its share of one batch; shares are uneven. Writes outputs, gradients and running statistics.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import dla
from dla.resnet import Bottleneck
from dla.stage import create_stage

SHARES = (1, 3)


def build(interaction: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    blocks = [Bottleneck(32, 8) for _ in range(3)]
    stage = create_stage(blocks, 32, interaction, config=dla.OFFICIAL).double()
    return stage, torch.randn(sum(SHARES), 32, 6, 5, dtype=torch.float64)


def run(stage: nn.Module, x: torch.Tensor) -> dict:
    """Outputs, and gradients as a data-parallel sum over the processes would make them."""
    x = x.clone().requires_grad_()
    out = stage(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *stage.parameters()])
    return {"out": out.detach(), "x": grads[0], "parameters": grads[1:], "buffers": list(stage.buffers())}


def main(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for interaction in ("dla_l", "dla_b"):
        stage, x = build(interaction)
        stage = nn.SyncBatchNorm.convert_sync_batchnorm(stage)
        torch.save(run(stage, x.split(SHARES)[rank]), folder / f"{interaction}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
