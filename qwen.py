"""Reads Qwen's published weights (paper Sec. 3.3: "Qwen-7B, a pre-trained LLM"), in both layouts of the family.

Qwen (`transformer.h.N.attn.c_attn`: 1.8B, 7B, 14B) and Qwen2 (`model.layers.N.self_attn.q_proj`: 0.5B to 72B,
Qwen2.5 too). Each published tensor has one place in MARS: nothing is guessed, left out or left over.
"""
import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from checkpoint import one_line_errors, read_json, write_beside, write_json


@dataclass(frozen=True)
class Layout:
    """How one generation of Qwen names things."""
    fields: dict[str, str]        # our MARSConfig field -> key of their config.json
    tensors: dict[str, str]       # their tensor -> ours; "[q]", "[k]", "[v]": those rows of ours


QWEN = Layout(
    fields={"width": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_attention_heads",
            "ffn_width": "intermediate_size",          # which in this layout counts both halves, see language_config
            "layers": "num_hidden_layers", "context": "seq_length", "text_vocab": "vocab_size",
            "norm_eps": "layer_norm_epsilon", "rope_base": "rotary_emb_base", "tie_embeddings": "tie_word_embeddings"},
    tensors={"transformer.wte.weight": "text_embedding.weight",
             "transformer.h.{i}.ln_1.weight": "blocks.{i}.norm_1.weight",
             "transformer.h.{i}.attn.c_attn.weight": "blocks.{i}.attention.qkv.weight",
             "transformer.h.{i}.attn.c_attn.bias": "blocks.{i}.attention.qkv.bias",
             "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.attention.out.weight",
             "transformer.h.{i}.ln_2.weight": "blocks.{i}.norm_2.weight",
             "transformer.h.{i}.mlp.w1.weight": "blocks.{i}.ffn.up.weight",
             "transformer.h.{i}.mlp.w2.weight": "blocks.{i}.ffn.gate.weight",
             "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.ffn.down.weight",
             "transformer.ln_f.weight": "norm.weight",
             "lm_head.weight": "text_head.weight"})

QWEN2 = Layout(
    fields={"width": "hidden_size", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
            "ffn_width": "intermediate_size", "layers": "num_hidden_layers", "context": "max_position_embeddings",
            "text_vocab": "vocab_size", "norm_eps": "rms_norm_eps", "rope_base": "rope_theta",
            "tie_embeddings": "tie_word_embeddings"},
    tensors={"model.embed_tokens.weight": "text_embedding.weight",
             "model.layers.{i}.input_layernorm.weight": "blocks.{i}.norm_1.weight",
             "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attention.qkv.weight[q]",
             "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attention.qkv.weight[k]",
             "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attention.qkv.weight[v]",
             "model.layers.{i}.self_attn.q_proj.bias": "blocks.{i}.attention.qkv.bias[q]",
             "model.layers.{i}.self_attn.k_proj.bias": "blocks.{i}.attention.qkv.bias[k]",
             "model.layers.{i}.self_attn.v_proj.bias": "blocks.{i}.attention.qkv.bias[v]",
             "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.out.weight",
             "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.norm_2.weight",
             "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.ffn.gate.weight",
             "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.ffn.up.weight",
             "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.ffn.down.weight",
             "model.norm.weight": "norm.weight",
             "lm_head.weight": "text_head.weight"})

LAYOUTS = {"qwen": QWEN, "qwen2": QWEN2}
PART = 2 ** 25                    # bytes, see `stream`


def read_layout(directory: Path) -> tuple[Layout, dict]:
    """The layout that a folder's `config.json` names, and our config fields (those of MARSConfig, without codes).

    Raises ValueError, one line, for an unknown `model_type` or a field that is missing.
    """
    path = directory / "config.json"
    published = read_json(path)
    kind = published.get("model_type")
    if kind not in LAYOUTS:
        raise ValueError(f"{path}: model_type is {kind!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    layout = LAYOUTS[kind]
    for name in layout.fields.values():
        if name not in published:
            raise ValueError(f"{path}: field {name!r} is missing, which a {kind} model needs")
    fields = {ours: published[theirs] for ours, theirs in layout.fields.items()}
    if layout is QWEN:
        fields["ffn_width"] //= 2
    return layout, fields


def tensor_table(layout: Layout, layers: int, tied: bool) -> dict[str, tuple[str, str | None]]:
    """Their tensor -> (our tensor, rows "q", "k", "v" of it or None for all), for every layer."""
    table = {}
    for theirs, ours in layout.tensors.items():
        if theirs == "lm_head.weight" and tied:
            continue
        ours, _, rows = ours.rstrip("]").partition("[")
        for i in range(layers if "{i}" in theirs else 1):
            table[theirs.format(i=i)] = ours.format(i=i), rows or None
    return table


def find_shards(directory: Path) -> dict[Path, list[str]]:
    """The safetensors files of a folder, sharded or single, and the tensors in each by the index.

    Raises ValueError, one line, where a shard is missing.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        path = directory / "model.safetensors"
        if not path.is_file():
            raise ValueError(f"{directory}: found neither model.safetensors nor {index.name}")
        return {path: _names(path)}
    shards: dict[Path, list[str]] = {}
    for name, file in read_json(index).get("weight_map", {}).items():
        shards.setdefault(directory / file, []).append(name)
    for path, names in shards.items():
        if not path.is_file():
            raise ValueError(f"{path}: no such shard, though {index.name} lists it")
        if set(_names(path)) != set(names):
            odd = sorted(set(_names(path)) ^ set(names))[0]
            raise ValueError(f"{path}: {index.name} and this shard disagree about {odd!r}")
    return shards


def _open(path: Path):
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from None


def _names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def stream(directory: Path, layout: Layout, shapes: dict[str, tuple], config):
    """Yields (our tensor's name, slice of its rows, those rows of theirs), shard by shard, memory-mapped.

    shapes: those of our tensors. A large tensor comes in parts of at most PART bytes, each from a mapping of its own:
    pages that were read count as memory until their mapping goes. All names and shapes are checked before the first
    rows come. Raises ValueError, one line, for a tensor that is missing, unexpected or of another shape.
    """
    table = tensor_table(layout, config.layers, config.tie_embeddings)
    q, kv = config.heads * config.head_width, config.kv_heads * config.head_width
    rows = {None: slice(None), "q": slice(0, q), "k": slice(q, q + kv), "v": slice(q + kv, q + 2 * kv)}
    shards = find_shards(directory)
    listed = {name: path for path, names in shards.items() for name in names}
    for name in sorted(table.keys() ^ listed.keys()):
        where = listed.get(name, directory)
        raise ValueError(f"{where}: tensor {name!r} is {'missing' if name in table else 'not one that MARS knows'}")
    for path, names in shards.items():
        with _open(path) as file:
            for name in names:
                ours, part = table[name]
                height = len(range(*rows[part].indices(shapes[ours][0])))
                want, have = (height, *shapes[ours][1:]), tuple(file.get_slice(name).get_shape())
                if have != want:
                    raise ValueError(f"{path}: {name} is {have}, expected {want}")
    for path, names in tqdm(shards.items(), desc="reading shards", unit="shard"):
        for name in names:
            ours, part = table[name]
            start, end, _ = rows[part].indices(shapes[ours][0])
            step = max(1, PART // (2 * math.prod(shapes[ours][1:])))               # rows, at 2 bytes a number
            for first in range(start, end, step):
                last = min(first + step, end)
                with _open(path) as file:
                    yield ours, slice(first, last), file.get_slice(name)[first - start:last - start]


# ----------------------------------------------------------------------------- weights to practise on

def write_random(directory: Path, config: dict, shards: int, seed: int) -> None:
    """Not in the paper: a folder with the real names and shapes and random numbers, of any depth, for a machine that
    the published weights have not reached. config: the content of a published config.json, bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", config)
    layout, fields = read_layout(directory)
    D, F, V = fields["width"], fields["ffn_width"], fields["text_vocab"]
    d = D // fields["heads"]
    q, kv = fields["heads"] * d, fields["kv_heads"] * d
    shapes = {"text_embedding.weight": (V, D), "text_head.weight": (V, D), "qkv.weight": (q + 2 * kv, D),
              "qkv.bias": (q + 2 * kv,), "out.weight": (D, D), "up.weight": (F, D), "gate.weight": (F, D),
              "down.weight": (D, F)}
    table = tensor_table(layout, fields["layers"], fields["tie_embeddings"])
    names, weight_map = list(table), {}
    generator = torch.Generator().manual_seed(seed)
    for i in tqdm(range(shards), desc="writing shards", unit="shard"):
        file, tensors = f"model-{i + 1:05d}-of-{shards:05d}.safetensors", {}
        for name in names[i * len(names) // shards:(i + 1) * len(names) // shards]:
            ours, rows = table[name]
            shape = next((shape for end, shape in shapes.items() if ours.endswith(end)), (D,))
            shape = {None: shape, "q": (q, *shape[1:]), "k": (kv, *shape[1:]), "v": (kv, *shape[1:])}[rows]
            tensors[name] = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02, generator=generator)
            weight_map[name] = file
        write_beside(directory / file, lambda p: save_file(tensors, p))
    write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Writes a folder of random weights in a published model's layout.")
    parser.add_argument("config", type=Path, help="a published config.json")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--layers", type=int, help="instead of the config's")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """The command: one clear line and exit code 2 for bad input."""
    args = parse_arguments(arguments)
    with one_line_errors("qwen.py"):
        config = read_json(args.config)
        write_random(args.out, config | {"num_hidden_layers": args.layers or config.get("num_hidden_layers")},
                     args.shards, args.seed)
        print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
