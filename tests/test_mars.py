"""Claims about SemVIE and MARS (paper Sec. 3.1 to 3.3)."""
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F

from mars import MARS, VISUAL_TABLES, MARSConfig, cross_entropy_in_chunks, is_visual
from semvie import Router, SwiGLU
from tokenizer import Vocabulary

TEXT, IMG = [3, 41, 7, 7, 20], 42                     # some text ids; the first code


def mixed_tokens(mars, rows=2):
    """Text, `<img>`, six codes, `</img>`, text again: (rows, 15)."""
    special = mars.vocabulary.special
    row = [*TEXT, special("<img>"), *range(IMG, IMG + 6), special("</img>"), 9, 4]
    return torch.tensor([row] * rows)


# ----------------------------------------------------------------------------- Sec. 3.3: the vocabulary

def test_vocabulary_of_qwen_7b_has_the_papers_160136_rows():
    vocabulary = Vocabulary(text=151_936, codes=8192)
    assert (vocabulary.visual, vocabulary.size) == (8200, 160_136)
    assert vocabulary.special("<img>") == 151_936 + 8192
    assert vocabulary.special("<pad>") == 160_133


@pytest.mark.parametrize("text", range(480, 490))
def test_vocabulary_is_padded_to_a_multiple_of_eight_by_less_than_eight(text):
    vocabulary = Vocabulary(text, codes=1024)
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


def test_indices_are_computed_once_a_forward_pass(mars, monkeypatch):
    made = []
    init = Router.__init__
    monkeypatch.setattr(Router, "__init__", lambda self, *a: (made.append(1), init(self, *a))[1])
    mars(mixed_tokens(mars))
    assert len(made) == 1


def test_an_expert_without_tokens_still_gets_a_gradient(mars):
    tokens = torch.tensor([TEXT])
    mars.loss(tokens, torch.ones_like(tokens, dtype=torch.bool)).backward()
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
    shared = MARS.from_language_model(language, codes=16)
    routed = MARS.from_language_model(language, codes=16, route_output=True)
    tokens = mixed_tokens(shared)
    torch.testing.assert_close(shared(tokens), routed(tokens))               # as initialised: a copy
    with torch.no_grad():
        routed.blocks[0].attention.visual_out.weight.mul_(2)
    assert torch.equal(shared(tokens)[:, :5], routed(tokens)[:, :5])         # the text before the picture
    assert not torch.allclose(shared(tokens)[:, 5:], routed(tokens)[:, 5:])


# ----------------------------------------------------------------------------- Sec. 3.2, 3.3: initialisation, freezing

def test_a_copied_visual_expert_treats_a_visual_token_as_text_with_that_embedding(language):
    mars = MARS.from_language_model(language, codes=16)
    with torch.no_grad():
        mars.visual_embedding.weight[:16] = mars.text_embedding.weight[:16]
    as_text, as_codes = torch.arange(10)[None], 42 + torch.arange(10)[None]
    torch.testing.assert_close(mars.hidden(as_text), mars.hidden(as_codes))


def test_visual_rows_start_at_the_mean_of_the_text_rows(language):
    mars = MARS.from_language_model(language, codes=16)
    for visual, text in ((mars.visual_embedding, language.text_embedding), (mars.vision_head, language.text_head)):
        torch.testing.assert_close(visual.weight, text.weight.mean(0).expand_as(visual.weight))


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
        mars.loss(tokens, tokens >= 42).backward()
        assert all((p.grad is not None) == p.requires_grad for p in mars.parameters())
        optimizer.step()
    for name, parameter in mars.named_parameters():
        assert torch.equal(parameter, before[name]) != is_visual(name), name


def test_without_visual_experts_every_weight_is_shared_and_trains(language):
    mars = MARS.from_language_model(language, codes=16, visual_experts=False)
    mars.freeze_language()
    assert all(p.requires_grad for p in mars.parameters())
    assert not any("visual_qkv" in name or "visual_ffn" in name for name, _ in mars.named_parameters())
    tokens = mixed_tokens(mars)
    mars.loss(tokens, tokens >= 42).backward()
    assert mars.blocks[0].ffn.gate.weight.grad.abs().sum() > 0


# ----------------------------------------------------------------------------- Sec. 3.3: two heads, one softmax

def test_every_position_has_one_softmax_over_both_vocabularies(mars):
    tokens = mixed_tokens(mars)
    logits = mars(tokens)
    assert logits.shape == (2, 15, mars.vocabulary.size) and logits.dtype == torch.float32
    hidden = mars.hidden(tokens)
    torch.testing.assert_close(logits[..., :42], mars.text_head(hidden))
    torch.testing.assert_close(logits[..., 42:], mars.vision_head(hidden))


def test_loss_is_equation_1_over_the_marked_tokens_whatever_the_chunk(mars):
    tokens = mixed_tokens(mars)
    is_target = tokens >= 42
    expected = F.cross_entropy(mars(tokens)[:, :-1][is_target[:, 1:]], tokens[:, 1:][is_target[:, 1:]])
    for chunk in (1, 3, 7, 1000):
        torch.testing.assert_close(mars.loss(tokens, is_target, chunk), expected)


def test_chunked_loss_has_the_gradients_of_the_whole_one_and_never_the_whole_logits():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(30, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 20, (30,), generator=generator)
    largest = []
    def logits_of(rows):
        largest.append(len(rows))
        return rows @ weight.T
    cross_entropy_in_chunks(hidden, targets, logits_of, chunk=7).backward()
    assert max(largest) == 7
    found = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    F.cross_entropy(hidden @ weight.T, targets).backward()
    torch.testing.assert_close(found, (hidden.grad, weight.grad))


def test_codes_that_look_alike_start_alike_in_both_visual_tables():
    generator = torch.Generator().manual_seed(0)
    language = MARS(MARSConfig(width=64, heads=4, kv_heads=4, ffn_width=176, layers=1, context=8, text_vocab=50))
    language.initialise(generator)
    kinds = torch.randn(4, 8, generator=generator)
    codebook = kinds.repeat_interleave(10, 0) + 0.1 * torch.randn(40, 8, generator=generator)     # four kinds of ten
    mars = MARS.from_language_model(language, codes=40, codebook=codebook, generator=generator)
    for table, text in ((mars.visual_embedding, mars.text_embedding), (mars.vision_head, mars.text_head)):
        rows = table.weight[:40] - text.weight.mean(0)
        likeness = F.cosine_similarity(rows[:, None], rows[None], dim=-1)
        same = torch.arange(40)[:, None] // 10 == torch.arange(40) // 10
        assert likeness[same].mean() > 0.6 and likeness[~same].mean() < 0.15
        assert table.weight.std() < 1.5 * text.weight.std()


def test_shared_rows_start_as_they_are_and_fold_into_a_model_that_shares_none(mars, tmp_path):
    tokens = mixed_tokens(mars)
    with torch.no_grad():
        before = mars(tokens)
        mars.share_rows(torch.randn(16, 8, generator=torch.Generator().manual_seed(2)))
        assert torch.equal(mars(tokens), before)                  # they start at zero
        for name, parameter in mars.named_parameters():
            if name.endswith(".shared"):
                parameter.normal_()
        assert not torch.allclose(mars(tokens), before)
        mars.save_pretrained(tmp_path)
        torch.testing.assert_close(MARS.from_pretrained(tmp_path)(tokens), mars(tokens))


@pytest.mark.parametrize("ahead", [1, 4])
def test_shared_rows_have_the_same_gradients_whatever_the_chunk(mars, ahead):
    model, found = MARS.from_earlier_stage(mars, ahead=ahead), []
    model.share_rows(torch.randn(16, 8, generator=torch.Generator().manual_seed(2)))
    model.freeze_language()
    tokens = mixed_tokens(model)
    for chunk in (2, 10_000):
        model.zero_grad()
        model.loss(tokens, tokens >= 0, chunk).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert any(name.endswith(".shared") and grad.abs().sum() > 0 for name, grad in found[0].items())
    torch.testing.assert_close(*found)


def test_codes_that_look_alike_learn_together(mars):
    codebook = torch.randn(16, 8, generator=torch.Generator().manual_seed(2))
    codebook[1] = codebook[0]
    mars.share_rows(codebook)
    mars.freeze_language()
    V_t = mars.vocabulary.text
    mars.loss(torch.tensor([[3, V_t, V_t]]), torch.tensor([[False, False, True]])).backward()       # code 0 alone is shown
    with torch.no_grad():
        rows = mars.vision_head.weight.clone()
        for parameter in mars.vision_head.parameters():
            if parameter is mars.vision_head.parametrizations.weight[0].shared:
                parameter.sub_(parameter.grad)
        moved = (mars.vision_head.weight - rows)[:16]
    torch.testing.assert_close(moved[1], moved[0])
    assert moved[0].norm() > 0 and not torch.allclose(moved[2], moved[0])


def test_a_code_cannot_learn_by_itself_that_no_caption_means_it(mars):
    """In the vision head only what codes share moves; special tokens, and rows of the embedding, move by themselves."""
    mars.uncaptioned = torch.arange(16) == 5
    mars.share_rows(torch.randn(16, 8, generator=torch.Generator().manual_seed(2)))
    mars.freeze_language()
    tokens = torch.tensor([[3, mars.vocabulary.special("<img>"), mars.vocabulary.text, mars.vocabulary.text + 1]])
    mars.loss(tokens, tokens >= mars.vocabulary.text).backward()
    embedding, head = (getattr(mars, name).parametrizations.weight.original.grad for name in VISUAL_TABLES)
    assert not head[:16].any() and head[16:].any() and embedding[:16].any()


def test_codes_that_no_captioned_picture_shows_are_candidates_only_without_a_caption(mars):
    V_t, start, uncond = mars.vocabulary.text, *map(mars.vocabulary.special, ("<img>", "<uncond>"))
    missing = torch.zeros(16, dtype=torch.bool)
    missing[5] = True

    def loss_and_push(first: int) -> tuple[float, float]:
        """Of a picture after the token `first`: its loss, and the gradient on the head's row of code 5."""
        mars.zero_grad()
        loss = mars.loss(torch.tensor([[first, start, V_t + 1, V_t + 2]]), torch.tensor([[False, False, True, True]]))
        loss.backward()
        return loss.item(), mars.vision_head.weight.grad[5].abs().sum().item()
    named, dropped = loss_and_push(3), loss_and_push(uncond)
    mars.uncaptioned = missing
    assert loss_and_push(uncond) == dropped
    loss, push = loss_and_push(3)
    assert push == 0 < named[1] and loss < named[0]
    mars.margin = 100.0                                           # now all but the hopeless compete again
    assert loss_and_push(3) == named


def test_first_loss_of_an_untrained_model_is_near_ln_v():
    config = MARSConfig(width=64, heads=4, kv_heads=4, ffn_width=176, layers=2, context=128, text_vocab=500)
    language = MARS(config).initialise(torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(1024, 8, generator=generator)
    mars = MARS.from_language_model(language, codes=1024, codebook=codebook, generator=generator)
    tokens = torch.randint(500, 1524, (8, 64), generator=torch.Generator().manual_seed(0))
    loss = mars.loss(tokens, torch.ones_like(tokens).bool()).item()
    assert abs(loss - math.log(mars.vocabulary.size)) < 0.5


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
    steps = [mars(tokens[:, :4], cache), mars(tokens[:, 4:7], cache)]
    steps += [mars(tokens[:, t:t + 1], cache) for t in range(7, 15)]
    torch.testing.assert_close(torch.cat(steps, 1), mars(tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_at_either_side_changes_nothing(mars):
    tokens, pad = mixed_tokens(mars, rows=1), mars.vocabulary.special("<pad>")
    alone = mars(tokens)
    right = torch.cat((tokens, torch.full((1, 3), pad)), 1)
    torch.testing.assert_close(mars(right)[:, :15], alone, atol=1e-5, rtol=1e-5)
    cache = mars.new_cache(2, 18)
    left = torch.cat((torch.cat((torch.full((1, 3), pad), tokens), 1), torch.cat((tokens, tokens[:, :3]), 1)))
    both = torch.cat((mars(left[:, :8], cache), mars(left[:, 8:12], cache),
                      *(mars(left[:, t:t + 1], cache) for t in range(12, 18))), 1)
    torch.testing.assert_close(both[:1, 3:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(both[1:, :15], alone, atol=1e-5, rtol=1e-5)


def test_a_sequence_longer_than_the_context_is_refused(mars):
    with pytest.raises(ValueError, match="65 tokens, but the model's context is 64"):
        mars(torch.zeros((1, 65), dtype=torch.long))


# ----------------------------------------------------------------------------- files

def test_saved_and_loaded_again_is_the_same_model(mars, tmp_path):
    mars.save_pretrained(tmp_path)
    again = MARS.from_pretrained(tmp_path)
    tokens = mixed_tokens(mars)
    assert again.config == mars.config and torch.equal(again(tokens), mars(tokens))


def test_swiglu_is_down_of_silu_gate_times_up():
    ffn, x = SwiGLU(8, 12), torch.randn(5, 8)
    gate, up, down = ffn.gate.weight, ffn.up.weight, ffn.down.weight
    torch.testing.assert_close(ffn(x), (x @ gate.T * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)


@pytest.mark.parametrize("change, message", [
    ({"heads": 5}, "width is 32, expected a multiple of twice the 5 heads"),
    ({"kv_heads": 3}, "heads is 4, expected a multiple of the 3 kv_heads"),
    ({"layers": "two"}, "field 'layers' is 'two', expected int"),
    ({"depth": 2}, "unknown field 'depth'"),
    ({"codes": 24}, "vision_head.weight is (22, 32), expected (30, 32)"),
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
