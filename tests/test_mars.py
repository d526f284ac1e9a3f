"""Claims about SemVIE and MARS (paper Sec. 3.1 to 3.3)."""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

import mars as mars_module
from conftest import make_language, make_mars
from data import targets_of
from mars import MARS, is_visual
from semvie import Router, SwiGLU
from step import hidden_of_images
from tokenizer import Vocabulary

TEXT, IMG = [3, 41, 7, 7, 20], 42                     # some text ids; the first image token


def loss(mars, tokens, is_target, k=1):
    """Eq. 1 and 2 over the marked tokens."""
    return mars(tokens, targets_of(tokens, is_target, mars.vocabulary, k))


def mixed_tokens(mars, rows=2):
    """Text, `<img>`, six image tokens, `</img>`, text again: (rows, 15)."""
    special = mars.vocabulary.special
    row = [*TEXT, special("<img>"), *range(IMG, IMG + 6), special("</img>"), 9, 4]
    return torch.tensor([row] * rows)


# ----------------------------------------------------------------------------- Sec. 3.3: the vocabulary

def test_vocabulary_of_qwen_7b_has_the_papers_160136_rows():
    vocabulary = Vocabulary(text=151_936, image=8192)
    assert (vocabulary.visual, vocabulary.size) == (8200, 160_136)
    assert vocabulary.special("<img>") == 151_936 + 8192
    assert vocabulary.special("<pad>") == 160_133


@pytest.mark.parametrize("text", range(480, 490))
def test_vocabulary_is_padded_to_a_multiple_of_eight_by_less_than_eight(text):
    vocabulary = Vocabulary(text, image=1024)
    assert vocabulary.size % 8 == 0 and 0 <= vocabulary.visual - 1024 - 6 < 8


# ----------------------------------------------------------------------------- Eq. 3 and 4: routing

def test_router_sends_each_token_to_the_expert_of_its_modality_and_back_to_its_place():
    is_visual = torch.tensor([[0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    is_padding = torch.tensor([[0, 0, 0, 0, 1], [0, 0, 0, 1, 1]]).bool()
    router = Router(is_visual, is_padding)
    x = torch.arange(10.0).reshape(2, 5, 1)
    y = router.unpack(router(router.pack(x), lambda t: t + 100, lambda v: v + 200))[..., 0]
    assert y[0, :4].tolist() == [100, 101, 202, 203] and y[1, :3].tolist() == [105, 206, 207]


def test_a_token_costs_one_expert_and_padding_costs_none():
    seen = {"text": 0, "visual": 0}
    def expert(name):
        def run(x):
            seen[name] += len(x)
            return x
        return run
    is_visual = torch.tensor([[0, 0, 1, 1, 1, 0]]).bool()
    router = Router(is_visual, torch.tensor([[0, 0, 0, 0, 0, 1]]).bool())
    router(router.pack(torch.randn(1, 6, 4)), expert("text"), expert("visual"))
    assert seen == {"text": 2, "visual": 3}


def test_a_prompt_gets_no_gradient_and_what_trains_gets_the_same_as_without_that_shortcut(mars):
    tokens = mixed_tokens(mars)
    tokens[1] = tokens[1].roll(-len(TEXT))                       # captioning: the image first, then text
    gradients, on_the_way = {}, []
    mars.blocks[1].ffn.register_forward_hook(lambda m, x, y: on_the_way.append((len(y), y.requires_grad)))
    for frozen in (True, False):
        mars.requires_grad_(True)
        mars = mars.freeze_language() if frozen else mars
        mars.zero_grad()
        loss(mars, tokens, torch.ones_like(tokens, dtype=torch.bool)).backward()
        gradients[frozen] = {name: p.grad for name, p in mars.named_parameters() if is_visual(name)}
    assert on_the_way == [(5, False), (9, True), (14, True)]        # rows, of a prompt and of other text
    for name, gradient in gradients[True].items():
        torch.testing.assert_close(gradient, gradients[False][name], msg=name)


def test_indices_are_computed_once_a_forward_pass(mars, monkeypatch):
    made = []
    init = Router.__init__
    monkeypatch.setattr(Router, "__init__", lambda self, *a: (made.append(1), init(self, *a))[1])
    mars(mixed_tokens(mars))
    assert len(made) == 1


def test_an_expert_without_tokens_still_gets_a_gradient(mars):
    tokens = torch.tensor([TEXT])
    loss(mars, tokens, torch.ones_like(tokens, dtype=torch.bool)).backward()
    assert all(p.grad is not None for name, p in mars.named_parameters() if is_visual(name) and "embedding" not in name)
    assert mars.visual_embedding.weight.grad is not None


def test_block_is_equations_3_and_4_written_out(mars):
    """One layer by hand: experts by modality, one causal attention, W_O shared, pre-norm residuals."""
    tokens = mixed_tokens(mars, rows=1)
    block, c = mars.blocks[0], mars.config
    visual = tokens[0] >= mars.vocabulary.text
    x = torch.stack([mars.visual_embedding.weight[t - 42] if t >= 42 else mars.text_embedding.weight[t]
                     for t in tokens[0]])                                                        # (T, D)
    pick = lambda y, text, vis: torch.stack([(vis if is_v else text)(row) for row, is_v in zip(y, visual)])
    qkv = pick(block.norm_1(x), block.attention.qkv, block.attention.visual_qkv)
    q, k, v = qkv.split([32, 16, 16], dim=-1)
    d, T = c.head_width, len(x)
    def turn(y):                                                              # rotary halves, head by head
        out = []
        for head in y.split(d, dim=-1):
            angle = torch.arange(T)[:, None] * c.rope_base ** (-torch.arange(0, d, 2) / d)
            a, b = head[:, :d // 2], head[:, d // 2:]
            out.append(torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1))
        return out
    q, k, v = turn(q), turn(k), v.split(d, dim=-1)
    heads = []
    for h in range(c.heads):
        g = h * c.kv_heads // c.heads
        scores = (q[h] @ k[g].T / math.sqrt(d)).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[g])
    x = x + block.attention.out(torch.cat(heads, -1))
    x = x + pick(block.norm_2(x), block.ffn, block.visual_ffn)
    x = mars.norm(x)                                                          # of a model with this one block
    alone = MARS(dataclasses.replace(c, layers=1)).eval()
    alone.load_state_dict({n: p for n, p in mars.state_dict().items() if not n.startswith("blocks.1")})
    torch.testing.assert_close(alone.hidden(tokens)[0], x, atol=1e-5, rtol=1e-5)


def test_route_output_gives_the_visual_side_its_own_w_o(language):
    shared = MARS.grow(language, image_vocab=16)
    routed = MARS.grow(language, image_vocab=16, route_output=True)
    tokens = mixed_tokens(shared)
    torch.testing.assert_close(shared(tokens), routed(tokens))               # as initialised: a copy
    with torch.no_grad():
        routed.blocks[0].attention.visual_out.weight.mul_(2)
    assert torch.equal(shared(tokens)[:, :5], routed(tokens)[:, :5])         # the text before the image
    assert not torch.allclose(shared(tokens)[:, 5:], routed(tokens)[:, 5:])


# ----------------------------------------------------------------------------- Sec. 3.2, 3.3: initialisation, freezing

def test_a_copied_visual_expert_treats_a_visual_token_as_text_with_that_embedding(language):
    mars = MARS.grow(language, image_vocab=16)
    with torch.no_grad():
        mars.visual_embedding.weight[:16] = mars.text_embedding.weight[:16]
    as_text, as_codes = torch.arange(10)[None], 42 + torch.arange(10)[None]
    torch.testing.assert_close(mars.hidden(as_text), mars.hidden(as_codes))


def test_text_only_forward_equals_the_language_model_bit_for_bit(language, mars):
    tokens = torch.tensor([TEXT, TEXT[::-1]])
    assert torch.equal(mars(tokens)[..., :42], language(tokens))


def test_frozen_tensors_never_move_and_every_trainable_one_does(mars):
    before = {name: p.clone() for name, p in mars.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in mars.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        codes = torch.randint(42, mars.vocabulary.size, (4, 20), generator=generator)
        tokens = torch.cat((torch.randint(0, 42, (4, 5), generator=generator), codes), 1)
        tokens[tokens == mars.vocabulary.special("<pad>")] = 42
        optimizer.zero_grad()
        loss(mars, tokens, tokens >= 42).backward()
        assert all((p.grad is not None) == p.requires_grad for p in mars.parameters())
        optimizer.step()
    for name, parameter in mars.named_parameters():
        assert torch.equal(parameter, before[name]) != is_visual(name), name


def test_without_visual_experts_every_weight_is_shared_and_trains(language):
    mars = MARS.grow(language, image_vocab=16, visual_experts=False)
    mars.freeze_language()
    assert all(p.requires_grad for p in mars.parameters())
    assert not any("visual_qkv" in name or "visual_ffn" in name for name, _ in mars.named_parameters())
    tokens = mixed_tokens(mars)
    loss(mars, tokens, tokens >= 42).backward()
    assert mars.blocks[0].ffn.gate_up.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------- Sec. 3.3: two heads, one softmax

def test_every_position_has_one_softmax_over_both_vocabularies(mars):
    tokens = mixed_tokens(mars)
    logits = mars(tokens)
    assert logits.shape == (2, 15, mars.vocabulary.size) and logits.dtype == torch.float32
    hidden = mars.hidden(tokens)
    torch.testing.assert_close(logits[..., :42], mars.text_head(hidden))
    torch.testing.assert_close(logits[..., 42:], mars.vision_head(hidden))


# ----------------------------------------------------------------------------- Sec. 3.1: the loss, Eq. 1 and 2

def test_loss_is_equation_1_over_the_marked_tokens_whatever_the_chunk(mars, monkeypatch):
    tokens = mixed_tokens(mars)
    is_target = tokens >= 42
    expected = F.cross_entropy(mars(tokens)[:, :-1][is_target[:, 1:]], tokens[:, 1:][is_target[:, 1:]])
    for rows in (1, 3, 7, 1000):
        monkeypatch.setattr(mars_module, "LOGITS", rows * mars.vocabulary.size)
        torch.testing.assert_close(loss(mars, tokens, is_target), expected)


def test_chunked_loss_has_the_gradients_of_the_whole_one_and_never_the_whole_logits(mars, monkeypatch):
    tokens, largest, grads = mixed_tokens(mars), [], []
    logits = MARS.logits
    monkeypatch.setattr(MARS, "logits", lambda self, h: (largest.append(len(h)), logits(self, h))[1])
    for rows in (4, 1000):
        monkeypatch.setattr(mars_module, "LOGITS", rows * mars.vocabulary.size)
        largest.clear(), mars.zero_grad()
        loss(mars, tokens, tokens >= 42).backward()
        assert max(largest) <= rows
        grads.append({name: p.grad.clone() for name, p in mars.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("k", [2, 4])
def test_loss_is_equation_2_written_out_the_mean_over_all_that_is_asked(k):
    mars = make_mars(k=k)
    tokens = mixed_tokens(mars)
    is_target, total, n = tokens >= 42, 0.0, 0
    h = mars.hidden(tokens)
    for b in range(2):
        for t in range(15):
            for j in range(1, k + 1):
                inside = tokens[b, t] >= 42 or j == 1
                if t + j < 15 and is_target[b, t + j] and inside:
                    total, n = total - mars.logits(mars.head(h[b, t], j)).log_softmax(-1)[tokens[b, t + j]], n + 1
    torch.testing.assert_close(loss(mars, tokens, is_target, k), total / n)


@pytest.mark.parametrize("k", [1, 4, 8])
def test_an_untrained_model_has_a_first_loss_of_ln_v_at_every_k(k):
    language = make_language(width=64, head_width=16, ffn_width=176, text_vocab=500, max_seq_len=128)
    mars = MARS.grow(language, image_vocab=1024, k=k)
    tokens = torch.randint(500, 1524, (8, 64), generator=torch.Generator().manual_seed(0))
    first = loss(mars, tokens, torch.ones_like(tokens).bool(), k).item()
    assert abs(first - math.log(mars.vocabulary.size)) < 0.5


def test_every_head_gets_a_gradient_and_heads_2_to_k_start_as_head_1():
    mars = MARS.grow(make_mars(), k=3).freeze_language()
    h = torch.randn(2, 5, 32)
    assert torch.equal(mars.head(h, 2), h) and torch.equal(mars.head(h, 3), h)
    for tokens in (mixed_tokens(mars), torch.tensor([TEXT])):
        mars.zero_grad()
        loss(mars, tokens, torch.ones_like(tokens).bool(), 3).backward()
        assert all(p.grad is not None for p in mars.parameters() if p.requires_grad)


def test_recomputed_activations_give_the_same_gradients(mars):
    tokens, grads = mixed_tokens(mars), []
    for recompute in (False, True):
        mars.zero_grad()
        mars(tokens, targets_of(tokens, tokens >= 42, mars.vocabulary), recompute).backward()
        grads.append({name: p.grad.clone() for name, p in mars.named_parameters() if p.requires_grad})
    torch.testing.assert_close(*grads, rtol=0, atol=0)


# ----------------------------------------------------------------------------- Sec. 3.3, 3.4: growing

def test_visual_rows_start_at_the_mean_of_the_text_rows_plus_noise_if_asked():
    for noise in (0.0, 0.5):
        language = make_language(text_vocab=400)
        mars = MARS.grow(language, image_vocab=1000, noise=noise)
        for visual, text in ((mars.visual_embedding, language.text_embedding), (mars.vision_head, language.text_head)):
            apart = (visual.weight - text.weight.mean(0)).std(0) / text.weight.std(0)
            torch.testing.assert_close(apart, torch.full((32,), noise), atol=0.06, rtol=0)


def test_stage_iii_starts_as_stage_ii_and_takes_its_tensors_over(mars):
    tokens = mixed_tokens(mars)
    before, embedding = mars(tokens), mars.text_embedding.weight
    larger = MARS.grow(mars, k=4, sizes=((64, 64),), long_side=128)
    assert torch.equal(larger(tokens), before) and larger.config.long_side == 128
    assert larger.text_embedding.weight.data_ptr() == embedding.data_ptr()


@pytest.mark.parametrize("change", [{}, {"route_output": True}, {"visual_experts": False}, {"qk_norm": True},
                                    {"kv_heads": 4, "qkv_bias": False}, {"norm_eps": 0.5}])
@torch.no_grad()
def test_the_step_for_visual_tokens_alone_computes_what_the_blocks_compute(change):
    mars, steps = make_mars(**change), []
    tokens = mixed_tokens(mars)[:, :12]
    for forward in (MARS.hidden, hidden_of_images):
        cache = mars.new_cache(2, 12)
        mars.hidden(tokens[:, :6], cache)
        steps.append([forward(mars, part, cache) for part in (tokens[:, 6:7], tokens[:, 7:12])])
    torch.testing.assert_close(*steps)


@torch.no_grad()
def test_all_visual_tokens_need_no_counting(mars, monkeypatch):
    tokens, cache = torch.randint(42, 58, (2, 6), generator=torch.Generator().manual_seed(0)), mars.new_cache(2, 6)
    expected = mars.hidden(tokens)
    mars.hidden(tokens[:, :2], cache)
    monkeypatch.setattr(Router, "__init__", None)
    torch.testing.assert_close(hidden_of_images(mars, tokens[:, 2:], cache), expected[:, 2:])


# ----------------------------------------------------------------------------- causality, padding and the cache

def test_no_position_sees_its_future(mars):
    tokens = mixed_tokens(mars, rows=1)
    full = mars(tokens)
    for t in range(1, tokens.shape[1]):
        changed = tokens.clone()
        changed[0, t:] = torch.tensor([42 + 15 - i % 16 if i % 2 else i % 42 for i in range(tokens.shape[1] - t)])
        torch.testing.assert_close(mars(changed)[:, :t], full[:, :t])


@torch.no_grad()
def test_cached_equals_uncached(mars):
    tokens = mixed_tokens(mars)
    cache = mars.new_cache(2, 15)
    run = lambda part: mars.logits(mars.hidden(part, cache))
    steps = [run(tokens[:, :4]), run(tokens[:, 4:7]), *(run(tokens[:, t:t + 1]) for t in range(7, 15))]
    torch.testing.assert_close(torch.cat(steps, 1), mars(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_at_either_side_changes_nothing(mars):
    tokens, pad = mixed_tokens(mars, rows=1), mars.vocabulary.special("<pad>")
    alone = mars(tokens)
    right = torch.cat((tokens, torch.full((1, 3), pad)), 1)
    torch.testing.assert_close(mars(right)[:, :15], alone, atol=1e-5, rtol=1e-5)
    cache = mars.new_cache(2, 18)
    left = torch.cat((torch.cat((torch.full((1, 3), pad), tokens), 1), torch.cat((tokens, tokens[:, :3]), 1)))
    run = lambda part: mars.logits(mars.hidden(part, cache))
    both = torch.cat((run(left[:, :8]), run(left[:, 8:12]), *(run(left[:, t:t + 1]) for t in range(12, 18))), 1)
    torch.testing.assert_close(both[:1, 3:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:, :15], alone, atol=1e-5, rtol=1e-5)


def test_a_sequence_longer_than_max_seq_len_is_refused(mars):
    with pytest.raises(ValueError, match="65 tokens, but the model's max_seq_len is 64"):
        mars(torch.zeros((1, 65), dtype=torch.long))


# ----------------------------------------------------------------------------- files

def test_saved_and_loaded_again_is_the_same_model(mars, tmp_path):
    mars.save_pretrained(tmp_path)
    again = MARS.from_pretrained(tmp_path)
    tokens = mixed_tokens(mars)
    assert again.config == mars.config and torch.equal(again(tokens), mars(tokens))


def test_swiglu_is_down_of_silu_gate_times_up():
    ffn, x = SwiGLU(8, 12), torch.randn(5, 8)
    (gate, up), down = ffn.gate_up.weight.chunk(2), ffn.down.weight
    torch.testing.assert_close(ffn(x), (x @ gate.T * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)


@pytest.mark.parametrize("change, message", [
    ({"head_width": 7}, "head_width is 7, expected an even number"),
    ({"kv_heads": 3}, "heads is 4, expected a multiple of the 3 kv_heads"),
    ({"layers": "two"}, "layers is 'two', expected a whole number"),
    ({"depth": 2}, "field 'depth' is unknown"),
    ({"layers": 10**7}, "layers is 10000000, expected 1 to 1000"),
    ({"norm_eps": True}, "norm_eps is True, expected a finite number"),
    ({"sizes": None}, "sizes is None, expected a list"),
    ({"k": 0}, "k is 0, expected 1 to 1024"),
    ({"image_vocab": 24}, "vision_head.weight is (22, 32), expected (30, 32)"),
])
def test_a_bad_config_is_refused_in_one_line(mars, tmp_path, change, message):
    mars.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError) as error:
        MARS.from_pretrained(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_config_without_a_field_is_refused(mars, tmp_path):
    mars.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_base"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="field 'rope_base' is missing"):
        MARS.from_pretrained(tmp_path)
