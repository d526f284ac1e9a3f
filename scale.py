"""Not in the paper: what a MARS of the sizes of published language models needs, before anything is allocated.

    python mars.py --plan qwen-7b           parameters, and memory in training
"""
import dataclasses
from dataclasses import dataclass

from config import check, ends_in_one_line, parse, setting    # first, for Ctrl-C

import torch

from mars import LOGITS, MARS, MARSConfig, is_visual


def qwen_config(width: int, heads: int, kv_heads: int, ffn_width: int, layers: int, **more) -> MARSConfig:
    """A published Qwen with the paper's image vocabulary; qwen.py reads the same from its config.json."""
    defaults = dict(head_width=width // heads, max_seq_len=32_768, text_vocab=151_936, rope_base=1e6,
                    tie_embeddings=True, image_vocab=8192)
    return MARSConfig(width=width, heads=heads, kv_heads=kv_heads, ffn_width=ffn_width, layers=layers,
                      **defaults | more)


SIZES = {"qwen-7b": qwen_config(4096, 32, 32, 11008, 32, max_seq_len=8192, rope_base=1e4, tie_embeddings=False),
         "qwen2.5-0.5b": qwen_config(896, 14, 2, 4864, 24),
         "qwen3-0.6b": qwen_config(1024, 16, 8, 3072, 28, head_width=128, qkv_bias=False, qk_norm=True,
                                   max_seq_len=40_960),
         "qwen3-1.7b": qwen_config(2048, 16, 8, 6144, 28, head_width=128, qkv_bias=False, qk_norm=True,
                                   max_seq_len=40_960)}


def count_parameters(config: MARSConfig) -> tuple[int, int]:
    """Parameters of the language side and of the visual side, counted on the meta device."""
    with torch.device("meta"):
        sizes = [(is_visual(name), p.numel()) for name, p in MARS(config).named_parameters()]
    return sum(n for visual, n in sizes if not visual), sum(n for visual, n in sizes if visual)


def training_memory(config: MARSConfig, gpus: int = 8) -> dict[str, float]:
    """Not in the paper: bytes on each GPU, before activations, for each way to train: by DDP the frozen side stays
    bfloat16; sharded, all is float32. AdamW keeps two moments. And the logits of 64 pairs of 256 x 256 pixels."""
    frozen, trained = count_parameters(config)
    if not config.visual_experts:
        frozen, trained = 0, frozen + trained
    V, tokens = config.vocabulary.size, 64 * 330
    return {"train.py under DDP": 2 * frozen + 16 * trained,
            f"train.py --shard on {gpus} GPUs": (4 * frozen + 16 * trained) / gpus,
            "logits, whole": 4 * tokens * V,
            "logits, as the loss computes them": 4 * min(tokens, max(1, LOGITS // V)) * V}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Forecasts what a MARS needs; reads no weights."""
    plan: str = setting("qwen-7b", "the language model to grow out of", choices=tuple(SIZES))
    gpus: int = setting(8, "that --shard spreads the model over", least=1, most=2**16)
    route_output: bool = setting(False, "W_O per modality, the other reading of Fig. 3")

    def __post_init__(self):
        check(self)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    with ends_in_one_line("mars.py"):
        plan = parse(Plan, arguments)
        config = dataclasses.replace(SIZES[plan.plan], route_output=plan.route_output)
        for side, n in zip(("language", "visual"), count_parameters(config)):
            print(f"{side + ' side':36}{n:>16,} parameters {2 * n / 1e9:>8.1f} GB in bfloat16")
        for way, size in training_memory(config, plan.gpus).items():
            print(f"{way:36}{size / 1e9:>16.1f} GB a GPU")
