"""DenseCross and the text adapter: the paper's counts, stored outputs of the published modules, and contracts on tiny random towers."""
import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from barleria_nb.backbones import (TINY, Context, DualEncoder, TextTower, build_tiny_clip, dino_encoder, text_mask, tiny_clip,
                                   visual_tower)
from barleria_nb.baselines import Bridger
from barleria_nb.core import BarleriaError, count
from barleria_nb.densecross import DenseBranches, DenseCross, DenseCrossAdapter, TextAdapter, WordAttention
from barleria_nb.intertwine import Intertwine
from common import close, load, weighed

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "dcris"
PAIRS = ["clip", "dino", "deep"]
SMALL = dict(down=32, inner=24, heads=4)
DROPPED = dict(SMALL, dropout=0.)
AT = (1, 3, 5)


# ---------------------------------------------------------------- tiny towers
def towers(kind, tuners=(), dtype=torch.float64, seed=0):
    "A tiny CLIP, or a DINO with registers (6 or 12 blocks, or a grid of 4 × 8) beside a tiny CLIP's text tower; LayerScale far from zero; random weights."
    torch.manual_seed(seed)
    if kind == "clip":
        encoder = tiny_clip(False, tuners)
    else:
        dino = VisionTransformer(img_size=(32, 64) if kind == "wide" else 64, patch_size=8, embed_dim=48, depth=12 if kind == "deep" else 6, num_heads=4, mlp_ratio=2.,
                                 init_values=.7, reg_tokens=4, no_embed_class=True, num_classes=0)
        for name, p in dino.named_parameters():
            if "token" in name: nn.init.normal_(p)
        encoder = DualEncoder(visual_tower(dino), TextTower(build_tiny_clip(range(40), dict(TINY, layers=6))), tuners)
    return encoder.to(dtype)


def batch(dtype=torch.float64, lengths=(3, 9, 6), length=9):
    g = torch.Generator().manual_seed(5)
    image, ids = torch.randn(len(lengths), 3, 64, 64, generator=g, dtype=torch.float64), torch.randint(2, 40, (len(lengths), length), generator=g)
    words = torch.arange(length) < torch.tensor(lengths)[:, None]
    return image.to(dtype), ids * words, words


def outputs(e): return [*e.taps, *e.side, e.words * e.mask[..., None], e.sentence, e.pooled]


def both(**changes): return [DenseCross(AT, **{**SMALL, **changes}), TextAdapter(AT, 8, zero=changes.get("zero", False))]


METHODS = {"dcris": both, "da": lambda **c: both(**c)[:1], "ta": lambda **c: both(**c)[1:]}
pairs, methods = pytest.mark.parametrize("kind", PAIRS), pytest.mark.parametrize("method", METHODS)


def same(a, b, atol=1e-10):
    for x, y in zip(outputs(a), outputs(b), strict=True): torch.testing.assert_close(x, y, rtol=0, atol=atol)


# ---------------------------------------------------------------- counts of the paper
@lru_cache
def dino(name):
    with torch.device("meta"): return dino_encoder(name)


def tuned(tuners, name="vit_base_patch14_reg4_dinov2"):
    "Numbers that each tuner adds to DINOv2 beside the text tower of CLIP B/16."
    with torch.device("meta"):
        for t in tuners: t.attach(dino(name))
    return [count(t)[1] for t in tuners]


def test_counts_by_part():
    a = DenseCrossAdapter(768, 512)
    parts = {n: count(m)[0] for n, m in [("down", a.down), ("one", a.dense.one), ("three", a.dense.three), ("five", a.dense.five),
                                         ("cross", a.cross), ("up", a.up)]}
    assert parts == dict(down=98_432, one=8_384, three=3_960, five=8_312, cross=164_736, up=99_072)
    assert count(a) == (382_896,) * 2 and count(DenseCrossAdapter(1024, 512))[0] == 448_688
    assert tuned([DenseCross((8,)), TextAdapter((8,))]) == [382_896, 66_112] and 382_896 + 66_112 == 449_008


TABLE5 = {(8,): .45, (6, 11): .90, (4, 8, 11): 1.35, (3, 6, 9, 11): 1.80, (3, 5, 7, 9, 11): 2.25, (1, 3, 5, 7, 9, 11): 2.69,
          (1, 3, 5, 7, 9, 10, 11): 3.14, (1, 3, 4, 5, 7, 9, 10, 11): 3.59, tuple(range(12)): 5.39}


@pytest.mark.parametrize("at, millions", TABLE5.items(), ids=lambda x: str(len(x)) if isinstance(x, tuple) else "")
def test_table_5(at, millions):
    n = sum(tuned([DenseCross(at), TextAdapter(at)]))
    assert n == 449_008 * len(at) and f"{n / 1e6:.2f}" == f"{millions:.2f}"
    if len(at) == 6: assert n == 2_694_048
    if len(at) == 3: assert n == 1_347_024


@pytest.mark.parametrize("down, text, total", [(64, 64, 1_912_848), (128, 64, 2_694_048), (128, 128, 3_087_648), (256, 128, 4_832_064)])
def test_table_4(down, text, total): assert sum(tuned([DenseCross(down=down), TextAdapter(down=text)])) == total


def test_tables_2_and_3_and_large():
    assert tuned([DenseCross(), TextAdapter()]) == [2_297_376, 396_672]
    assert sum(tuned([DenseCross((2, 6, 10, 14, 18, 22)), TextAdapter()], "vit_large_patch14_reg4_dinov2")) == 3_088_800


# ---------------------------------------------------------------- stored outputs of the published modules
def golden(name):
    if not (GOLDEN / f"{name}.npz").is_file(): pytest.skip(f"{GOLDEN / name}.npz is missing: stored outputs of the published modules")
    with np.load(GOLDEN / f"{name}.npz") as z: arrays = {k: z[k] for k in z.files}
    sizes = json.loads(str(arrays.pop("ctor_args")))
    arrays = {k: torch.from_numpy(v) for k, v in arrays.items()}
    return sizes, {k: v for k, v in arrays.items() if not k.startswith("w.")}, {k[2:]: v for k, v in arrays.items() if k.startswith("w.")}


NAMES = {"D_fc1.": "down.", "D_fc2.": "up.", "dense_branch1.": "dense.one.", "dense_branch2.": "dense.three.", "dense_branch3.": "dense.five.",
         "cross.image_proj.": "cross.image.", "cross.text_proj.": "cross.text.", "cross.back_proj.": "cross.back.",
         "cross.multihead_attn.out_proj.": "cross.out."}


def ours(state):
    "Published names to ours; the packed rows of the attention are taken apart."
    new = {}
    for k, v in state.items():
        if "in_proj" in k:
            for name, rows in zip("qkv", v.chunk(3)): new[f"cross.{name}.{k.split('in_proj_')[1]}"] = rows
        else:
            old = max((p for p in NAMES if k.startswith(p)), key=len)
            new[NAMES[old] + k[len(old):].replace("conv.", "0.").replace("bn.", "1.")] = v
    return new


def published():
    s, a, state = golden("dense_aligner_small")
    adapter = DenseCrossAdapter(s["fc_in_channels"], s["text_dim"], s["in_channels"], (s["ch1x1"], s["ch3x3"], s["ch5x5"]),
                                (s["ch3x3red"], s["ch5x5red"]), s["embed_dim"], s["num_heads"])
    assert {m.eps for m in adapter.modules() if isinstance(m, nn.BatchNorm2d)} == {s["bn_eps"]}
    return s, a, load(adapter, ours(state))


def test_parity_visual_adapter():
    s, a, m = published()
    p, (h, w) = s["split_token"], s["grid"]
    f = m.down(a["x"]).relu()
    close(f, a["fv"])
    g = rearrange(f[:, p:], "b (h w) c -> b c h w", h=h)
    f1 = m.dense.one(g)
    f2 = m.dense.three(torch.cat((g, f1), 1))
    close(f1, a["branch1"]); close(f2, a["branch2"]); close(m.dense.five(torch.cat((g, f1, f2), 1)), a["branch3"])
    dense = rearrange(m.dense(g), "b c h w -> b (h w) c")
    close(dense, a["dense_tokens"])
    close(m.cross(dense, a["text"]), a["cross_out"])
    seen = []
    m.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = m(a["x"], a["text"], None, (h, w), p)
    close(seen[0], a["before_up"]); close(y, a["y"]); close(y + a["x"], a["y_skip"])


def test_parity_text_adapter():
    "The stored one is derived from DCRIS Eq. 3: no code of it was published."
    s, a, state = golden("text_adapter_plain_derived")
    tuner = TextAdapter((0,), s["bottleneck"], scale=1.)
    tuner.attach(type("Encoder", (), dict(text=type("Text", (), dict(depth=1, width=s["width"])))))
    load(tuner.adapters["0"], {{"down": "0", "up": "2"}[k.split(".")[0]] + "." + k.split(".")[1]: v for k, v in state.items()})
    close(tuner.branch("text", 0, "mlp", a["x"], None, 0., None), a["y"])


# ---------------------------------------------------------------- what it computes
def adapter(seed=0, **changes):
    torch.manual_seed(seed)
    m = DenseCrossAdapter(20, 12, **{**dict(down=16, inner=12, heads=3), **changes}).double()
    for p in m.parameters(): p.data += .3 * torch.randn_like(p)
    for n, b in m.named_buffers():
        if n.endswith("mean"): b.normal_()
        if n.endswith("var"): b.uniform_(.5, 1.5)
    return m.eval()


def inputs(N=12, P=3, L=5):
    g = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)
    return draw(2, P + N, 20), draw(2, L, 12), torch.arange(L) < torch.tensor([[5], [2]])


@pytest.mark.parametrize("grid", [(3, 4), (2, 6), (12, 1)])
@pytest.mark.parametrize("twice, prefix", [(True, 3), (False, 3), (True, 0)])
def test_adapter_by_another_road(grid, twice, prefix):
    "Convolutions as sums over shifted grids, PyTorch's own attention; grids that are not square; with and without prefix."
    m, (z, t, words) = adapter(twice=twice), inputs(P=prefix)

    def unit(u, x):
        conv, norm, _ = u
        k, (h, w) = conv.kernel_size[0], grid
        wide, y = F.pad(x, (k // 2,) * 4), conv.bias[:, None, None]
        for i in range(k):
            for j in range(k): y = y + torch.einsum("oc,bchw->bohw", conv.weight[:, :, i, j], wide[:, :, i:i + h, j:j + w])
        row = lambda v: v[:, None, None]
        return ((y - row(norm.running_mean)) / row(norm.running_var + 1e-3).sqrt() * row(norm.weight) + row(norm.bias)).clamp_min(0)

    f = (z @ m.down.weight.T + m.down.bias).clamp_min(0)
    g = f[:, prefix:].reshape(2, *grid, 16).permute(0, 3, 1, 2)
    f1 = unit(m.dense.one, g)
    f2 = unit(m.dense.three[1], unit(m.dense.three[0], torch.cat((g, f1), 1)))
    f3 = unit(m.dense.five[1], unit(m.dense.five[0], torch.cat((g, f1, f2), 1)))
    dense = (torch.cat((f1, f2, f3), 1) + g).flatten(2).mT
    mha = nn.MultiheadAttention(12, 3, batch_first=True).double()
    c = m.cross
    mha.load_state_dict({"in_proj_weight": torch.cat([x.weight for x in (c.q, c.k, c.v)]), "in_proj_bias": torch.cat([x.bias for x in (c.q, c.k, c.v)]),
                         "out_proj.weight": c.out.weight, "out_proj.bias": c.out.bias})
    said = c.text(t)
    cross = c.back(mha(c.image(dense), said, said, key_padding_mask=~words)[0]) + f[:, prefix:]
    expected = torch.cat(((1 + twice) * f[:, :prefix], cross), 1) @ m.up.weight.T + m.up.bias
    torch.testing.assert_close(m(z, t, words, grid, prefix), expected, rtol=0, atol=1e-11)


def test_receptive_fields():
    "F1 sees its own patch, F2 3 × 3, F3 7 × 7: the 5 × 5 convolution reads F2."
    x = torch.rand(1, 16, 11, 11, dtype=torch.float64, requires_grad=True)
    reach = []
    for rows in (slice(0, 8), slice(8, 12), slice(12, 16)):
        seen = torch.zeros(11, 11)
        for seed in range(12):
            torch.manual_seed(seed)
            y = (DenseBranches(16, (8, 4, 4), (3, 3)).double().eval()(x) - x)[:, rows, 5, 5].sum()
            seen += torch.autograd.grad(y, x)[0].abs().sum((0, 1)).float()
        hit = seen.nonzero()
        reach.append(tuple((hit.max(0).values - hit.min(0).values + 1).tolist()))
    assert reach == [(1, 1), (3, 3), (7, 7)]


def test_one_word_leaves_the_convolutions_without_a_say():
    "With a single key the mixture of words is that word, whatever is asked."
    m, (z, t, words) = adapter(), inputs()
    one = torch.arange(5)[None] < torch.tensor([[1], [1]])
    weighed([m(z, t, one, (3, 4), 3)]).backward()
    silent = {n for n, p in m.named_parameters() if p.grad.abs().max() < 1e-12}
    assert silent == {n for n, _ in m.named_parameters() if n.startswith(("dense.", "cross.image.", "cross.q.", "cross.k."))}


def test_released_start():
    "Linear maps N(0, 0.02²) cut off, packed Xavier for q k v, convolutions Kaiming, all biases zero; `zero` differs in the up-projection only."
    torch.manual_seed(0)
    m = DenseCrossAdapter(768, 512)
    std = {n: p.std().item() for n, p in m.named_parameters() if p.dim() > 1}
    for n in ("down", "up", "cross.image", "cross.text", "cross.out", "cross.back"): assert abs(std[f"{n}.weight"] - .02) < 1e-3
    for n in "qkv": assert abs(std[f"cross.{n}.weight"] - (6 / 512 / 3) ** .5) < 1e-3 and getattr(m.cross, n).weight.abs().max() <= (6 / 512) ** .5
    assert abs(std["dense.one.0.weight"] - (2 / 128) ** .5) < 5e-3
    assert all(p.abs().max() == 0 for n, p in m.named_parameters() if n.endswith("bias"))
    torch.manual_seed(0)
    zero = dict(DenseCrossAdapter(768, 512, zero=True).named_parameters())
    assert [n for n, p in m.named_parameters() if not torch.equal(p, zero[n])] == ["up.weight"] and zero["up.weight"].abs().max() == 0


def test_released_start_of_the_text_adapter():
    "PyTorch's own uniform draw, 1 / √(channels in) wide, biases too; `zero` differs in the up-projection only."
    made = {}
    for zero in (False, True):
        torch.manual_seed(0)
        made[zero] = TextAdapter(zero=zero).make(512).state_dict()
    for k, bound in [("0.weight", 512), ("0.bias", 512), ("2.weight", 64), ("2.bias", 64)]:
        assert .95 * bound**-.5 < made[False][k].abs().max() <= bound**-.5
        if k[0] == "2": assert made[True][k].abs().max() == 0
        else: assert torch.equal(made[True][k], made[False][k])


def test_released_start_is_small():
    "On features of unit size the visual adapter gives 0.09, times 0.2."
    torch.manual_seed(0)
    with torch.no_grad(): y = DenseCrossAdapter(768, 512).eval()(torch.randn(1, 1029, 768), torch.randn(1, 17, 512), None, (32, 32), 5)
    assert .085 < y.std() < .095


def test_dropout_only_in_training():
    m, (z, t, words) = adapter(dropout=.5), inputs()
    with torch.no_grad():
        assert torch.equal(m(z, t, words, (3, 4), 3), m(z, t, words, (3, 4), 3))
        m.cross.train()
        assert not torch.equal(m(z, t, words, (3, 4), 3), m(z, t, words, (3, 4), 3))


# ---------------------------------------------------------------- contracts
@pairs
@methods
@pytest.mark.parametrize("training", [False, True])
def test_zero_start_changes_nothing(kind, method, training):
    with torch.no_grad(): same(towers(kind, METHODS[method](zero=True)).train(training)(*batch()), towers(kind)(*batch()), 1e-12)


@pairs
@methods
def test_released_start_changes_the_towers(kind, method):
    tuners = METHODS[method]()
    with torch.no_grad(): a, b = towers(kind, tuners).eval()(*batch()), towers(kind)(*batch())
    assert not torch.allclose(a.words, b.words) if method != "da" else torch.equal(a.words, b.words)
    assert not torch.allclose(a.taps[1], b.taps[1]) if method != "ta" else torch.equal(a.taps[1], b.taps[1])


BEFORE_NORM = tuple(f".dense.{u}.0.bias" for u in ("one", "three.0", "three.1", "five.0", "five.1")) + (".cross.k.bias",)


@pytest.mark.parametrize("kind", ["clip", "dino"])
@methods
def test_only_what_is_declared_trains(kind, method):
    """After three steps all else is bit-equal and every declared tensor has moved, except those that provably have no gradient:
    biases that BatchNorm takes off again, and the key bias, which adds one number to all scores of a query."""
    encoder = towers(kind, METHODS[method]())
    start = {n: p.clone() for n, p in encoder.state_dict().items()}
    assert {n for n, p in encoder.named_parameters() if p.requires_grad} == {n for n, _ in encoder.named_parameters() if n.startswith("tuners.")}
    opt = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 1e-3)
    for _ in range(3):
        opt.zero_grad()
        weighed(outputs(encoder(*batch()))).backward()
        opt.step()
    for n, p in encoder.named_parameters():
        still = n.endswith(BEFORE_NORM)
        if not n.startswith("tuners."): assert torch.equal(p, start[n]), n
        elif still: assert (p - start[n]).abs().max() < 1e-9, n
        else: assert not torch.equal(p, start[n]), n


@pytest.mark.parametrize("zero", [False, True])
def test_what_trains_first(zero):
    "At the zero start the first gradient reaches the up-projections alone, the second everything; at the released start the first does."
    encoder, reached = towers("dino", both(dropout=0., zero=zero)), []
    opt = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        opt.zero_grad()
        weighed(outputs(encoder(*batch()))).backward()
        reached.append({n for n, p in encoder.tuners.named_parameters() if p.grad is not None and p.grad.abs().max() > 0 and not n.endswith(BEFORE_NORM)})
        opt.step()
    ups = {n for n, _ in encoder.tuners.named_parameters() if ".up." in n or n.startswith("1.") and ".2." in n}
    everything = {n for n, _ in encoder.tuners.named_parameters() if not n.endswith(BEFORE_NORM)}
    assert reached == [ups if zero else everything, everything]


@pairs
@pytest.mark.parametrize("twice", [True, False])
def test_batch_and_padding_do_not_matter(kind, twice):
    encoder = towers(kind, both(twice=twice)).eval()
    image, ids, words = batch()
    with torch.no_grad():
        every = encoder(image, ids, words)
        for b, n in enumerate(words.sum(1).tolist()):
            one = encoder(image[b:b + 1], ids[b:b + 1, :n], words[b:b + 1, :n])
            for x, y in zip([*every.taps, *every.side, every.sentence, every.pooled], [*one.taps, *one.side, one.sentence, one.pooled]):
                torch.testing.assert_close(x[b:b + 1], y, rtol=0, atol=1e-10)
        ids[~words] = 7
        same(encoder(image, ids, words), every)


def test_unmasked_hears_padding():
    "The parity option: nonsense behind the end token reaches the image."
    encoder, (image, ids, words) = towers("dino", both(masked=False)).eval(), batch()
    with torch.no_grad():
        a = encoder(image, ids, words)
        ids[~words] = 7
        b = encoder(image, ids, words)
    assert not torch.allclose(a.taps[-1][0], b.taps[-1][0], atol=1e-12) and torch.allclose(a.taps[-1][1], b.taps[-1][1], atol=1e-12)


@pytest.mark.parametrize("kind", ["clip", "dino", "wide"])
def test_place_in_the_block(kind):
    "Beside the MLP, inside LayerScale, from its input; the text adapter from the stream before the norm. On a grid of 4 × 8, too."
    da, ta = DenseCross((2,), **DROPPED), TextAdapter((2,), 8)
    encoder, (image, ids, words) = towers(kind, [da, ta]).eval(), batch()
    if kind == "wide": image = image[:, :, :32]
    v, t = encoder.visual.embed(image), encoder.text.embed(ids)
    with torch.no_grad():
        for i, b in enumerate(encoder.text.blocks):
            t = t + b.scale1(b.attn(b.norm1(t), None, text_mask(words)))
            t = t + b.scale2(b.mlp(b.norm2(t)) + (.2 * ta.adapters["2"](t) if i == 2 else 0))
        said = encoder.text.finish(t)
        for i, b in enumerate(encoder.visual.blocks):
            v = v + b.scale1(b.attn(b.norm1(v)))
            z = b.norm2(v)
            v = v + b.scale2(b.mlp(z) + (.2 * da.adapters["2"](z, said, words, encoder.visual.grid, encoder.visual.prefix) if i == 2 else 0))
        out = encoder(image, ids, words)
    torch.testing.assert_close(out.side[-1], v[:, encoder.visual.prefix:], rtol=0, atol=1e-11)
    torch.testing.assert_close(out.words[words], said[words], rtol=0, atol=1e-11)


def test_text_adapter_normed():
    "The option that reads what the MLP reads."
    tuner = TextAdapter((0,), 8, normed=True)
    towers("clip", [tuner])
    x, z = torch.randn(2, 1, 3, 96, dtype=torch.float64)
    torch.testing.assert_close(tuner.branch("text", 0, "mlp", x, z, x, None), x + .2 * tuner.adapters["0"](z))
    assert all(tuner.branch(tower, i, part, x, z, x, None) is x for tower, i, part in (("text", 1, "mlp"), ("text", 0, "attn"), ("visual", 0, "mlp")))


def test_gradient_of_the_image_reaches_the_text_adapters():
    encoder = towers("dino", both())
    weighed(encoder(*batch()).taps).backward()
    assert all(p.grad.abs().max() > 0 for p in encoder.tuners[1].parameters())


def test_state_holds_the_batch_norms():
    encoder = towers("dino", both())
    for _ in range(2): encoder(*batch())
    state = encoder.tuners.state_dict()
    means = [n for n in state if n.endswith("running_mean")]
    assert len(means) == 5 * len(AT) and all(state[n].abs().max() > 0 for n in means)
    fresh = towers("dino", both())
    with torch.no_grad():
        before = fresh.eval()(*batch())
        fresh.tuners.load_state_dict(state)
        same(fresh(*batch()), encoder.eval()(*batch()), 0)
    assert not torch.equal(before.taps[-1], encoder(*batch()).taps[-1])


@pairs
def test_precisions(kind):
    for dtype in (torch.float32, torch.bfloat16):
        encoder = towers(kind, both(), dtype)
        out = encoder(*batch(dtype))
        weighed(out.taps).backward()
        assert out.taps[-1].dtype == out.words.dtype == dtype and all(x.isfinite().all() for x in outputs(out))
        assert all(p.grad is None or p.grad.isfinite().all() for p in encoder.parameters())
    encoder = towers(kind, both(), torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16): assert all(x.isfinite().all() for x in outputs(encoder(*batch(torch.float32))))
    double = towers(kind, both()).eval()
    double.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        for x, y in zip(outputs(encoder(*batch(torch.float32))), outputs(double(*batch()))):
            torch.testing.assert_close(x.double(), y, rtol=1e-3, atol=1e-3 * y.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees():
    encoder = towers("dino", both()).eval()
    with torch.no_grad():
        here = encoder(*batch())
        there = encoder.cuda()(*(x.cuda() for x in batch()))
        for x, y in zip(outputs(here), outputs(there)): torch.testing.assert_close(x, y.cpu(), rtol=0, atol=1e-9)


# ---------------------------------------------------------------- mistakes
z, t, seen = torch.zeros(1, 11, 20), torch.zeros(1, 4, 12), torch.ones(1, 4, dtype=torch.bool)
MISTAKES = {
    "out of range": (lambda: towers("clip", [DenseCross((1, 6), **SMALL)]), "block 6 of a tower of 6 blocks"),
    "default on six blocks": (lambda: towers("clip", [DenseCross(**SMALL)]), "from 0 to 5"),
    "negative": (lambda: towers("clip", [TextAdapter((-1,))]), "block -1"),
    "a number": (lambda: DenseCross(3), "DenseCross at positions 3; give a list"),
    "no block": (lambda: TextAdapter(()), "TextAdapter at positions ()"),
    "not whole": (lambda: towers("clip", [TextAdapter((1.5,))]), "1.5"),
    "text too deep": (lambda: towers("deep", [DenseCross((7,), **SMALL), TextAdapter((7,))]), "TextAdapter at block 7 of a tower of 6"),
    "twice": (lambda: towers("clip", [DenseCross((1, 1), **SMALL)]), "twice"),
    "no text width": (lambda: DenseCrossAdapter(20, None), "width of the text tower is unknown"),
    "branches": (lambda: DenseCrossAdapter(20, 12, 32, branches=(16, 8, 4), reduce=(2, 2)), "add up to 32"),
    "no branch": (lambda: DenseBranches(32, (16, 16, 0)), "none below one"),
    "two branches": (lambda: DenseBranches(32, (16, 16)), "three branches"),
    "sixteenths": (lambda: DenseCrossAdapter(20, 12, 40), "multiple of 16"),
    "zero": (lambda: DenseCrossAdapter(20, 12, 0), "multiple of 16"),
    "half a channel": (lambda: DenseCrossAdapter(20, 12, 16.), "multiple of 16"),
    "below zero": (lambda: DenseCrossAdapter(20, 12, -16, (8, 4, 4), (1, 1)), "multiple of 16"),
    "branches, no reductions": (lambda: DenseCrossAdapter(20, 12, 20, branches=(10, 5, 5)), "or give branches and reduce"),
    "dropout": (lambda: DenseCrossAdapter(20, 12, 16, dropout=1.), "dropout 1.0"),
    "guests": (lambda: towers("clip", [Intertwine(), DenseCross(AT, **SMALL)]), "DenseCross needs the finished text while Intertwine"),
    "bridges": (lambda: towers("clip", [DenseCross(AT, **SMALL), Bridger(24, 4)]), "DenseCross needs the finished text while Bridger"),
    "heads": (lambda: WordAttention(16, 12, 24, 5), "5 heads"),
    "bottleneck": (lambda: towers("clip", [TextAdapter((1,), down=0)]), "at least one"),
    "no text": (lambda: DenseCrossAdapter(20, 12, 16)(z, None, seen, (2, 4), 3), "needs the finished words"),
    "grid": (lambda: DenseCrossAdapter(20, 12, 16)(z, t, seen, (3, 3), 3), "grid of 3 × 3"),
    "prefix": (lambda: DenseCrossAdapter(20, 12, 16)(z, t, seen, (2, 4), 1), "10 patches behind 1 prefix"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake):
    call, words = MISTAKES[mistake]
    with pytest.raises(BarleriaError) as e: call()
    assert words in str(e.value) and "\n" not in str(e.value)


def test_without_text_in_a_loop():
    "Called where the text has not been read."
    tuner = DenseCross((0,), **SMALL)
    encoder = towers("clip", [tuner])
    x = encoder.visual.embed(batch()[0])
    with pytest.raises(BarleriaError, match="finished words"): tuner.branch("visual", 0, "mlp", x, x, x, Context(encoder.visual.grid, 1, batch()[2]))
