"""One process a GPU: plain DDP, or everything sharded (paper Sec. 4.1 trains with ZeRO-3).

    torchrun --nproc_per_node=8 train.py stage1 ...            each GPU holds all; gradients are averaged
    torchrun --nproc_per_node=8 train.py stage1 ... --shard    each GPU holds an eighth of weights, gradients, moments

Not in the paper beyond that. Without torchrun there is one process, and nothing here costs anything.
"""
import contextlib
import ctypes
import datetime
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from checkpoint import check_shapes
from files import first_line

PATIENCE = datetime.timedelta(minutes=10)             # after which a process that waits for another gives up


@dataclass(frozen=True)
class Distributed:
    """Which of how many processes this one is, and its device."""
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def shard(self, rows: list) -> list:
        """The rows of this process, every `world_size`-th."""
        return rows[self.rank::self.world_size]

    def all_gather(self, rows: list) -> list:
        """Undoes `shard`: the rows of all processes in their order, on every one."""
        if self.world_size == 1:
            return rows
        parts = [None] * self.world_size
        dist.all_gather_object(parts, rows)
        return [parts[i % self.world_size][i // self.world_size] for i in range(sum(map(len, parts)))]

    def all_reduce_sum(self, number: float) -> float:
        """The number summed over the processes, the same on every one."""
        return sum(self.all_gather([number]))

    def barrier(self) -> None:
        """Waits until all processes are here."""
        self.all_gather([])


def check_device(name: str) -> str:
    """The name itself. Raises ValueError, one line, for a device that is not there.

    On a CPU, glibc is told to keep freed memory. It would give large blocks back to the system, which clears them for
    the next tensor: a fifth of the time of a training step.
    """
    if name.startswith("cpu"):
        with contextlib.suppress(AttributeError, OSError, TypeError):                  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            for option, value in ((-4, 0), (-1, 2**31 - 1)):                           # M_MMAP_MAX, M_TRIM_THRESHOLD
                mallopt(option, value)
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device {name!r}: {first_line(error).partition('. ')[0]}") from None
    return name


def init(device: str) -> Distributed:
    """Joins the processes that torchrun started: NCCL between GPUs, gloo between CPUs. Raises ValueError, one line,
    for a device that is not there."""
    place = torch.device(check_device(device))
    if "RANK" not in os.environ:
        return Distributed(device=place)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
    # torchrun --max-restarts keeps its store: a dead attempt's keys must not be read by the next one
    store, rank, world_size = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size,
                            timeout=PATIENCE)
    return Distributed(rank, world_size, place)


def cleanup() -> None:
    """Leaves the group of processes, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def bad_input_is_final():
    """How a process ends under torchrun, which takes bad input for any failure, and itself ends in a traceback and
    exit code 1: nothing can prevent that. The last line of its report is the line that this process ended in. Where
    --max-restarts would only have it refused again, a signal stops torchrun, without that report. A process that loses
    another one ends by a RuntimeError, and is started again."""
    try:
        yield
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            sys.exit()                                   # a run that ended well takes the same way out
    except SystemExit as end:
        if "TORCHELASTIC_ERROR_FILE" not in os.environ:
            raise
        sys.stdout.flush()
        if end.code == 2 and not isinstance(end.__context__, RuntimeError):
            if int(os.environ["TORCHELASTIC_MAX_RESTARTS"]):
                time.sleep(int(os.environ["LOCAL_RANK"]))          # a second signal would be a second traceback
                os.kill(os.getppid(), signal.SIGTERM)
                time.sleep(60)                           # torchrun ends this process; the others shall not miss it
            line = " ".join(str(end.__context__ or "unknown flags").split())
            message = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": int(time.time())}}
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
        os._exit(end.code or 0)                          # on the usual way out threads of gloo may abort the process


# ----------------------------------------------------------------------------- a model over processes

def parallelize(model: nn.Module, ranks: Distributed, shard: bool = False, bf16: bool = False) -> nn.Module:
    """The model to call in training: itself, under DDP, or sharded block by block (ZeRO-3). bf16: when sharded,
    matrices multiply in bfloat16 while weights stay float32; else autocast does that."""
    if shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32)
        for part in (*model.blocks, model):            # a block is whole only while it computes
            fully_shard(part.float(), mp_policy=policy)
    elif ranks.world_size > 1:
        # the text-only part of a loss reaches every weight (Router), an image tokenizer's GAN starts late
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=not hasattr(model, "blocks"))
    return model


def sync_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass averages gradients over processes, or only adds to those of this one."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = now
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)


def full_state(model: nn.Module, optimizer=None, trained_only: bool = False) -> dict:
    """The tensors of a model and of its optimiser, {"model": ..., "optimizer": ...}, by the names of parameters, as one
    process would hold them. Only the main process gets them, on the CPU. trained_only: leaves out what is frozen."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
    state = {"model": get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(model, optimizer, options=options)
    return state


def load_full_state(model: nn.Module, optimizer, state: dict, where: Path, trained_only: bool = False) -> None:
    """Undoes `full_state`, on every process. Raises ValueError, one line, for a model of other names or shapes."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict, set_optimizer_state_dict
    frozen = {name for name, p in model.named_parameters() if trained_only and not p.requires_grad}
    wanted = {name.removeprefix("module."): tuple(tensor.shape) for name, tensor in model.state_dict().items()
              if name not in frozen}
    try:
        found = {name: tuple(tensor.shape) for name, tensor in state["model"].items()}
        moments = {name: tuple(each["exp_avg"].shape) for name, each in state["optimizer"]["state"].items()}
    except (AttributeError, LookupError, TypeError):
        raise ValueError(f"{where}: its checkpoint is not one of train.py") from None
    check_shapes(where, wanted, found)
    check_shapes(where, {name: wanted.get(name) for name in moments}, moments)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    for name, p in model.named_parameters():                       # torch gives each a state, also a GAN that waits
        if name.removeprefix("module.") not in state["optimizer"]["state"]:
            optimizer.state.pop(p, None)
