"""Models small enough to build in a test."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")    # small models; threads that wait for each other spin

import pytest
import torch

from distributed import check_device
from mars import MARS, MARSConfig

check_device("cpu")                # as every program does first
SMALL = dict(width=32, heads=4, kv_heads=2, head_width=8, ffn_width=48, layers=2, max_seq_len=64, text_vocab=42)


def make_language(**changes) -> MARS:
    """A language model alone, with random weights (norms and biases too, or mistakes in them would not show)."""
    generator = torch.Generator().manual_seed(0)
    model = MARS(MARSConfig(**SMALL | changes)).initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def make_mars(k: int = 1, visual_experts: bool = True, route_output: bool = False, **changes) -> MARS:
    """A MARS grown out of such a language model, 16 image tokens, whose visual side then moved away from its copies."""
    generator = torch.Generator().manual_seed(1)
    model = MARS.grow(make_language(**changes), image_vocab=16, noise=0.5, generator=generator, k=k,
                      visual_experts=visual_experts, route_output=route_output).freeze_language()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def language() -> MARS:
    """See make_language."""
    return make_language()


@pytest.fixture
def mars() -> MARS:
    """See make_mars."""
    return make_mars()
