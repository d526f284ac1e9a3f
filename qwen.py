"""Reads Qwen's published weights (paper Sec. 3.3: "Qwen-7B, a pre-trained LLM"), in the three layouts of the family.

Qwen (`transformer.h.N.attn.c_attn`: 1.8B, 7B, 14B), Qwen2 (`model.layers.N.self_attn.q_proj`: 0.5B to 72B, Qwen2.5
too) and Qwen3 (0.6B to 32B). Each published tensor has one place in MARS: nothing is guessed, left out or left over.
What is missing, unexpected, of another shape or not finite raises ValueError, one line.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from checkpoint import check_numbers, check_shapes, open_tensors
from config import describe, fit
from files import read_json

PART = 2 ** 25                    # bytes, see `stream`


@dataclass(frozen=True)
class Layout:
    """Sec. 3.3: how one generation of Qwen names its fields and tensors."""
    sizes: dict[str, str]         # our MARSConfig field -> key of their config.json
    fixed: dict                   # key of their config.json -> the one value, or none at all, that MARS computes
    tensors: dict[str, str]       # their tensor -> ours; "[q]", "[k]", "[v]", "[gate]", "[up]": those rows of ours
    qkv_bias: bool
    qk_norm: bool = False


SIZES = {"width": "hidden_size", "heads": "num_attention_heads", "ffn_width": "intermediate_size",
         "layers": "num_hidden_layers", "text_vocab": "vocab_size", "tie_embeddings": "tie_word_embeddings"}
SIZES_QWEN = SIZES | {"kv_heads": "num_attention_heads", "head_width": "kv_channels", "max_seq_len": "seq_length",
                      "norm_eps": "layer_norm_epsilon", "rope_base": "rotary_emb_base"}
SIZES_QWEN2 = SIZES | {"kv_heads": "num_key_value_heads", "head_width": "head_dim", "rope_base": "rope_theta",
                       "max_seq_len": "max_position_embeddings", "norm_eps": "rms_norm_eps"}

FIXED = {"quantization_config": None, "partial_rotary_factor": 1.0}
FIXED_QWEN = FIXED | {"no_bias": True, "rotary_pct": 1.0, "scale_attn_weights": True}
FIXED_QWEN2 = FIXED | {"hidden_act": "silu", "use_sliding_window": False}

TENSORS_QWEN = {
    "transformer.wte.weight": "text_embedding.weight",
    "transformer.h.{i}.ln_1.weight": "blocks.{i}.norm_1.weight",
    "transformer.h.{i}.attn.c_attn.weight": "blocks.{i}.attention.qkv.weight",
    "transformer.h.{i}.attn.c_attn.bias": "blocks.{i}.attention.qkv.bias",
    "transformer.h.{i}.attn.c_proj.weight": "blocks.{i}.attention.out.weight",
    "transformer.h.{i}.ln_2.weight": "blocks.{i}.norm_2.weight",
    "transformer.h.{i}.mlp.w2.weight": "blocks.{i}.ffn.gate_up.weight[gate]",
    "transformer.h.{i}.mlp.w1.weight": "blocks.{i}.ffn.gate_up.weight[up]",
    "transformer.h.{i}.mlp.c_proj.weight": "blocks.{i}.ffn.down.weight",
    "transformer.ln_f.weight": "norm.weight",
    "lm_head.weight": "text_head.weight"}
TENSORS = {
    "model.embed_tokens.weight": "text_embedding.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.norm_1.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attention.qkv.weight[q]",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attention.qkv.weight[k]",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attention.qkv.weight[v]",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attention.out.weight",
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.norm_2.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.ffn.gate_up.weight[gate]",
    "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.ffn.gate_up.weight[up]",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.ffn.down.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "text_head.weight"}
TENSORS_QWEN2 = TENSORS | {f"model.layers.{{i}}.self_attn.{part}_proj.bias": f"blocks.{{i}}.attention.qkv.bias[{part}]"
                           for part in "qkv"}
TENSORS_QWEN3 = TENSORS | {f"model.layers.{{i}}.self_attn.{part}_norm.weight":
                           f"blocks.{{i}}.attention.{part}_norm.weight" for part in "qk"}

KINDS = {"norm_eps": float, "rope_base": float, "tie_embeddings": bool}        # all other fields: int
LAYOUTS = {"qwen": Layout(SIZES_QWEN, FIXED_QWEN, TENSORS_QWEN, qkv_bias=True),
           "qwen2": Layout(SIZES_QWEN2, FIXED_QWEN2, TENSORS_QWEN2, qkv_bias=True),
           "qwen3": Layout(SIZES_QWEN2, FIXED_QWEN2 | {"attention_bias": False}, TENSORS_QWEN3, qkv_bias=False,
                           qk_norm=True)}


def read_layout(directory: str | Path) -> tuple[Layout, dict]:
    """Sec. 3.3: the layout that a folder's `config.json` names, and the fields of MARSConfig that it decides. Raises
    ValueError, one line, for a variant that MARS would compute wrong, such as scaled rotary embeddings."""
    path = Path(directory) / "config.json"
    published = read_json(path)
    kind = published.get("model_type")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        raise ValueError(f"{path}: model_type is {kind!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    layout = LAYOUTS[kind]
    for key in ("rope_parameters", "rope_scaling"):      # of transformers 5, and of all before
        rope = published.get(key) or {}
        scaled = not isinstance(rope, dict) or "factor" in rope
        if scaled or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise ValueError(f"{path}: {key} is {rope!r}, expected the default rotary embedding")
        published |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    for key, value in layout.fixed.items():
        if published.get(key) not in (None, value):
            raise ValueError(f"{path}: {key} is {published[key]!r}, expected {value!r}: MARS computes nothing else")
    types = published.get("layer_types") or []
    if not isinstance(types, list) or any(name != "full_attention" for name in types):
        raise ValueError(f"{path}: layer_types is {types!r}, expected full_attention alone")
    sizes = {}
    for ours, theirs in layout.sizes.items():
        value, kind_of = published.get(theirs, "missing"), KINDS.get(ours, int)
        if theirs == "head_dim" and value in ("missing", None):
            value = sizes["width"] // sizes["heads"]
        try:
            sizes[ours] = fit(value, kind_of)
        except TypeError:
            raise ValueError(f"{path}: {theirs} is {value!r}, expected {describe(kind_of)}") from None
        if kind_of is int and value < 1:
            raise ValueError(f"{path}: {theirs} is {value}, expected 1 or more")
    if kind == "qwen":
        sizes["ffn_width"] //= 2                         # in this layout it counts gate and up
    return layout, sizes | {"qkv_bias": layout.qkv_bias, "qk_norm": layout.qk_norm}


def tensor_table(layout: Layout, layers: int, tied: bool) -> dict[str, tuple[str, str]]:
    """Sec. 3.3: their tensor -> (our tensor, rows "q", "k", "v", "gate", "up" of it, or "" for all), for every layer.
    tied: the text head is the embedding, so that it has no tensor of its own."""
    table = {}
    for theirs, ours in layout.tensors.items():
        ours, _, rows = ours.rstrip("]").partition("[")
        for i in range(layers if "{i}" in theirs else 1):
            table[theirs.format(i=i)] = ours.format(i=i), rows
    if tied:
        del table["lm_head.weight"]
    return table


def find_shards(directory: Path) -> dict[str, Path]:
    """Not in the paper: tensor -> the safetensors file of a folder that holds it, whether there is one or an index.
    A link may only lead to `../../blobs`, where the cache of huggingface_hub has its files."""
    index, path = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if path.exists():                                    # an index next to it is of other weights
        return {name: path for name in _names(path)}
    if not index.exists():
        raise ValueError(f"{directory}: found neither {path.name} nor {index.name}")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index}: weight_map is missing or no object, expected tensors and their files")
    home, shards = directory.resolve(), {}
    for name, file in listed.items():
        path = directory / str(file)
        if Path(str(file)).name != file or path.resolve().parent not in (home, home.parent.parent / "blobs"):
            raise ValueError(f"{index}: {name} is in {file!r}, expected a file of this folder")
        shards[name] = path
    for path in set(shards.values()):
        odd = set(_names(path)) ^ {name for name, file in shards.items() if file == path}
        if odd:
            raise ValueError(f"{path}: {index.name} and this file disagree about {min(odd)!r}")
    return shards


def _names(path: Path) -> list[str]:
    with open_tensors(path) as file:
        return list(file.keys())


def stream(directory: str | Path, layout: Layout, shapes: dict[str, tuple], config):
    """Sec. 3.3: yields (our tensor's name, slice of its rows, those rows of theirs: a Tensor), memory-mapped.

    shapes: those of our tensors. A large tensor comes in parts of at most PART bytes, each from a mapping of its own:
    pages that were read count as memory until their mapping goes. All names and shapes are checked before the first
    rows come.
    """
    table = tensor_table(layout, config.layers, config.tie_embeddings)
    q, kv, F = config.heads * config.head_width, config.kv_heads * config.head_width, config.ffn_width
    starts = {"": (0, None), "q": (0, q), "k": (q, q + kv), "v": (q + kv, q + 2 * kv), "gate": (0, F), "up": (F, 2 * F)}
    shards = find_shards(Path(directory))
    if config.tie_embeddings:
        shards.pop("lm_head.weight", None)               # stored all the same, by some
    for name in sorted(table.keys() ^ shards.keys()):
        where = shards.get(name, directory)
        raise ValueError(f"{where}: tensor {name!r} is {'missing' if name in table else 'not one that MARS knows'}")
    places = {}
    for name, path in sorted(shards.items(), key=lambda item: item[1]):
        ours, part = table[name]
        places[name] = start, end = slice(*starts[part]).indices(shapes[ours][0])[:2]
        with open_tensors(path) as file:
            have, want = tuple(file.get_slice(name).get_shape()), (end - start, *shapes[ours][1:])
        check_shapes(path, {name: want}, {name: have})
    with tqdm(places.items(), desc="reading Qwen", unit="tensor", disable=None) as bar:
        for name, (start, end) in bar:
            ours = table[name][0]
            step = max(1, PART // (2 * math.prod(shapes[ours][1:])))               # rows, at 2 bytes a number
            for first in range(start, end, step):
                last = min(first + step, end)
                with open_tensors(shards[name]) as file:
                    rows = file.get_slice(name)[first - start:last - start]
                    check_numbers(shards[name], name, rows)
                    yield ours, slice(first, last), rows
