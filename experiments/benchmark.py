"""Not in the paper, which reports GPU days alone: what each part costs, as a ratio to a named baseline in the same run.

    python -m experiments.benchmark                                 all of it, with the shipped weights, on the CPU
    python -m experiments.benchmark decode train --device cuda      what a GPU makes of them

Each figure is the median of rounds in which it takes turns with its baseline, so that a busy machine slows both. One
thread of a CPU is measured in CPU time.
"""
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mars as mars_module
from config import check, ends_in_one_line, parse, setting
from data import collate, encode_each, open_dataset, prompt, targets_of, text_to_image
from data import encode as encode_dataset
from distributed import check_device
from files import write_json, write_text
from generate import WEIGHTS, load_stage
from images import Resize, save_image, to_pixels
from mars import MARS, MARSConfig
from sampling import Sampling, generate_image_tokens
from step import for_sampling

PROMPTS = ("red apple", "dog", "blue heart", "house", "sun", "cat", "green book", "woman astronaut")
SETTINGS = {"as by default": {}, "4 tokens a pass": {"k": 4}, "16 tokens a pass": {"k": 16},
            "temperature 0": {"temperature": 0}, "temperature 0, 16 tokens a pass": {"temperature": 0, "k": 16}}
THEIRS = "transformers, dense Qwen2 of this size"


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measures what decoding, training, the loss, the data and the command cost."""
    parts: tuple[str, ...] = setting(help="of cold, loss, decode, train, data; all, if none is named", metavar="PART",
                                     nargs="*")
    weights: Path = setting(WEIGHTS, "what train.py wrote")
    rounds: int = setting(5, "times that each is measured", least=1, most=1000)
    threads: int = setting(1, "of torch, on a CPU", least=1, most=1024)
    device: str = setting("cpu", "cpu, cuda, cuda:1 ...")
    out: Path | None = setting(None, "JSON to write", metavar="FILE.json")

    def __post_init__(self):
        check(self)
        for name in set(self.parts) - PARTS.keys():
            raise ValueError(f"part {name!r}, expected some of {', '.join(PARTS)}")

    @property
    def clock(self):
        """What seconds are read from, for what runs in this process."""
        return time.process_time if self.device == "cpu" and self.threads == 1 else time.perf_counter


def take_turns(runs: dict, rounds: int, clock=time.perf_counter) -> dict[str, float]:
    """Each of `runs` once to warm up, then `rounds` times in turn -> median seconds of each, by `clock`."""
    seconds, wait = {name: [] for name in runs}, torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for i in range(rounds + 1):
        for name, run in runs.items():
            wait()
            started = clock()
            run()
            wait()
            if i:
                seconds[name].append(clock() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(what: str, ours: float, baseline: str, theirs: float, unit: str = "s") -> dict:
    """One line of the table: the ratio is ours / theirs."""
    return {"what": what, "ours": ours, "baseline": baseline, "theirs": theirs, "unit": unit, "ratio": ours / theirs}


# ----------------------------------------------------------------------------- what is measured

def transformers_generate(model: MARS):
    """A function of the batch size: transformers samples 64 tokens by a dense Qwen2 of the model's size. Raises
    ImportError where transformers is not installed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    c, weight = model.config, model.norm.weight
    dense = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=model.vocabulary.size, hidden_size=c.width, intermediate_size=c.ffn_width,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads))
    dense = dense.to(weight.device, weight.dtype).eval()

    def generate(batch):
        tokens = torch.ones((batch, 4), dtype=torch.long, device=weight.device)
        dense.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=64, min_new_tokens=64,
                       do_sample=True, pad_token_id=0)
    return generate


def decode(c: BenchmarkConfig) -> list[dict]:
    """Images of 64 tokens, one of each prompt and 16 at once, against transformers and the reading of weights."""
    model, _, tokenizer = load_stage(c.weights, c.device)
    model, passes = for_sampling(model.bfloat16() if c.device.startswith("cuda") else model), {}
    prompts = [prompt(tokenizer.encode(text), model.vocabulary) for text in PROMPTS]

    def each(name):
        passes[name] = [generate_image_tokens(model, [ids], (8, 8), Sampling(**SETTINGS[name]), [i])[1]
                        for i, ids in enumerate(prompts)]
    read = torch.cat([tensor.flatten() for name, tensor in model.state_dict().items()
                      if name.startswith(("blocks", "vision_head")) and ("vis" in name or ".out." in name)])
    runs = {name: functools.partial(each, name) for name in SETTINGS}
    runs |= {"16": lambda: generate_image_tokens(model, prompts * 2, (8, 8), Sampling(), list(range(16))),
             "reading": lambda: [read.sum() for _ in range(64)]}
    with contextlib.suppress(ImportError):
        theirs = transformers_generate(model)
        runs |= {"theirs": lambda: theirs(1), "their 16": lambda: theirs(16)}
    with torch.inference_mode():
        found, rows = take_turns(runs, c.rounds, c.clock), []
    seconds = {name: found[name] / len(prompts) for name in SETTINGS}
    if "theirs" in found:
        rows = [row(f"one image, {name}", seconds[name], THEIRS, found["theirs"]) for name in SETTINGS]
        rows.append(row("16 images at once", found["16"], THEIRS + ", 16 at once", found["their 16"]))
    by_default = row("one image, as by default", seconds["as by default"], "reading the weights once a token",
                     found["reading"])
    return rows + [by_default] + [row(f"forward passes, {name}", statistics.mean(passes[name]), "one a token", 64, "")
                   for name in SETTINGS]


def batch_of(sequences: list, vocabulary, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets of a training step."""
    tokens, is_target = collate(sequences, vocabulary.special("<pad>"))
    return tokens.to(device), targets_of(tokens, is_target, vocabulary).to(device)


def training_step(model: MARS, bf16: bool):
    """A function of a batch: forward, backward and AdamW of what trains in `model`, in bf16 as train.py does it: what
    is frozen stays as it was read."""
    model.train().freeze_language()
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad or not bf16 else p.data
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4, fused=True)
    device = model.norm.weight.device.type

    def step(batch):
        with torch.autocast(device, torch.bfloat16, enabled=bf16), \
                sdpa_kernel(SDPBackend.MATH) if bf16 and device == "cpu" else contextlib.nullcontext():
            model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def train(c: BenchmarkConfig) -> list[dict]:
    """A step of Stage I against a dense model of the same shape whose weights all train, and the operations a second
    that it reaches, on a GPU nearly MFU."""
    model, generator, rows = MARS.from_pretrained(c.weights).to(c.device), torch.Generator().manual_seed(0), []
    dense = MARS(dataclasses.replace(model.config, visual_experts=False)).initialise().to(c.device)

    def batch(text):
        images = torch.randint(model.vocabulary.image, (16, 8, 8), generator=generator)
        captions = torch.randint(3, 1000, (16, text), generator=generator).tolist()
        return batch_of([text_to_image(ids, image, model.vocabulary) for ids, image in zip(captions, images)],
                        model.vocabulary, c.device)
    ours, theirs = training_step(model, bf16=True), training_step(dense, bf16=True)
    for text in (6, 22, 66):
        z = batch(text)
        found = take_turns({"ours": lambda: ours(z), "theirs": lambda: theirs(z)}, 2 * c.rounds, c.clock)
        rows.append(row(f"training step, {text / (text + 66):.0%} text", found["ours"],
                        "dense model of this shape, all weights train", found["theirs"]))
    size = 1024 if c.device == "cpu" else 8192
    square = torch.randn(size, size, device=c.device, dtype=torch.bfloat16)
    found = take_turns({"step": lambda: ours(z), "product": lambda: square @ square}, c.rounds, c.clock)
    with FlopCounterMode(display=False) as counter:
        ours(z)
    return rows + [row("operations a second, training", counter.get_total_flops() / found["step"] / 1e12,
                       f"a {size} x {size} matrix product in bf16", 2 * size ** 3 / found["product"] / 1e12, "T/s")]


def peak_of_loss(rows: int, n: int, pipe) -> None:
    """In a process of its own: peak GB of the loss over Qwen-7B's vocabulary, n positions, in chunks of `rows`."""
    torch.set_num_threads(1)
    mars_module.LOGITS = rows * 160_136
    model = MARS(MARSConfig(width=16, heads=1, kv_heads=1, head_width=16, ffn_width=16, layers=1, max_seq_len=n,
                            text_vocab=151_936, image_vocab=8192))
    h, z = torch.randn(1, n, 16, requires_grad=True), torch.randint(0, 160_136, (1, n))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.nll(h, z, 1).backward()
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6)


def loss(c: BenchmarkConfig) -> list[dict]:
    """Eq. 1 in chunks, against whole logits: a tenth of the positions of 64 images, and a tenth of a chunk's rows."""
    context, n, found = multiprocessing.get_context("spawn"), 64 * 330 // 10, []
    for rows in (mars_module.LOGITS // 160_136 // 10, n):
        ours, theirs = context.Pipe()
        process = context.Process(target=peak_of_loss, args=(rows, n, theirs))
        process.start()
        found.append(ours.recv())
        process.join()
    return [row("loss, peak memory", found[0], "whole logits", found[1], "GB")]


def data(c: BenchmarkConfig) -> list[dict]:
    """Encoding images, and reading encoded ones, against the training steps that they feed."""
    model, vqgan, _ = load_stage(c.weights, c.device)
    step, side = training_step(model, bf16=False), vqgan.config.resolution
    images = [Image.effect_noise((side, side), 90).convert("RGB") for _ in range(16)]
    with tempfile.TemporaryDirectory() as folder:
        for i, image in enumerate(images):
            save_image(image, Path(folder) / f"{i}.png")
            write_text(Path(folder) / f"{i}.txt", "a red apple")
        encoded = encode_dataset(open_dataset(folder), vqgan, Resize(side), Path(folder) / "tokens")
        read = lambda: batch_of([text_to_image([5, 6, 7], encoded[i], model.vocabulary) for i in range(16)],
                                model.vocabulary, c.device)
        batch = read()
        found = take_turns({"encoding 16 images": lambda: encode_each(vqgan, list(map(to_pixels, images))),
                            "reading 16 encoded images": read, "step": lambda: step(batch)}, c.rounds, c.clock)
    return [row(what, found[what], "a training step on them, float32", found["step"]) for what in list(found)[:2]]


COMMAND = """
import time; times = [("start", time.perf_counter())]
mark = lambda name: times.append((name, time.perf_counter()))
import json, sys, torch; mark("importing torch")
import generate, images, sampling; mark("importing the rest")
pipeline = generate.Pipeline.from_pretrained(sys.argv[1]); torch.set_num_threads(int(sys.argv[3])); mark("loading")
with torch.inference_mode():
    found = pipeline._sample([pipeline._encode("red apple")], pipeline.sizes[0], sampling.Sampling(), [0])
    mark("sampling")
    image, = pipeline._decode(found); mark("decoding")
images.save_image(images.enlarge(image), sys.argv[2]); mark("writing")
print(json.dumps([(name, t - times[i][1]) for i, (name, t) in enumerate(times[1:])]))
"""


def cold(c: BenchmarkConfig) -> list[dict]:
    """`generate.py "red apple"` from a cold start, whole and in parts."""
    with tempfile.TemporaryDirectory() as folder:
        out, parts = str(Path(folder) / "out.png"), []
        python = functools.partial(subprocess.run, check=True, capture_output=True, cwd=Path(__file__).parent.parent)
        command = [sys.executable, "generate.py", "red apple", "--weights", c.weights.resolve(), "-o", out]
        run = lambda: parts.append(json.loads(python([sys.executable, "-c", COMMAND, c.weights.resolve(), out,
                                                      str(c.threads)]).stdout))
        found = take_turns({"whole": lambda: python(command), "parts": run,
                            "torch": lambda: python([sys.executable, "-c", "import torch"])}, c.rounds)
    rows = [row('generate.py "red apple"', found["whole"], "python -c 'import torch'", found["torch"])]
    return rows + [row(name, statistics.median(part[i][1] for part in parts), "the whole command", found["whole"])
                   for i, (name, _) in enumerate(parts[0])]


# ----------------------------------------------------------------------------- the command

PARTS = {"cold": cold, "loss": loss, "decode": decode, "train": train, "data": data}    # loss before what fills memory


def show(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| what | ours | baseline | its | ratio |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {r['what']} | {r['ours']:.4g} {r['unit']} | {r['baseline']} | "
                              f"{r['theirs']:.4g} {r['unit']} | {r['ratio']:.2f} |" for r in rows])


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("benchmark.py"):
        c = parse(BenchmarkConfig, arguments, program="benchmark.py")
        check_device(c.device)
        torch.set_num_threads(c.threads)
        rows = [found for name in PARTS if name in (c.parts or PARTS) for found in PARTS[name](c)]
        print(show(rows))
        if c.out:
            write_json(c.out, {"device": c.device, "torch": torch.__version__, "threads": c.threads,
                               "load": os.getloadavg()[0], "rows": rows})


if __name__ == "__main__":
    main()
