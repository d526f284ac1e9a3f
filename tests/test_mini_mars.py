"""MARS on one page is the MARS of mars.py."""
import torch

from conftest import make_mars
from mini_mars import MiniMARS, generate


def mini_of(model):
    c = model.config
    mini = MiniMARS(c.width, c.heads, c.ffn_width, c.layers, model.vocabulary.text, model.vocabulary.visual)
    mini.load_state_dict(model.state_dict(), strict=True)
    return mini.eval()


def test_one_page_loads_the_weights_of_mars_and_computes_the_same_logits():
    model = make_mars(kv_heads=4)
    tokens = torch.randint(0, model.vocabulary.size - 8, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mini_of(model)(tokens), model(tokens), atol=1e-5, rtol=1e-5)


def test_one_page_has_the_loss_and_the_frozen_parameters_of_mars():
    from data import targets_of
    model = make_mars(kv_heads=4)
    mini = mini_of(model)
    tokens = torch.randint(0, model.vocabulary.size - 8, (2, 24), generator=torch.Generator().manual_seed(0))
    is_target = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) < 0.5
    is_target[:, 0] = False
    targets = targets_of(tokens, is_target, model.vocabulary)
    torch.testing.assert_close(mini.loss(tokens, is_target), model(tokens, targets))
    mini.freeze_language(), model.freeze_language()
    assert [p.requires_grad for p in mini.parameters()] == [dict(model.named_parameters())[name].requires_grad
                                                           for name, _ in mini.named_parameters()]


def test_one_page_samples_image_tokens_alone():
    model = make_mars(kv_heads=4)
    tokens = generate(mini_of(model), [1, 2, model.vocabulary.special("<img>")],
                      [model.vocabulary.special("<uncond>"), model.vocabulary.special("<img>")], 5, 16, guidance=2.0)
    assert len(tokens) == 5 and all(0 <= token < 16 for token in tokens)
