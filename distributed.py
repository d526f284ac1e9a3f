"""One process a GPU: plain DDP, or everything sharded (paper Sec. 4.1 trains with ZeRO-3).

    torchrun --nproc_per_node=8 train.py stage1 ...            each GPU holds all, gradients are averaged
    torchrun --nproc_per_node=8 train.py stage1 ... --shard    each GPU holds an eighth of weights, gradients, moments

Not in the paper beyond that. Without torchrun there is one process, and nothing here costs anything.
"""
import contextlib
import ctypes
import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from checkpoint import check_shapes


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is, and its device."""
    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def share(self, rows: list) -> list:
        """This rank's rows, every `count`-th."""
        return rows[self.rank::self.count]

    def sum(self, number: float) -> float:
        """The number summed over ranks, on every rank."""
        if self.count == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64 if self.device.type == "cpu" else torch.float32,
                             device=self.device)
        dist.all_reduce(total)
        return total.item()

    def average(self, tensors) -> None:
        """Each tensor becomes its mean over ranks."""
        for tensor in tensors if self.count > 1 else ():
            dist.all_reduce(tensor)
            tensor /= self.count

    def together(self, shares: list) -> list:
        """Undoes `share`: the rows of all ranks in their order, on every rank."""
        if self.count == 1:
            return shares
        parts = [None] * self.count
        dist.all_gather_object(parts, shares)
        return [parts[i % self.count][i // self.count] for i in range(sum(map(len, parts)))]

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.count > 1:
            dist.barrier()


def keep_freed_memory() -> None:
    """Not in the paper: glibc returns the memory of a tensor over 32 MB as soon as it is freed, and the kernel clears
    it anew for the next one, which can take as long as the arithmetic. This tells glibc to keep it; elsewhere it does
    nothing."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    for option, size in ((-1, 2**31 - 1), (-2, 2**28), (-3, 2**30)):     # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
        mallopt(option, size)


def ready_device(name: str) -> str:
    """The name itself; a CPU then keeps freed memory. Raises ValueError, one line, for a device that is not there."""
    if name.startswith("cpu"):
        keep_freed_memory()
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: {str(error).splitlines()[0]}") from None
    return name


def start(device: str) -> Ranks:
    """Joins the processes that torchrun started: NCCL between GPUs, gloo between CPUs. Raises ValueError, one line,
    for a device that is not there."""
    ready_device(device)
    if "RANK" not in os.environ:
        return Ranks(device=torch.device(device))
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    if not dist.is_initialized():
        patience = datetime.timedelta(hours=1)                   # some may still encode when others have finished
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=patience)
    return Ranks(rank, count, place)


def stop() -> None:
    """Leaves the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


# ----------------------------------------------------------------------------- spreading a model

class _Loss(nn.Module):
    """DDP hooks onto `forward`: here it is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, is_target: Tensor) -> Tensor:
        return self.model.loss(tokens, is_target)


class Spread:
    """A MARS over the ranks: call it as the loss, (tokens, is_target) -> scalar.

    bf16: matrices multiply in bfloat16 while trained weights stay float32.
    """

    def __init__(self, model, ranks: Ranks, shard: bool = False, bf16: bool = False):
        self.model, self.ranks, self.shard, self.bf16 = model, ranks, shard, bf16
        if shard:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
            for part in (*model.blocks, model):       # a block is whole only while it computes
                fully_shard(part.float(), mp_policy=policy)
            for name in ("loss", "hidden"):           # what is called instead of `forward`
                register_fsdp_forward_method(model, name)
            self.run = model.loss
        else:
            self.run = DistributedDataParallel(_Loss(model)) if ranks.count > 1 else model.loss

    def __call__(self, tokens: Tensor, is_target: Tensor) -> Tensor:
        cast = self.bf16 and not self.shard
        with torch.autocast(tokens.device.type, torch.bfloat16) if cast else contextlib.nullcontext():
            return self.run(tokens, is_target)

    @contextlib.contextmanager
    def gradients_meet(self, now: bool):
        """Whether the backward pass inside averages gradients over ranks, or only adds to this rank's own."""
        if self.shard:
            self.model.set_requires_gradient_sync(now)
            yield
        elif now or self.ranks.count == 1:
            yield
        else:
            with self.run.no_sync():
                yield


# ----------------------------------------------------------------------------- whole states of spread models

def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def _spread(tensor: Tensor, like: Tensor) -> Tensor:
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return tensor.to(like.device)


def whole_state(model: nn.Module, optimizer=None) -> dict:
    """Model and optimiser, by the names of parameters, as one process would hold them: the same file any way."""
    state = {"model": {name: _whole(tensor) for name, tensor in model.state_dict().items()}}
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        state["optimizer"] = {names[id(parameter)]: {key: _whole(moment) for key, moment in moments.items()}
                              for parameter, moments in optimizer.state.items()}
    return state


@torch.no_grad()
def load_whole_state(model: nn.Module, optimizer, state: dict) -> None:
    """Undoes `whole_state`, on every rank. Raises ValueError, one line, for a model of other names or shapes."""
    check_shapes(Path("checkpoint"), *({name: tuple(tensor.shape) for name, tensor in tensors.items()}
                                       for tensors in (model.state_dict(), state["model"])))
    model.load_state_dict({name: _spread(state["model"][name], tensor) for name, tensor in model.state_dict().items()})
    for name, parameter in model.named_parameters():
        for key, moment in state["optimizer"].get(name, {}).items():
            optimizer.state[parameter][key] = _spread(moment, parameter) if moment.ndim else moment
