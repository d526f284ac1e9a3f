"""Reads Qwen's published weights (paper Sec. 3.3: "Qwen-7B, a pre-trained LLM"), in both layouts of the family.

Qwen (`transformer.h.N.attn.c_attn`: 1.8B, 7B, 14B) and Qwen2 (`model.layers.N.self_attn.q_proj`: 0.5B to 72B,
Qwen2.5 too). Each published tensor has one place in MARS: nothing is guessed, left out or left over.
"""
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from checkpoint import read_json


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
    """Yields (our tensor's name, slice of its rows, their tensor, memory-mapped), shard by shard.

    shapes: those of our tensors. All names and shapes are checked before the first tensor comes. Raises ValueError,
    one line, for a tensor that is missing, unexpected or of another shape.
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
        with _open(path) as file:
            for name in names:
                ours, part = table[name]
                yield ours, rows[part], file.get_tensor(name)
