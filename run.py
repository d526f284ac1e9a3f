"""Not in the paper: what a training run is, and how it goes on where it ended.

    --out holds run.json          what makes the run what it is: settings, and the content of data and inputs
             metrics.jsonl        a line a step
             checkpoint-*.pt      what trains, and the optimiser's moments
"""
import contextlib
import json
import os
import signal
from dataclasses import asdict
from pathlib import Path

from torch import nn

from checkpoint import load_checkpoint, save_checkpoint
from distributed import Distributed, full_state, load_full_state
from files import read_json, read_text, write_json, write_text

# what may change when a run goes on; of data and inputs the content counts, not the path
FREE = ("out", "data", "resume", "save_every", "sample_every", "device", "skip_bad", "prompts", "save_bf16",
        "micro_batch", "recompute", "shard", "init", "vqgan", "language")


def run_of(config, made_of: dict[str, str]) -> dict:
    """All that makes a run what it is: the stage, its settings, and the fingerprints of its data and inputs."""
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    return json.loads(json.dumps({"stage": type(config).__name__.lower(), **settings, **made_of}))    # as in the file


def claim(config) -> None:
    """Makes --out a folder of this run. Raises ValueError, one line, where it holds anything else, or an input."""
    out = config.out
    inputs = [*config.data, *(getattr(config, name, None) for name in ("init", "vqgan", "language"))]
    for path in filter(None, inputs):
        if path.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out} holds {path}, an input; expected another folder")
    held = any(not path.name.startswith(".") for path in out.iterdir())
    begun = any(path.stat().st_size for name in ("metrics.jsonl", "checkpoint-*") for path in out.glob(name))
    if held and not (out / "run.json").is_file():
        raise ValueError(f"{out}: holds files, but no run of train.py; expected an empty or a new folder as --out")
    if begun and not config.resume:
        raise ValueError(f"{out}: holds a run already; pass --resume to go on with it, or another --out")
    if begun:                                           # else it was refused before its first step
        check_run(read_json(out / "run.json"), run_of(config, {}), out)
    else:
        write_json(out / "run.json", run_of(config, {}))
    for left in out.rglob(".tmp-*"):                                # of a run that was killed while it wrote
        if left.is_file():
            left.unlink()


def check_run(before: dict, now: dict, out: Path) -> None:
    """Raises ValueError, one line, for the first setting or input that is not that of the run in `out`. A run that is
    finished may be lengthened."""
    if type(before.get("steps")) is not int or "stage" not in before:
        raise ValueError(f"{out / 'run.json'}: not what train.py writes; expected another --out")
    for name, value in now.items():
        if before.get(name, value) != value:
            checkpoint = load_checkpoint(out) if name == "steps" and value > before[name] else None
            if not checkpoint or checkpoint["step"] != before["steps"]:
                raise ValueError(f"{out}: this run has {name} = {before[name]}, but now {name} is {value}; "
                                 "expected the same to go on, or another --out")


def resume(config, stage, model: nn.Module, optimizer, ranks: Distributed) -> int:
    """Goes on from the newest checkpoint -> its step; 0 where there is none."""
    run = run_of(config, stage.made_of)
    if ranks.is_main:
        check_run(read_json(config.out / "run.json"), run, config.out)
        write_json(config.out / "run.json", run)
    state, step = load_checkpoint(config.out) if config.resume else None, 0
    if state:
        step = state["step"]
        if type(step) is not int or not 0 < step <= config.steps or not isinstance(state["run"], dict):
            raise ValueError(f"{config.out}: its checkpoint is of step {step!r}, expected one of 1 to {config.steps}")
        check_run(state["run"] | {"steps": config.steps}, run, config.out)
        load_full_state(model, optimizer, state, config.out, stage.stays_frozen)
    if ranks.is_main:
        count = lambda ps: f"{sum(p.numel() for p in ps) / 1e6:.2f}M"
        print(f"{run['stage']}: {count(model.parameters())} parameters, "
              f"{count(p for p in model.parameters() if p.requires_grad)} of them train; "
              + (f"goes on from step {step}" if state else "starts from step 0"))
    return step


def save(config, stage, step: int, model: nn.Module, optimizer, ranks: Distributed) -> None:
    """Writes the weights to use, then a checkpoint: only what trains, gathered by the main process alone."""
    weights = full_state(stage.module)["model"]
    if ranks.is_main:
        stage.save(config.out, weights)
    del weights                                                     # a large model's: not both in memory
    state = full_state(model, optimizer, trained_only=stage.stays_frozen)
    if ranks.is_main:
        save_checkpoint(config.out, step, {"step": step, "run": run_of(config, stage.made_of), **state})
    ranks.barrier()


def open_metrics(path: Path, first: int, ranks: Distributed):
    """metrics.jsonl of a run that goes on from step `first`, open to append; later lines go, the run writes them again.
    Other processes get a file that keeps nothing."""
    if not ranks.is_main:
        return open(os.devnull, "w")
    whole = [line for line in read_text(path).split("\n") if line.endswith("}")] if path.exists() else []
    try:
        kept = [line for line in whole if json.loads(line)["step"] < first]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f'{path}: expected a line a step, such as {{"step": 0, "loss": 5.2}}') from None
    write_text(path, "".join(line + "\n" for line in kept))             # a link is replaced
    return path.open("a", buffering=1, encoding="utf-8", newline="\n")


def not_finite(what: str, value: float, step: int, batch: list[tuple], out: Path) -> ValueError:
    """The error, one line, for a loss or a gradient that is not finite: the step, and what was in the batch."""
    names = [name for name, _ in batch]
    write_text(out / "bad-batch.txt", "\n".join(names) + "\n")
    return ValueError(f"the {what} is {value} at step {step}; the last checkpoint is good; in the batch: "
                      f"{', '.join(names[:4])}; {out / 'bad-batch.txt'} lists all")


@contextlib.contextmanager
def stop_signals():
    """A list that SIGTERM and Ctrl-C are noted in, so that a step can end; a second one acts at once."""
    came, before = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])
    for number in before:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Output:
    """A stream that nobody has to read: training goes on when a pipe's reader goes away or a log's disk is full."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        """Writes what can be written."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
