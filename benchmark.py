"""What things cost, each as a ratio to a named baseline in the same run (paper Sec. 4.1 reports only GPU days).

    python benchmark.py                       all of it on the CPU
    python benchmark.py --device cuda --width 4096 --heads 32 --layers 4

Times are medians of runs that take turns with the baseline's, so that a busy machine slows both; the memory of the loss
and the encoding are measured once.
"""
import argparse
import copy
import dataclasses
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import one_line_errors, write_json
from data import Codes, Encoding, World, collate, encode, stage1_rows
from distributed import Ranks, Spread, ready_device
from generate import TINY, Sampling, draw_codes
from mars import LOGITS, MARS, MARSConfig, cross_entropy_in_chunks
from tokenizer import load_tokenizer
from stages import Recipe
from train import make_optimizer
from vqgan import VQGAN


def take_turns(runs: dict, device: torch.device, rounds: int) -> dict[str, float]:
    """Each of `runs` once to warm up, then `rounds` times in turn -> median seconds of each."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in seconds.items()}


def row(what: str, ours: float, baseline: str, theirs: float, unit: str = "s") -> dict:
    """One line of the table: ratio is ours / theirs, so below 1 is better for times and memory."""
    return {"what": what, "ours": ours, "baseline": baseline, "theirs": theirs, "unit": unit, "ratio": ours / theirs}


# ----------------------------------------------------------------------------- what is measured

def training_step(args, config: MARSConfig) -> list[dict]:
    """Forward, backward and AdamW with SemVIE and a frozen language, against one set of weights that all train; and how
    much of the device's speed at multiplying matrices that reaches (on a GPU nearly MFU; on a CPU attention is not
    counted)."""
    device, bf16, rows = args.device, args.device.type == "cuda", []
    generator = torch.Generator().manual_seed(0)
    language = MARS(dataclasses.replace(config, codes=0)).initialise(generator)
    routed = MARS.from_language_model(language, config.codes).to(device)
    dense = MARS.from_language_model(language, config.codes, visual_experts=False).to(device)
    models, steps = {"routed": routed, "dense": dense}, {}
    if args.compile:
        models["compiled"] = copy.deepcopy(routed)
        for block in models["compiled"].blocks:
            block.compile(dynamic=True)
    for name, model in models.items():
        model.freeze_language()
        steps[name] = (Spread(model, Ranks(device=device), bf16=bf16), make_optimizer(model, Recipe(1, 1, 1e-4)))
    for share in (0.0, 0.25, 0.5, 1.0):
        T = 256
        text = round(share * T)
        tokens = torch.cat((torch.randint(config.text_vocab, (8, text), generator=generator),
                            torch.randint(config.text_vocab, config.text_vocab + config.codes, (8, T - text),
                                          generator=generator)), dim=1).to(device)
        is_target = torch.arange(T, device=device).expand(8, T) >= (text if text < T else 0)

        def step(name):
            loss, optimizer = steps[name]
            optimizer.zero_grad()
            loss(tokens, is_target).backward()
            optimizer.step()
        runs = {name: lambda name=name: step(name) for name in steps}
        if share == 0:
            size = 8192 if bf16 else 1024
            square = torch.randn(size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
            runs["product"] = lambda: square @ square
        found = take_turns(runs, device, args.rounds)
        rows.append(row(f"training step, {share:.0%} text", found["routed"], "dense, same width, all weights train",
                        found["dense"]))
        if share == 0:
            with FlopCounterMode(display=False) as counter:
                step("routed")
            speed = counter.get_total_flops() / found["routed"] / 1e12
            rows.append(row("operations a second, training, 0% text", speed,
                            f"a {size} x {size} matrix product's", 2 * size ** 3 / found["product"] / 1e12, "T/s"))
        if args.compile:
            rows.append(row(f"training step, {share:.0%} text, compiled", found["compiled"], "the same, not compiled",
                            found["routed"]))
    return rows


@torch.no_grad()
def decoding(args, config: MARSConfig) -> list[dict]:
    """One picture of 64 tokens at batch 1: with the cache, without, K tokens a pass (Eq. 2), and by `transformers`
    where it is installed."""
    device, cells = args.device, 8

    def build(ahead):
        model = MARS(dataclasses.replace(config, ahead=ahead)).initialise(torch.Generator().manual_seed(0))
        return model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    model = build(1)
    caption = list(range(16))
    greedy = Sampling(cfg=1.0, temperature=0.0)

    def uncached():
        tokens = torch.tensor([[*caption, model.vocabulary.special("<img>")]], device=device)
        for _ in range(cells * cells):
            hidden = model.hidden(tokens)[:, -1]
            code = model.vision_head(hidden)[:, :config.codes].argmax(-1)
            tokens = torch.cat((tokens, code[:, None] + config.text_vocab), dim=1)
    runs = {"cached": lambda: draw_codes(model, [caption], cells, cells, greedy), "uncached": uncached}
    for k in (4, 16):
        runs[f"K = {k}"] = lambda m=build(k): draw_codes(m, [caption], cells, cells, greedy)
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
        theirs = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=config.text_vocab + config.codes, hidden_size=config.width, intermediate_size=config.ffn_width,
            num_hidden_layers=config.layers, num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads)).to(device, next(model.parameters()).dtype).eval()
        prompt = torch.tensor([[*caption, 0]], device=device)
        runs["transformers"] = lambda: theirs.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=cells * cells,
            min_new_tokens=cells * cells, do_sample=False, pad_token_id=0)
    except ImportError:
        print("transformers is not installed: its row is left out")
    found = take_turns(runs, device, args.rounds)
    names = {"uncached": "the same without a cache", "transformers": "transformers' generate, dense Qwen2 of this size"}
    rows = [row("one picture of 64 tokens, batch 1", found["cached"], names[name], found[name]) for name in names
            if name in found]
    rows += [row(f"one picture of 64 tokens, {name} a pass", found[name], "K = 1", found["cached"])
             for name in found if name.startswith("K")]
    if device.type == "cuda":
        per_token = sum(p.nbytes for name, p in model.named_parameters()
                        if name.startswith(("blocks", "vision_head")) and ("visual" in name or "out" in name or
                                                                          "vision" in name))
        block = torch.empty(2 ** 30, dtype=torch.uint8, device=device)
        copy = take_turns({"copy": lambda: block.clone()}, device, args.rounds)["copy"]
        rows.append(row("bytes a second that decoding reads", per_token * cells * cells / found["cached"] / 1e9,
                        "bytes a second that a copy moves", 2 * block.nbytes / copy / 1e9, "GB/s"))
    return rows


def _peak_of_loss(chunk: int, n: int, pipe) -> None:
    """In a process of its own: seconds and peak bytes of one loss and its gradients over Qwen-7B's vocabulary."""
    hidden = torch.randn(n, 64, requires_grad=True)
    head = torch.randn(160_136, 64, requires_grad=True)
    targets = torch.randint(0, 160_136, (n,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    cross_entropy_in_chunks(hidden, targets, lambda rows: rows @ head.T, chunk).backward()
    pipe.send((time.perf_counter() - started, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))


def loss_memory(args, config: MARSConfig) -> list[dict]:
    """Eq. 1 over 160,136 tokens: in chunks, against the logits whole. Width 64, so that the logits are what counts."""
    n = 2048                                      # a tenth of what a GPU's batch of 64 pictures has
    chunk = LOGITS // 160_136 * n // (64 * 330)   # and a tenth of the chunk
    context, found = multiprocessing.get_context("spawn"), {}
    for name, size in (("chunks", chunk), ("whole", n)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_peak_of_loss, args=(size, n, theirs))
        process.start()
        found[name] = ours.recv()
        process.join()
    return [row(f"loss, {what}", found["chunks"][i] / scale, "whole logits", found["whole"][i] / scale, unit)
            for i, (what, unit, scale) in enumerate((("time", "s", 1), ("peak memory", "GB", 1e9)))]


def data(args, config: MARSConfig) -> list[dict]:
    """Pictures encoded a second, and rows of training read a second, against what this machine's model trains."""
    vqgan, tokenizer = VQGAN.from_pretrained(f"{TINY}/vqgan", args.device), load_tokenizer(TINY)
    model = MARS.from_pretrained(TINY, args.device)
    model.freeze_language()
    optimizer, source, rng = make_optimizer(model, Recipe(1, 1, 1e-4)), World(512, seed=0), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        def encoding():
            for file in Path(folder).iterdir():
                file.unlink()
            encode(source, vqgan, Encoding(vqgan.config.resolution), Path(folder), Ranks(device=args.device))
        found = take_turns({"encode": encoding}, args.device, 1)
        codes = Codes(folder)

        def batch():
            rows = stage1_rows(codes, codes.whole, 32, rng, caption_share=0.3)
            return collate([r.sequence(codes[r.index], tokenizer, model.vocabulary) for r in rows],
                           model.vocabulary.special("<pad>"))

        def step():
            tokens, is_target = batch()
            optimizer.zero_grad()
            model.loss(tokens.to(args.device), is_target.to(args.device)).backward()
            optimizer.step()
        found |= take_turns({"read": batch, "step": step}, args.device, args.rounds)
    return [row("encoding a picture", found["encode"] / 512, "a training step on it, tiny", found["step"] / 32),
            row("reading a batch of 32", found["read"], "a training step on it, tiny", found["step"])]


PARTS = {"loss": loss_memory, "train": training_step, "decode": decoding, "data": data}   # loss first: on Linux a new
# process begins with its parent's peak of memory


def show(rows: list[dict]) -> str:
    """The rows as a table."""
    return "\n".join(f"{r['what']:40}{r['ours']:>10.4f}  {r['baseline']:52}{r['theirs']:>10.4f} {r['unit']:5}"
                     f"ratio {r['ratio']:.2f}" for r in rows)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measures speed and memory against named baselines.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all, if none is named")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which needs a C++ compiler")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured")
    parser.add_argument("--device", type=str, default="cpu")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(arguments)
    if odd := set(args.parts) - PARTS.keys():
        parser.error(f"part {sorted(odd)[0]!r}, expected some of {', '.join(PARTS)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("benchmark.py"):
        args.device = torch.device(ready_device(args.device))
        config = MARSConfig(width=args.width, heads=args.heads, kv_heads=args.heads, layers=args.layers, context=512,
                            ffn_width=round(args.width * 2.6875 / 16) * 16, text_vocab=4096, codes=1024)
        rows = []
        for name in [name for name in PARTS if name in (args.parts or PARTS)]:
            rows += (found := PARTS[name](args, config))
            print(show(found), flush=True)
        if args.out:
            write_json(args.out, {"device": str(args.device), "torch": torch.__version__, "rows": rows})


if __name__ == "__main__":
    main()
