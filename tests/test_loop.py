"""The loop over two frozen towers, proved with a stub of every tuning method on pairs of tiny random towers."""
import warnings
from copy import deepcopy
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from open_clip.transformer import QuickGELU, TextTransformer
from open_clip.transformer import VisionTransformer as ClipVision
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer as TimmVision
from torch import nn
from torch.nn.utils import parametrize

from barleria_nb.backbones import (Attention, Context, DualEncoder, Encoded, Guests, TextTower, Tuner, build_encoder,
                                   build_tiny_clip, clip_encoder, dino_encoder, load_tiny_clip, save_tiny_clip, text_mask,
                                   tiny_clip, visual_tower)
from common import line

SIZE, PATCH, GRID, C, T, J, L = (24, 40), 8, (3, 5), 32, 24, 20, 12
KINDS = dict(clip=1, bare=0, dino=5, eva=1)  # prefix tokens
PAIRS = [("clip", 12, 12), ("clip", 24, 12), ("dino", 12, 12), ("dino", 24, 12), ("bare", 12, 12), ("eva", 12, 12), ("eva", 24, 12)]


# ---------------------------------------------------------------------------------------------------------------- towers
def randomise(module, seed=0):
    "Every parameter random and of a size that matters, LayerScale far from 1; float64."
    g = torch.Generator().manual_seed(seed)
    module = module.double()
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g, dtype=p.dtype)
        norm_weight = p.dim() == 1 and name.endswith("weight") or "gamma" in name
        p.data = (.6 if "gamma" in name else 1) + .2 * noise if norm_weight else noise * (p.shape[-1] ** -.5 if p.dim() > 1 else .2)
    return module


def library_visual(kind, depth):
    if kind == "clip":
        return ClipVision(SIZE, PATCH, C, depth, 4, 2., ls_init_value=.5, output_dim=J, act_layer=QuickGELU)
    if kind == "eva":
        return Eva(img_size=SIZE, patch_size=PATCH, embed_dim=C, depth=depth, num_heads=4, qkv_fused=False, mlp_ratio=2., swiglu_mlp=True,
                   scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True, ref_feat_shape=(16, 16), num_classes=J, global_pool="token",
                   init_values=.5)
    cls = kind == "dino"
    return TimmVision(img_size=SIZE, patch_size=PATCH, embed_dim=C, depth=depth, num_heads=4, mlp_ratio=2., init_values=.5, class_token=cls,
                      reg_tokens=4 if cls else 0, no_embed_class=cls, num_classes=0, global_pool="token" if cls else "", fc_norm=False)


def library_text(depth):
    return TextTransformer(L, 100, T, 3, depth, 2., output_dim=J, act_layer=QuickGELU)


@lru_cache
def libraries(pair):
    kind, deep, texts = pair
    return randomise(library_visual(kind, deep), 1).eval(), randomise(library_text(texts), 2).eval()


def encoder(pair, *tuners):
    visual, text = libraries(pair)
    if any(t.changes_weights for t in tuners if hasattr(t, "changes_weights")): visual, text = deepcopy((visual, text))
    return DualEncoder(visual_tower(visual), TextTower(text), tuners).double()


def batch(lengths=(5, 3, 9), length=L, seed=3):
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(len(lengths), 3, *SIZE, generator=g, dtype=torch.float64)
    ids = torch.randint(1, 97, (len(lengths), L), generator=g)
    words = torch.arange(L)[None] < torch.tensor(lengths)[:, None]
    ids[torch.arange(len(lengths)), words.sum(1) - 1] = 99  # the end token: the largest id
    return image, (ids * words)[:, :length], words[:, :length]


def flat(out):
    return dict(zip([f"tap{i}" for i in range(3)] + [f"side{i}" for i in range(4)] + ["patches", "words", "sentence", "pooled"],
                    [*out.taps, *out.side, out.patches, out.words, out.sentence, out.pooled]))


def gap(a, b, mask=None):
    a, b = flat(a), flat(b)
    if mask is not None: a["words"], b["words"] = a["words"][mask], b["words"][mask]
    assert a.keys() == b.keys() and all(a[k].shape == b[k].shape for k in a)
    return max((a[k] - b[k]).abs().max().item() for k in a)


def take(out, b, length):
    "Row b of an encoding, its words cut to their own length."
    return Encoded([x[b:b + 1] for x in out.taps], [x[b:b + 1] for x in out.side], out.patches[b:b + 1], out.words[b:b + 1, :length],
                   out.sentence[b:b + 1], out.pooled[b:b + 1], out.grid, out.mask[b:b + 1, :length])


# ----------------------------------------------------------------------------------------------------------------- stubs
def key(tower, i, part): return f"{tower}_{i}_{part}"


class SNF(Tuner):
    "Affine map and one planar step on both shortcuts."
    def attach(self, encoder):
        size = lambda n: nn.ParameterDict({k: nn.Parameter(torch.randn(n) * .1) for k in ("mu", "s", "u", "w", "b")})
        self.flows = nn.ModuleDict({key(t, i, p): size(getattr(encoder, t).width) for t in ("visual", "text")
                                    for i in range(getattr(encoder, t).depth) for p in ("attn", "mlp")})

    def shortcut(self, tower, i, part, x, ctx):
        f = self.flows[key(tower, i, part)]
        z = f["mu"] + f["s"].exp() * x
        return z + f["u"] * torch.tanh((z * f["w"] + f["b"]).sum(-1, keepdim=True))

    def identity(self):
        for f in self.flows.values():
            for k in ("mu", "s", "u"): nn.init.zeros_(f[k])


class Intertwine(Tuner):
    "Words into every image attention, the first image token (or the mean patch) into every text attention."
    def __init__(self, words_visible=True): super().__init__(); self.visible = words_visible

    def attach(self, encoder):
        v, t = encoder.visual.width, encoder.text.width
        self.down = nn.Sequential(nn.Linear(t, 6), nn.ReLU(), nn.Linear(6, v))
        self.up = nn.Sequential(nn.Linear(v, 6), nn.ReLU(), nn.Linear(6, t))

    def guests(self, i, v, t, ctx):
        image = v[:, :1] if ctx.prefix else v.mean(1, keepdim=True)
        mask = None if self.visible else torch.zeros(len(v), 1, dtype=torch.bool)
        return Guests(self.down(t), ctx.words & self.visible, self.up(image), mask)

    def identity(self): self.visible = False


class Bridger(Tuner):
    "Patches and words exchange after three stages; padding is masked as keys."
    def attach(self, encoder):
        n, v, t = min(encoder.visual.depth, encoder.text.depth), encoder.visual.width, encoder.text.width
        self.stages = {n * k // 3 - 1: str(k) for k in (1, 2, 3)}
        linear = lambda a, b: nn.ModuleDict({k: nn.Linear(a, b) for k in self.stages.values()})
        self.v_in, self.t_in, self.v_out, self.t_out = linear(v, 8), linear(t, 8), linear(8, v), linear(8, t)
        self.norm = nn.ModuleDict({k: nn.BatchNorm2d(v) for k in self.stages.values()})

    def after(self, i, v, t, ctx):
        if i not in self.stages: return v, t
        k, p = self.stages[i], ctx.prefix
        a, b = self.v_in[k](v[:, p:]), self.t_in[k](t)
        to_words = F.scaled_dot_product_attention(a, b, b, attn_mask=ctx.words[:, None])
        to_patches = F.scaled_dot_product_attention(b, a, a)
        grid = rearrange(self.v_out[k](a * to_words), "b (h w) c -> b c h w", h=ctx.grid[0])
        new = v[:, p:] + rearrange(self.norm[k](grid).relu(), "b c h w -> b (h w) c")
        return torch.cat((v[:, :p], new), 1), t + self.t_out[k](b * to_patches)

    def identity(self):
        for k in self.stages.values():
            for p in (*self.norm[k].parameters(), *self.t_out[k].parameters()): nn.init.zeros_(p)


class DenseCross(Tuner):
    "A convolution on the grid asks, the finished words answer, beside the image MLP."
    needs_text = True

    def __init__(self, at=(1, 5)): super().__init__(); self.at = at

    def attach(self, encoder):
        v, t = encoder.visual.width, encoder.text.width
        make = lambda f: nn.ModuleDict({str(i): f() for i in self.at})
        self.down, self.conv = make(lambda: nn.Linear(v, 8)), make(lambda: nn.Conv2d(8, 8, 3, padding=1))
        self.norm, self.words, self.up = make(lambda: nn.BatchNorm2d(8)), make(lambda: nn.Linear(t, 8)), make(lambda: nn.Linear(8, v))

    def branch(self, tower, i, part, x, z, y, ctx):
        if tower != "visual" or part != "mlp" or i not in self.at: return y
        k, p = str(i), ctx.prefix
        f = self.down[k](z).relu()
        q = self.norm[k](self.conv[k](rearrange(f[:, p:], "b (h w) c -> b c h w", h=ctx.grid[0])))
        w = self.words[k](ctx.text)
        a = F.scaled_dot_product_attention(rearrange(q, "b c h w -> b (h w) c"), w, w, attn_mask=ctx.words[:, None])
        return y + .2 * self.up[k](torch.cat((2 * f[:, :p], a + f[:, p:]), 1))

    def identity(self):
        for m in self.up.values(): nn.init.zeros_(m.weight), nn.init.zeros_(m.bias)


class TextAdapter(Tuner):
    "In parallel to the text MLP, reading the residual stream."
    def __init__(self, at=(1, 5)): super().__init__(); self.at = at

    def attach(self, encoder):
        t = encoder.text.width
        self.parts = nn.ModuleDict({str(i): nn.Sequential(nn.Linear(t, 8), nn.ReLU(), nn.Linear(8, t)) for i in self.at})

    def branch(self, tower, i, part, x, z, y, ctx):
        return y + .2 * self.parts[str(i)](x) if tower == "text" and part == "mlp" and i in self.at else y

    def identity(self):
        for m in self.parts.values(): nn.init.zeros_(m[2].weight), nn.init.zeros_(m[2].bias)


class Houlsby(Tuner):
    "A bottleneck with its own skip, in series behind attention and MLP of both towers."
    def attach(self, encoder):
        make = lambda n: nn.Sequential(nn.Linear(n, 8), nn.ReLU(), nn.Linear(8, n))
        self.parts = nn.ModuleDict({key(t, i, p): make(getattr(encoder, t).width) for t in ("visual", "text")
                                    for i in range(getattr(encoder, t).depth) for p in ("attn", "mlp")})

    def branch(self, tower, i, part, x, z, y, ctx): return y + self.parts[key(tower, i, part)](y)

    def identity(self):
        for m in self.parts.values(): nn.init.zeros_(m[2].weight), nn.init.zeros_(m[2].bias)


class Compacter(Tuner):
    "The same place with Kronecker-factored maps whose small factors (the PHM rule) all blocks of both towers share."
    def attach(self, encoder):
        self.rule = nn.Parameter(torch.randn(4, 4, 4) * .3)
        width = lambda name: getattr(encoder, name.split("_")[0]).width
        names = [key(t, i, p) for t in ("visual", "text") for i in range(getattr(encoder, t).depth) for p in ("attn", "mlp")]
        self.down = nn.ParameterDict({n: nn.Parameter(torch.randn(4, width(n) // 4, 2) * .3) for n in names})
        self.up = nn.ParameterDict({n: nn.Parameter(torch.randn(4, 2, width(n) // 4) * .3) for n in names})
        self.bias = nn.ParameterDict({n: nn.Parameter(torch.randn(width(n)) * .1) for n in names})

    def branch(self, tower, i, part, x, z, y, ctx):
        n = key(tower, i, part)
        full = lambda factor: sum(torch.kron(a, b) for a, b in zip(self.rule, factor))
        return y + (y @ full(self.down[n])).relu() @ full(self.up[n]) + self.bias[n]

    def identity(self):
        for n in self.up: nn.init.zeros_(self.up[n]), nn.init.zeros_(self.bias[n])


class Rows(nn.Module):
    "Low-rank addition to some rows of a weight."
    def __init__(self, weight, rows, rank=2):
        super().__init__()
        n = weight[rows].shape[0]
        self.rows, self.a, self.b = rows, nn.Parameter(torch.randn(rank, weight.shape[1]) * .3), nn.Parameter(torch.randn(n, rank) * .3)

    def forward(self, w):
        new = w[self.rows] + self.b @ self.a
        start, stop, _ = self.rows.indices(len(w))
        return torch.cat((w[:start], new, w[stop:]))


class LoRA(Tuner):
    "On q, k, v and o of the image tower and on q, v of the text tower."
    changes_weights = True

    def attach(self, encoder):
        parts = {}
        for tower, names in (("visual", "qkvo"), ("text", "qv")):
            for i, block in enumerate(getattr(encoder, tower).blocks):
                for name in names:
                    module, attr, rows = block.attn.weight(name)
                    parts[f"{tower}_{i}_{name}"] = Rows(getattr(module, attr), rows).to(getattr(module, attr))
                    parametrize.register_parametrization(module, attr, parts[f"{tower}_{i}_{name}"])
        self.parts = nn.ModuleDict(parts)

    def identity(self):
        for m in self.parts.values(): nn.init.zeros_(m.b)


class Full(Tuner):
    "All weights of both towers except the text position table."
    changes_weights = True

    def attach(self, encoder):
        encoder.visual.requires_grad_(True), encoder.text.requires_grad_(True)
        encoder.text.positions.requires_grad_(False)

    def identity(self): pass


class GST(nn.Module):
    "Outside the towers: fed by detached side taps and patches, and by the words, which stay attached."
    def __init__(self):
        super().__init__()
        self.image, self.word = nn.Linear(C, 8), nn.Linear(T, 8)
        self.fuse = nn.ModuleList(nn.Linear(C, 8) for _ in range(4))

    def forward(self, out):
        x = self.image(out.patches.detach())
        w = self.word(out.words)
        for level, fuse in zip(out.side, self.fuse):
            x = F.scaled_dot_product_attention(x + fuse(level.detach()), w, w, attn_mask=out.mask[:, None]) + x
        return rearrange(x, "b (h w) c -> b c h w", h=out.grid[0])


METHODS = dict(snf=(SNF,), intertwine=(Intertwine,), bridger=(Bridger,), densecross=(DenseCross,), textadapter=(TextAdapter,),
               adapter=(Houlsby,), compacter=(Compacter,), lora=(LoRA,), full=(Full,), barleria=(Intertwine, SNF), dcris=(DenseCross, TextAdapter))
matrix = pytest.mark.parametrize("pair", PAIRS, ids=lambda p: "-".join(map(str, p)))
some = pytest.mark.parametrize("pair", [PAIRS[k] for k in (1, 2, 4, 6)], ids=lambda p: "-".join(map(str, p)))
methods = pytest.mark.parametrize("method", METHODS)


def tuned(pair, method, seed=0):
    torch.manual_seed(seed)
    return encoder(pair, *(m() for m in METHODS[method]))


# ------------------------------------------------------------------------------------------------------------- untuned
@matrix
def test_untuned_equals_the_library(pair, monkeypatch):
    visual, text = libraries(pair)
    image, ids, _ = batch()
    everything = torch.ones_like(ids, dtype=torch.bool)
    ids[ids == 99] = 1
    ids[:, -1] = 99
    with torch.no_grad():
        if pair[0] == "clip":
            features = visual.forward_intermediates(image, output_fmt="NLC")
            raw, pooled = features["image_intermediates"], visual(image)
        else:
            final, raw = visual.forward_intermediates(image, output_fmt="NLC")
            pooled = visual(image) if pair[0] != "bare" else final.mean(1)
        expected = text.forward_intermediates(ids, normalize_intermediates=True, output_fmt="NLC")
        monkeypatch.setattr(nn.MultiheadAttention, "forward", lambda *a, **k: pytest.fail("the library's attention was called"))
        enc = encoder(pair).eval()
        out = enc(image, ids, everything)
    n = pair[1]
    side = [raw[k] for k in (n // 4 - 1, n // 2 - 1, n * 3 // 4 - 1, n - 1)]
    assert max((a - b).abs().max() for a, b in zip(out.side, side)) < 1e-11
    taps = [rearrange(raw[k], "b (h w) c -> b c h w", h=GRID[0]) for k in (n // 3 - 1, n * 2 // 3 - 1)]
    assert max((a - b).abs().max() for a, b in zip(out.taps, taps)) < 1e-11
    assert out.taps[2].shape == (3, enc.dims[2], *GRID) and (out.pooled - pooled).abs().max() < 1e-11
    assert (out.words - expected["text_intermediates"][-1]).abs().max() < 1e-11
    assert (out.sentence - expected["text_features"]).abs().max() < 1e-11


@matrix
def test_last_tap_is_normed_and_projected(pair):
    enc = encoder(pair).eval()
    with torch.no_grad():
        out = enc(*batch())
        normed = enc.visual.norm(out.side[3])
        expected = {"clip": lambda: normed @ enc.visual.projection, "eva": lambda: enc.visual.projection(normed)}.get(pair[0], lambda: normed)()
    assert (rearrange(out.taps[2], "b c h w -> b (h w) c") - expected).abs().max() < 1e-12


# -------------------------------------------------------------------------------------------------------- method matrix
@some
@methods
def test_identity_equals_frozen(pair, method):
    enc, frozen = tuned(pair, method).eval(), encoder(pair).eval()
    with torch.no_grad():
        before = gap(enc(*batch()), frozen(*batch()))
        for tuner in enc.tuners: tuner.identity()
        after = gap(enc(*batch()), frozen(*batch()))
    assert after < 1e-11 and (before > 1e-3 or method == "full")


@some
@methods
def test_neither_batch_mates_nor_padding_matter(pair, method):
    enc, lengths = tuned(pair, method).eval(), (5, 9)
    with torch.no_grad():
        image, ids, words = batch(lengths)
        together = enc(image, ids, words)
        for b, n in enumerate(lengths):
            for length in (n, n + 2) if b else (n, L):
                alone = enc(image[b:b + 1], ids[b:b + 1, :length], words[b:b + 1, :length])
                assert gap(take(together, b, n), take(alone, 0, n)) < 1e-10
        noise = torch.where(words, ids, torch.randint_like(ids, 1, 97))
        assert gap(together, enc(image, noise, words), words) < 1e-10


@some
@methods
def test_gradients_reach_exactly_the_tuner(pair, method):
    enc = tuned(pair, method)
    out = flat(enc(*batch()))
    parts = ("tap0", "tap1", "tap2", "side3", "words", "sentence", "pooled")
    sum((out[k] * torch.linspace(-1, 1, out[k].numel()).view(out[k].shape).double()).sum() for k in parts).backward()
    mine = {id(p) for p in enc.tuners.parameters()}
    if method == "full": mine = {id(p) for n, p in enc.named_parameters() if n != "text.positions"}
    for name, p in enc.named_parameters():
        assert p.requires_grad == (id(p) in mine), name
        if p.requires_grad: assert p.grad is not None and p.grad.abs().max() > 0, f"{name} gets no gradient"
        else: assert p.grad is None, f"{name} is frozen but got a gradient"


@matrix
def test_the_global_network_reads_side_and_words(pair):
    torch.manual_seed(0)
    enc, gst = tuned(pair, "barleria"), GST().double()
    out = enc(*batch())
    y = gst(out)
    assert y.shape == (3, 8, *GRID)
    y.square().sum().backward()
    flows = enc.tuners[1].flows
    assert flows[key("text", 0, "attn")]["mu"].grad.abs().max() > 0
    last = flows[key("visual", pair[1] - 1, "mlp")]["mu"].grad
    assert last is None or last.abs().max() == 0  # after the last block nothing but the detached taps follows


# ---------------------------------------------------------------------------------------------------------------- guests
def by_hand(block, x, guests, visible, causal=None):
    "A block over [first token, guests, the rest] as one sequence, by explicit softmax; guests are dropped at the end."
    p = min(1, x.shape[1])
    s = torch.cat((x[:, :p], guests, x[:, p:]), 1)
    keys = torch.cat((torch.ones(len(x), p, dtype=torch.bool), visible, torch.ones(len(x), x.shape[1] - p, dtype=torch.bool)), 1)
    z = block.norm1(s)
    q, k, v = (rearrange(m, "b n (h d) -> b h n d", h=block.attn.heads) for m in block.attn.qkv(z))
    scores = (q @ k.mT * q.shape[-1] ** -.5).masked_fill(~keys[:, None, None], -torch.inf)
    y = rearrange(scores.softmax(-1) @ v, "b h n d -> b n (h d)")
    s = s + block.scale1(block.attn.out(y))
    s = s + block.scale2(block.mlp(block.norm2(s)))
    return torch.cat((s[:, :p], s[:, p + guests.shape[1]:]), 1)


@pytest.mark.parametrize("pair", [p for p in PAIRS if p[0] in ("clip", "dino")], ids=lambda p: "-".join(map(str, p)))
def test_guests_between_class_token_and_patches(pair):
    "The paper's order [cls, T', patches] gives what guests behind the patches give."
    enc = tuned(pair, "intertwine").eval()
    image, ids, words = batch()
    with torch.no_grad():
        out = enc(image, ids, words)
        v, t, kept = enc.visual.embed(image), enc.text.embed(ids), []
        ctx, per = Context(GRID, enc.visual.prefix, words), pair[1] // pair[2]
        for i in range(pair[2]):
            g = enc.tuners[0].guests(i, v, t, ctx)
            for j in range(per):
                v = by_hand(enc.visual.blocks[i * per + j], v, g.visual, g.visual_mask)
                kept.append(v)
            block = enc.text.blocks[i]
            z = block.norm1(torch.cat((t, g.text), 1))
            q, k, u = (rearrange(m, "b n (h d) -> b h n d", h=3) for m in block.attn.qkv(z))
            scores = (q[:, :, :L] @ k.mT * 8 ** -.5).masked_fill(~F.pad(text_mask(words), (0, 1), value=True), -torch.inf)
            t = t + block.scale1(block.attn.out(rearrange(scores.softmax(-1) @ u, "b h n d -> b n (h d)")))
            t = t + block.scale2(block.mlp(block.norm2(t)))
    n, p = pair[1], enc.visual.prefix
    for got, k in zip(out.side, (n // 4, n // 2, n * 3 // 4, n)): assert (got - kept[k - 1][:, p:]).abs().max() < 1e-10
    assert (out.words - enc.text.norm(t)).abs().max() < 1e-10


def test_rotary_tower_leaves_guests_unturned():
    "EVA itself, run on [cls, guests, patches] with its prefix counter raised by the guests, agrees."
    pair = ("eva", 12, 12)
    library, _ = deepcopy(libraries(pair))
    image, ids, words = batch((L, L, L))
    with torch.no_grad():
        got = []

        class Stop(Tuner):
            def after(self, i, v, t, ctx): got.append(v); return v, t
        enc = encoder(pair, Intertwine(), Stop()).eval()
        enc(image, ids, words)
        v, t = enc.visual.embed(image), enc.text.embed(ids)
        g = enc.tuners[0].guests(0, v, t, Context(GRID, 1, words))
        block = library.blocks[0]
        block.attn.num_prefix_tokens = 1 + L
        s = block(torch.cat((v[:, :1], g.visual, v[:, 1:]), 1), rope=library.rope.get_embed())
    assert (torch.cat((s[:, :1], s[:, 1 + L:]), 1) - got[0]).abs().max() < 1e-11


class Fixed(Tuner):
    "Guests that never change."
    def __init__(self, visual, text, mask=None): super().__init__(); self.v, self.t, self.mask = visual, text, mask
    def guests(self, i, v, t, ctx): return Guests(self.v, self.mask, self.t, self.mask)


@matrix
def test_guests_of_several_tuners_are_concatenated(pair):
    torch.manual_seed(0)
    v, t, mask = torch.randn(3, 4, C).double(), torch.randn(3, 4, T).double(), torch.tensor([[1, 0, 1, 1]] * 3).bool()
    class Nothing(Tuner):
        def guests(self, i, v, t, ctx): return None
    class Visual(Tuner):
        def guests(self, i, x, y, ctx): return Guests(visual=v[:, :2])
    with torch.no_grad():
        one = encoder(pair, Fixed(torch.cat((v, v[:, :2]), 1), t, F.pad(mask, (0, 2), value=True))).eval()
        one.tuners[0].guests = lambda i, x, y, ctx: Guests(torch.cat((v, v[:, :2]), 1), F.pad(mask, (0, 2), value=True), t, mask)
        many = encoder(pair, Fixed(v, t, mask), Nothing(), Visual()).eval()
        assert gap(one(*batch()), many(*batch())) < 1e-11
        both = encoder(pair, Fixed(v, t), Visual()).eval()  # no masks at all
        full = encoder(pair, Fixed(torch.cat((v, v[:, :2]), 1), None, torch.ones(3, 6).bool()), Fixed(None, t)).eval()
        assert gap(both(*batch()), full(*batch())) < 1e-11


# ----------------------------------------------------------------------------------------------------------------- hooks
class Log(Tuner):
    def __init__(self, name, log): super().__init__(); self.name, self.log = name, log
    def guests(self, i, v, t, ctx):
        self.log.append((self.name, "guests", i, v.clone(), t.clone()))
        return Guests(v[:, :2] * 0 + 1, None, t[:, :1] * 0 + 1)
    def shortcut(self, tower, i, part, x, ctx): self.log.append((self.name, "shortcut", tower, i, part, x.clone())); return 2 * x
    def branch(self, tower, i, part, x, z, y, ctx):
        self.log.append((self.name, "branch", tower, i, part, x.clone(), z.clone(), y.clone()))
        return y + 1
    def after(self, i, v, t, ctx): self.log.append((self.name, "after", i, v.clone(), t.clone())); return v + 1, t - 1


@pytest.mark.parametrize("pair", [("dino", 4, 4), ("clip", 8, 4), ("eva", 3, 6)], ids=lambda p: "-".join(map(str, p)))
def test_hooks_are_called_in_order_with_their_own_arguments(pair):
    log = []
    enc = encoder(pair, Log("a", log), Log("b", log)).eval()
    with torch.no_grad(): out = enc(*batch())
    n, p = min(pair[1:]), enc.visual.prefix
    per = {"visual": pair[1] // n, "text": pair[2] // n}
    expected = []
    for i in range(n):
        expected += [(a, "guests", i) for a in "ab"]
        for tower in ("visual", "text"):
            for j in range(i * per[tower], (i + 1) * per[tower]):
                for part in ("attn", "mlp"): expected += [(a, hook, tower, j, part) for hook in ("branch", "shortcut") for a in "ab"]
        expected += [(a, "after", i) for a in "ab"]
    assert [tuple(e for e in entry if not torch.is_tensor(e)) for entry in log] == expected
    find = lambda *k: next(e for e in log if e[:len(k)] == k)
    tokens = p + GRID[0] * GRID[1]
    for tower, count, deep in (("visual", tokens, pair[1]), ("text", L, pair[2])):
        for j in range(deep):
            block = getattr(enc, tower).blocks[j]
            for part, norm, scale in (("attn", block.norm1, block.scale1), ("mlp", block.norm2, block.scale2)):
                a, b = find("a", "branch", tower, j, part), find("b", "branch", tower, j, part)
                x, z, y = a[5:]
                assert x.shape[1] == z.shape[1] == y.shape[1] == count, "guests must be gone"
                assert torch.equal(z, norm(x)) and torch.equal(b[5], x) and torch.equal(b[6], z) and torch.equal(b[7], y + 1)
                if part == "mlp": assert torch.equal(y, block.mlp(z))
                sa, sb = find("a", "shortcut", tower, j, part)[5], find("b", "shortcut", tower, j, part)[5]
                assert torch.equal(sa, x) and torch.equal(sb, 2 * x)
                result = 2 * (2 * x) + scale(y + 1 + 1)
                if part == "attn": assert torch.equal(find("a", "branch", tower, j, "mlp")[5], result)
        last = find("a", "after", n - 1)[3 if tower == "visual" else 4]
        assert torch.equal(last, result)
    for i in range(1, n):  # both streams of step i - 1, after `after`
        done = find("b", "after", i - 1)
        for who in "ab":
            assert torch.equal(find(who, "guests", i)[3], done[3] + 1) and torch.equal(find(who, "guests", i)[4], done[4] - 1)
    assert torch.equal(out.side[3], find("b", "after", n - 1)[3][:, p:] + 1), "taps are read after `after`"
    assert torch.equal(out.words, enc.text.norm(find("b", "after", n - 1)[4] - 1))


def test_taps_read_what_after_returns():
    class Mark(Tuner):
        def after(self, i, v, t, ctx): return torch.full_like(v, i), t
    for deep in (12, 24):
        with torch.no_grad(): out = encoder(("clip", deep, 12), Mark())(*batch())
        assert [x.unique().tolist() for x in out.side] == [[2], [5], [8], [11]]
        assert [x.unique().tolist() for x in out.taps[:2]] == [[3], [7]]


def test_the_same_guests_enter_both_blocks_of_a_step():
    seen = []
    enc = encoder(("clip", 24, 12), Intertwine()).eval()
    for block in enc.visual.blocks: block.attn.register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    with torch.no_grad(): enc(*batch())
    norms = [b.norm1 for b in enc.visual.blocks]
    plain = [(g - n.bias) / n.weight for g, n in zip(seen, norms)]
    assert all(torch.allclose(plain[k], plain[k + 1]) for k in range(0, 24, 2)) and not torch.allclose(plain[1], plain[2])


@pytest.mark.parametrize("depths", [(12, 12), (5, 3), (3, 7)])
def test_text_first(depths):
    order = []
    class Spy(Tuner):
        needs_text = True
        def branch(self, tower, i, part, x, z, y, ctx): order.append((tower, i, ctx.text is None)); return y
    enc = encoder(("dino", *depths), Spy()).eval()
    with torch.no_grad(): out = enc(*batch())
    assert order == [("text", i, True) for i in range(depths[1]) for _ in "am"] + [("visual", i, False) for i in range(depths[0]) for _ in "am"]
    class Read(Tuner):
        needs_text = True
        def branch(self, tower, i, part, x, z, y, ctx):
            if ctx.text is not None: assert torch.equal(ctx.text, out.words)
            return y
    with torch.no_grad(): assert gap(encoder(("dino", *depths), Read()).eval()(*batch()), out) == 0


def test_text_is_none_in_lock_step():
    class Spy(Tuner):
        def branch(self, tower, i, part, x, z, y, ctx): assert ctx.text is None and ctx.grid == GRID and ctx.prefix == 5; return y
    with torch.no_grad(): encoder(("dino", 4, 4), Spy())(*batch())


# -------------------------------------------------------------------------------------------------------------- refusals
def test_refusals():
    line(lambda: encoder(("clip", 5, 3)), "5", "3")
    line(lambda: encoder(("clip", 12, 12), DenseCross(), Intertwine()), "DenseCross", "Intertwine")
    line(lambda: encoder(("clip", 12, 12), Bridger(), DenseCross()), "DenseCross", "Bridger")
    image, ids, words = batch()
    enc = encoder(("clip", 2, 2))
    line(lambda: enc(image[..., :32], ids, words), "(3, 24, 40)")
    line(lambda: enc(image, torch.zeros(3, L + 1).long(), torch.ones(3, L + 1).bool()), str(L))
    line(lambda: Attention(nn.Linear(2, 2)), "Linear")
    line(lambda: visual_tower(nn.Linear(2, 2)), "Linear")
    line(lambda: Attention(nn.MultiheadAttention(12, 3, batch_first=True, add_zero_attn=True)), "MultiheadAttention")
    line(lambda: visual_tower(TimmVision(16, 4, embed_dim=12, depth=1, num_heads=2, num_classes=0, class_token=False, reg_tokens=2, no_embed_class=True, global_pool="avg")), "not supported") # a register is no class token
    line(lambda: build_encoder("b61"), "b16")
    line(lambda: clip_encoder("ViT-B-16"), "ViT-B-16-quickgelu")
    line(lambda: dino_encoder("vit_base_patch14"), "vit_base_patch14_reg4_dinov2")


# ------------------------------------------------------------------------------------------------------------------ text
def test_text_mask():
    words = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    mask = text_mask(words)
    assert mask.shape == (3, 1, 5, 5) and mask.dtype == torch.bool and mask.any(-1).all()
    for b, q, k in torch.cartesian_prod(*map(torch.arange, (3, 5, 5))).tolist():
        assert mask[b, 0, q, k] == (k <= q and words[b, k] or k == q)
    assert text_mask(torch.zeros(2, 4).bool()).any(-1).all()


def test_text_guests_are_seen_by_all_words_or_masked():
    torch.manual_seed(0)
    t, pair = torch.randn(3, 2, T).double(), ("clip", 2, 2)
    with torch.no_grad():
        plain, seen = encoder(pair).eval()(*batch()), encoder(pair, Fixed(None, t)).eval()(*batch())
        hidden = encoder(pair, Fixed(None, t, torch.zeros(3, 2).bool())).eval()(*batch())
        half = encoder(pair, Fixed(None, t, torch.tensor([[True, False]] * 3))).eval()(*batch())
        first = encoder(pair, Fixed(None, t[:, :1])).eval()(*batch())
    assert gap(plain, hidden) < 1e-12 and gap(half, first) < 1e-12
    assert ((plain.words - seen.words).abs().amax(-1) > 1e-6).all(), "every word, the first too, sees the guests"


def test_words_see_only_what_came_before():
    enc, (image, ids, words) = encoder(("clip", 2, 2)).eval(), batch((9, 9, 9))
    with torch.no_grad():
        a = enc(image, ids, words).words
        changed = ids.clone(); changed[:, 5] = 7
        b = enc(image, changed, words).words
    assert torch.equal(a[:, :5], b[:, :5]) and ((a - b)[:, 5:9].abs().amax(-1) > 1e-6).all()


@matrix
def test_sentence_is_the_end_tokens_row(pair):
    enc, (image, ids, words) = tuned(pair, "snf").eval(), batch((5, 3, 9))
    with torch.no_grad(): out = enc(image, ids, words)
    expected = torch.stack([out.words[b, n - 1] @ enc.text.projection for b, n in enumerate((5, 3, 9))])
    assert (out.sentence - expected).abs().max() < 1e-12 and torch.equal(out.mask, words)


# ----------------------------------------------------------------------------------------------------------------- modes
def test_frozen_towers_stay_in_eval_mode_and_tuners_follow():
    class Drop(nn.Module):
        def __init__(self): super().__init__(); self.seen = []
        def forward(self, w): self.seen.append(self.training); return w
    class Weight(Tuner):
        changes_weights = True
        def attach(self, encoder):
            self.part = Drop()
            parametrize.register_parametrization(encoder.visual.blocks[0].attn.source, "in_proj_weight", self.part)
    enc = encoder(("clip", 2, 2), Weight(), SNF())
    for mode in (True, False):
        enc.train(mode)
        assert enc.training == mode and enc.tuners[0].part.training == mode and enc.tuners[1].training == mode
        assert not any(m.training for m in [enc.visual, enc.text, enc.visual.norm, *enc.text.blocks])
    assert not any(p.requires_grad for t in (enc.visual, enc.text) for p in t.parameters())


def test_masked_attention_is_used_only_where_something_is_masked():
    seen = []
    for tuners, masked in (((), False), ((Fixed(torch.zeros(3, 1, C).double(), None),), False), ((Intertwine(),), True)):
        enc = encoder(("clip", 2, 2), *tuners)
        for block in enc.visual.blocks: block.attn.register_forward_pre_hook(lambda m, args: seen.append(args[2] is not None))
        with torch.no_grad(): enc(*batch())
        assert set(seen) == {masked}
        seen.clear()


def test_weights_are_shared_with_the_library():
    visual, text = libraries(("clip", 2, 2))
    enc = DualEncoder(visual_tower(visual), TextTower(text))
    assert not any(p.requires_grad for p in visual.parameters())
    mine, theirs = {id(p) for p in enc.parameters()}, {id(p) for m in (visual, text) for p in m.parameters()}
    assert mine == theirs
    names = list(enc.state_dict())
    assert len(names) == len({v.data_ptr() for v in enc.state_dict().values()}), "no tensor is listed twice"


@pytest.mark.parametrize("kind", KINDS)
def test_lower_precision_runs(kind):
    enc = deepcopy(encoder((kind, 4, 4), Intertwine(), SNF()))
    for dtype in (torch.float32, torch.bfloat16):
        image, ids, words = batch()
        out = enc.to(dtype)(image.to(dtype), ids, words)
        assert out.taps[2].dtype == out.words.dtype == dtype and all(x.isfinite().all() for x in out.taps)
    enc.float()
    with torch.autocast("cpu", torch.bfloat16): assert all(x.isfinite().all() for x in enc(image.float(), ids, words).taps)


# ------------------------------------------------------------------------------------------------------------- tiny-clip
IDS = [49406, 49407, 320, 736, 1746]


def test_tiny_clip_equals_open_clip():
    torch.manual_seed(0)
    model = randomise(build_tiny_clip(IDS)).eval()
    enc = DualEncoder(visual_tower(model.visual), TextTower(model)).eval()
    image, ids = torch.randn(2, 3, 64, 64).double(), torch.zeros(2, 32, dtype=torch.long)
    ids[0, :4], ids[1, :3] = torch.tensor([49406, 320, 736, 49407]), torch.tensor([49406, 999, 49407])
    words = torch.arange(32)[None] < torch.tensor([[4], [3]])
    with torch.no_grad():
        out = enc(image, ids, words)
        assert (out.pooled - model.encode_image(image)).abs().max() < 1e-11
        assert (out.sentence - model.encode_text(ids)).abs().max() < 1e-11
    assert [tuple(x.shape) for x in out.taps] == [(2, 96, 8, 8)] * 3 and enc.patch == 8 and enc.joint == 96


def test_tiny_clip_is_stored_and_checked(tmp_path):
    from safetensors.torch import load_file, save_file
    import hashlib, json
    model = build_tiny_clip(IDS)
    save_tiny_clip(model, IDS, tmp_path, {"steps": 0})
    again = load_tiny_clip(tmp_path)
    assert all(torch.equal(again.state_dict()[k], v.half().float()) for k, v in model.state_dict().items())
    weights, config = tmp_path/"model.safetensors", tmp_path/"config.json"
    good, told = weights.read_bytes(), json.loads(config.read_text())
    def stored(tensors):
        save_file(tensors, weights)
        config.write_text(json.dumps({**told, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}))
    tensors = load_file(weights)
    for bad in ({**tensors, "extra": torch.zeros(1).half()}, {k: v for k, v in tensors.items() if k != "logit_scale"},
                {**tensors, "visual.proj": torch.zeros(3, 3).half()}, {**tensors, "visual.proj": tensors["visual.proj"].float()}):
        stored(bad)
        line(lambda: load_tiny_clip(tmp_path), "model.safetensors")
    weights.write_bytes(good[:100])
    line(lambda: load_tiny_clip(tmp_path), "model.safetensors")
    weights.write_bytes(good)
    for bad in ([], {}, {**told, "ids": ["a"]}, {**told, "config": {**told["config"], "layers": 10 ** 9}}, {**told, "ids": [1, 1]}):
        config.write_text(json.dumps(bad))
        line(lambda: load_tiny_clip(tmp_path))
    weights.unlink()
    config.write_text(json.dumps(told))
    line(lambda: load_tiny_clip(tmp_path), "model.safetensors")
    line(lambda: save_tiny_clip(model, IDS + [1], tmp_path, {}), "token_embedding")


def test_tiny_clip_by_name():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enc = build_encoder("tiny", [SNF()])
    assert enc.name == "tiny" and enc.visual.depth == enc.text.depth == 6
    assert sum(p.numel() for p in tiny_clip(False).parameters() if p.requires_grad) == 0


# ------------------------------------------------------------------------------------------------------- full-size towers
def full_batch(size):
    torch.manual_seed(0)
    ids, words = torch.zeros(1, 77, dtype=torch.long), torch.arange(77)[None] < 9
    ids[:, :9] = torch.randint(300, 40000, (1, 9)).sort().values
    ids[:, 0], ids[:, 8] = 49406, 49407
    return torch.randn(1, 3, size, size), ids, words


def check_text(enc, text, image, ids, words):
    "Against the library at 77 tokens; 17 tokens give the first rows of 77."
    every = torch.ones_like(words)
    v = torch.zeros(1, 1, enc.visual.width)
    def run(ids, words):
        t = enc.text.embed(ids)
        for block in enc.text.blocks: t = block(t, text_mask(words))
        return enc.text.finish(t)
    expected = text(ids)
    assert (run(ids, every) - expected).abs().max() < 2e-5
    assert (run(ids, words)[:, :9] - expected[:, :9]).abs().max() < 2e-5
    assert (run(ids[:, :17], words[:, :17])[:, :9] - expected[:, :9]).abs().max() < 2e-5
    assert (run(ids[:, :17], every[:, :17]) - expected[:, :17]).abs().max() < 2e-5


CLIP_CASES = [("ViT-B-16-quickgelu", 416, 12, 768, 512), ("EVA02-B-16", 416, 12, 768, 512), ("ViT-L-14-quickgelu", 420, 24, 1024, 768)]


@pytest.mark.full
@pytest.mark.parametrize("name,size,depth,width,joint", CLIP_CASES, ids=[c[0] for c in CLIP_CASES])
def test_full_size_clip(name, size, depth, width, joint, monkeypatch):
    import barleria_nb.backbones as module
    made, build = [], module._clip
    monkeypatch.setattr(module, "_clip", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    enc = clip_encoder(name, size).eval()
    model, (image, ids, words) = made[0].eval(), full_batch(size)
    assert (enc.visual.depth, enc.visual.width, enc.joint, enc.text.width) == (depth, width, joint, joint)
    assert enc.visual.grid == (size // enc.patch,) * 2
    with torch.no_grad():
        out = enc(image, ids, words)
        features = model.visual.forward_intermediates(image, output_fmt="NLC", indices=[depth // 3 - 1, depth * 2 // 3 - 1, depth - 1])
        raw = features["image_intermediates"]
        for got, want in zip([*out.taps[:2], None], raw):
            if got is not None: assert (rearrange(got, "b c h w -> b (h w) c") - want).abs().max() < 2e-4 * want.abs().max()
        assert (out.side[3] - raw[2]).abs().max() < 2e-4 * raw[2].abs().max()
        assert (out.pooled - features["image_features"]).abs().max() < 2e-4 * out.pooled.abs().max()
        assert (out.sentence - model.encode_text(ids)).abs().max() < 1e-4 * out.sentence.abs().max()
        def text(ids):
            if name.startswith("EVA"): return model.text.forward_intermediates(ids, normalize_intermediates=True, output_fmt="NLC")["text_intermediates"][-1]
            return model.forward_intermediates(text=ids, text_indices=1, normalize_intermediates=True)["text_intermediates"][-1]
        check_text(enc, text, image, ids, words)


@pytest.mark.full
def test_full_size_dino(monkeypatch):
    import timm
    made = []
    build = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: made.append(build(*a, **k)) or made[-1])
    enc = dino_encoder().eval()
    model, (image, ids, words) = made[0].eval(), full_batch(448)
    assert sum(p.numel() for p in model.parameters()) == 86_317_056
    assert (enc.visual.depth, enc.visual.width, enc.visual.prefix, enc.visual.grid, enc.joint) == (12, 768, 5, (32, 32), 512)
    assert sum(p.numel() for p in enc.parameters()) - enc.text.positions.numel() == 149_705_728
    with torch.no_grad():
        for block in model.blocks: block.ls1.gamma.uniform_(.7, 1.3), block.ls2.gamma.uniform_(.7, 1.3)
        out = enc(image, ids, words)
        final, raw = model.forward_intermediates(image, indices=[3, 7, 11], output_fmt="NLC")
        for got, want in zip([rearrange(x, "b c h w -> b (h w) c") for x in out.taps[:2]] + [out.side[3]], raw):
            assert (got - want).abs().max() < 2e-4 * want.abs().max()
        assert (rearrange(out.taps[2], "b c h w -> b (h w) c") - final[:, 5:]).abs().max() < 1e-3
        assert (out.pooled - model(image)).abs().max() < 1e-3


def test_padding_as_detris_hears_it():
    "Under the causal mask alone, a padding row hears the ones before it; words hear the same as ever."
    words = torch.arange(6) < torch.tensor([6, 3])[:, None]
    plain, released = text_mask(words), text_mask(words, padding=True)
    assert torch.equal(released[1, 0], torch.ones(6, 6, dtype=torch.bool).tril()) and torch.equal(plain[0], released[0]) and torch.equal(plain[:, :, :3], released[:, :, :3])
    assert not torch.equal(plain[1], released[1]) and released.any(-1).all()
