"""MARS on one page (arXiv 2407.07614): a frozen language model with a trainable visual expert in every block.

For reading. It loads the weights of mars.py and computes the same logits (tests/test_mini_mars.py); mars.py is fast.

Shapes: B batch, T tokens, D width, H heads, d = D / H, V_t text vocabulary, V_v visual vocabulary.
"""
import torch
import torch.nn.functional as F
from torch import nn


def route(x, is_visual, text_expert, visual_expert):
    """The router of Eq. 3 and 4: each token goes to the expert of its modality. x (B, T, D), is_visual (B, T)."""
    return torch.where(is_visual[..., None], visual_expert(x), text_expert(x))


def rope(x, base=10000.0):
    """Rotary position embedding of q or k (B, H, T, d)."""
    T, d = x.shape[-2:]
    frequencies = base ** (-torch.arange(0, d, 2).float() / d)                          # (d/2,)
    angles = (torch.arange(T).float()[:, None] * frequencies).repeat(1, 2)              # (T, d)
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class SwiGLU(nn.Module):
    """The FFN of Qwen: W_down(silu(W_gate x) * W_up x)."""

    def __init__(self, D, hidden):
        super().__init__()
        self.gate_up, self.down = nn.Linear(D, 2 * hidden, bias=False), nn.Linear(hidden, D, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Attention(nn.Module):
    """Eq. 3: QKV per modality, one causal attention over all tokens, one W_O."""

    def __init__(self, D, H):
        super().__init__()
        self.H = H
        self.qkv, self.visual_qkv = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D)            # frozen; trained
        self.out = nn.Linear(D, D, bias=False)                                          # W_O: shared, frozen

    def forward(self, x, is_visual):
        B, T, D = x.shape
        q, k, v = route(x, is_visual, self.qkv, self.visual_qkv).chunk(3, dim=-1)       # each (B, T, D)
        q, k, v = (y.view(B, T, self.H, -1).transpose(1, 2) for y in (q, k, v))         # each (B, H, T, d)
        y = F.scaled_dot_product_attention(rope(q), rope(k), v, is_causal=True)         # (B, H, T, d)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class SemVIEBlock(nn.Module):
    """Fig. 3, right: a block of Qwen in which QKV and FFN exist twice."""

    def __init__(self, D, H, hidden):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(D, eps=1e-6), nn.RMSNorm(D, eps=1e-6)     # shared, frozen
        self.attention = Attention(D, H)
        self.ffn, self.visual_ffn = SwiGLU(D, hidden), SwiGLU(D, hidden)                # frozen; trained

    def forward(self, x, is_visual):
        x = x + self.attention(self.norm_1(x), is_visual)                               # Eq. 3
        return x + route(self.norm_2(x), is_visual, self.ffn, self.visual_ffn)          # Eq. 4


class MiniMARS(nn.Module):
    """Fig. 3, left: two embeddings, L blocks, two heads, one softmax."""

    def __init__(self, D, H, hidden, layers, V_t, V_v):
        super().__init__()
        self.V_t = V_t
        self.text_embedding, self.visual_embedding = nn.Embedding(V_t, D), nn.Embedding(V_v, D)
        self.blocks = nn.ModuleList(SemVIEBlock(D, H, hidden) for _ in range(layers))
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.text_head, self.vision_head = nn.Linear(D, V_t, bias=False), nn.Linear(D, V_v, bias=False)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, T, V_t + V_v): text ids come first, then the visual ones."""
        is_visual = tokens >= self.V_t
        x = torch.where(is_visual[..., None], self.visual_embedding((tokens - self.V_t).clamp(min=0)),
                        self.text_embedding(tokens.clamp(max=self.V_t - 1)))            # (B, T, D)
        for block in self.blocks:
            x = block(x, is_visual)
        x = self.norm(x)
        return torch.cat([self.text_head(x), self.vision_head(x)], dim=-1)

    def loss(self, tokens, is_target):
        """Eq. 1: the mean of -log p(z_{t+1} | z_{<=t}) over the targets. tokens, is_target (B, T)."""
        logits, asked = self(tokens)[:, :-1], is_target[:, 1:]
        return F.cross_entropy(logits[asked], tokens[:, 1:][asked])

    def freeze_language(self):
        """Sec. 3.2: what is called visual_... and the vision head train, the language model does not."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("visual_" in name or name.startswith("vision_head"))


@torch.no_grad()
def generate(model, prompt, unconditional, n, entries, guidance=1.0, temperature=1.0):
    """Eq. 1 as a sampler, with guidance: n image tokens after a prompt (ids); `entries`: the size of the codebook."""
    a, b = list(prompt), list(unconditional)
    for _ in range(n):
        with_caption, without = (model(torch.tensor([ids]))[0, -1] for ids in (a, b))
        logits = (without + guidance * (with_caption - without))[model.V_t:model.V_t + entries]
        token = int(torch.multinomial((logits / temperature).softmax(-1), 1))
        for ids in (a, b):
            ids.append(model.V_t + token)
    return [id - model.V_t for id in a[-n:]]
