"""Models small enough to build in a test."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")    # small models; threads that wait for each other spin

import pytest
import torch

import stages
from distributed import ready_device
from mars import MARS, MARSConfig

ready_device("cpu")                # as every program does first
stages.SAMPLES = 16               # enough to try the way; a run draws 64
SMALL = MARSConfig(width=32, heads=4, kv_heads=2, ffn_width=48, layers=2, context=64, text_vocab=42)


@pytest.fixture
def language() -> MARS:
    """A language model alone, with random weights (norms and biases too, or mistakes in them would not show)."""
    generator = torch.Generator().manual_seed(0)
    model = MARS(SMALL).initialise(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture
def mars(language) -> MARS:
    """A MARS grown out of `language`, whose visual side has then moved away from its copies: 16 codes."""
    generator = torch.Generator().manual_seed(1)
    codebook = torch.randn(16, 8, generator=generator)
    model = MARS.from_language_model(language, codes=16, codebook=codebook, generator=generator)
    model.freeze_language()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
