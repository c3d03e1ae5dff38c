"""Contracts of the global prior and of the global shortcut tuning network, on random tensors and random towers."""
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from barleria_nb.backbones import TINY, DualEncoder, TextTower, build_tiny_clip, visual_tower
from barleria_nb.core import BarleriaError, count
from barleria_nb.gst import GST, GSTAttention, GSTModule
from barleria_nb.head import MultiHead
from barleria_nb.intertwine import Intertwine
from barleria_nb.prior import GlobalPrior, prior_weights
from barleria_nb.snf import SNF

LENGTHS = torch.tensor([6, 3, 1])


def inputs(dtype=torch.float64, width=20, joint=12, L=6, N=9, M=4, seed=3):
    "Three samples with sentences of six, three and one tokens."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return dict(patches=draw(3, N, width), side=[draw(3, N, width) for _ in range(M)], words=draw(3, L, joint),
                mask=torch.arange(L) < LENGTHS[:, None], p=draw(3, L + N, joint))


def network(dtype=torch.float64, seed=1, **changes):
    "A small network whose biases are not zero."
    torch.manual_seed(seed)
    net = GST(**dict(width=20, joint=12, dim=12, heads=3, queries=5) | changes)
    for n, q in net.named_parameters():
        if n.endswith("bias"): nn.init.normal_(q, std=.1)
    return net.to(dtype)


def each(a, f):
    "`f` of every tensor of the inputs."
    return {k: [f(v) for v in x] if isinstance(x, list) else f(x) for k, x in a.items()}


def leaf(x): return x.clone().requires_grad_() if x.is_floating_point() else x


def weighed(y): return (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)).sum()


# ---------------------------------------------------------------- counts

@pytest.mark.parametrize("width, joint, total", [(768, 512, 1_815_840), (1024, 768, 2_037_024)])
def test_counts(width, joint, total):
    with torch.device("meta"): net, prior = GST(width, joint), GlobalPrior(joint, joint)
    assert count(net) == (total, total) and count(prior) == (0, 0)
    assert (len(net.blocks), len(net.queries), net.blocks[0].attn.heads, net.blocks[0].mlp[0].out_features) == (4, 128, 3, 576)
    module = 5 * (144 * 144 + 144) + 144 * 144 + 144 + 4 * 144 + 2 * 4 * 144 * 144 + 5 * 144
    assert count(net.blocks[0])[0] == module
    assert total == 4 * module + 5 * (width * 144 + 144) + joint * 144 + 144 + 128 * 144


def test_dino_map_is_counted_apart():
    with torch.device("meta"): prior = GlobalPrior(768, 512)
    assert isinstance(prior.map, nn.Linear) and count(prior)[0] == 768 * 512 + 512


def test_biases_of_the_prior_start_at_zero():
    net = GST(20, 12, dim=12)
    biases = [net.joint.bias, *(m.adapt.bias for m in net.blocks), *(m.attn.prior.bias for m in net.blocks)]
    assert all(not b.any() for b in biases)
    torch.manual_seed(0)
    assert .018 < GST(20, 12).queries.std() < .022


# ---------------------------------------------------------------- the prior

def test_prior_against_a_loop():
    a = inputs()
    words, patches, s = a["words"], a["patches"][..., :12], a["patches"][:, 0, 8:]
    p = GlobalPrior(12, 12)(words, patches, s)
    for b in range(3):
        for m, x in enumerate([*words[b], *patches[b]]):
            cosine = float(x @ s[b]) / float(x @ x) ** .5 / float(s[b] @ s[b]) ** .5
            torch.testing.assert_close(p[b, m], min(max(cosine, 0), 1) * x)


def test_prior_weights_are_cosines_of_directions():
    x, s = torch.randn(2, 50, 8, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    w = prior_weights(x, s)
    assert w.shape == (2, 50) and w.min() >= 0 and w.max() <= 1
    torch.testing.assert_close(prior_weights(30 * x, .01 * s), w)
    assert not prior_weights(-x, s)[w > 0].any()
    torch.testing.assert_close(prior_weights(s[:, None], s), torch.ones(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros(dtype):
    s = torch.randn(2, 8).to(dtype)
    for sentence in (s, torch.zeros_like(s)):
        words, sentence = torch.zeros(2, 3, 8, dtype=dtype, requires_grad=True), sentence.clone().requires_grad_()
        patches = torch.cat((torch.zeros(2, 2, 8, dtype=dtype), s[:, None]), 1)
        p = GlobalPrior(8, 8)(words, patches, sentence)
        assert p.dtype == dtype and p.isfinite().all() and not p[:, :5].any()
        p.float().sum().backward()
        assert words.grad.isfinite().all() and sentence.grad.isfinite().all()


def test_prior_is_a_matter_of_one_sample():
    a = inputs()
    words, patches, s = a["words"], a["patches"][..., :12], a["patches"][:, 0, 8:]
    prior = GlobalPrior(12, 12)
    torch.testing.assert_close(torch.cat([prior(words[b:b + 1], patches[b:b + 1], s[b:b + 1]) for b in range(3)]), prior(words, patches, s))


@pytest.mark.parametrize("visual", [12, 20])
def test_prior_gradients(visual):
    a = inputs()
    prior = GlobalPrior(visual, 12).double()
    words, patches, s = leaf(a["words"]), leaf(a["patches"][..., :visual]), leaf(a["patches"][:, 0, 8:])
    weighed(prior(words, patches, s)).backward()
    away = F.cosine_similarity(words, s[:, None], dim=-1) < 0
    assert patches.grad is None and s.grad.norm() > 0
    assert not words.grad[away].any() and words.grad[~away].norm(dim=-1).min() > 0
    assert all(q.grad.norm() > 0 for q in prior.parameters())


def test_prior_refuses():
    prior, w, f, s = GlobalPrior(12, 8), torch.randn(2, 3, 8), torch.randn(2, 5, 12), torch.randn(2, 8)
    for joint in (None, 0):
        with pytest.raises(BarleriaError, match="take one with a projection"): GlobalPrior(12, joint)
    bad = {"words": (w[..., 1:], f, s), "patches": (w, f[..., 1:], s), "sentence": (w, f, s[:, 1:])}
    for name, given in (*bad.items(), ("words", (w[:1], f, s)), ("patches", (w, f[:1], s))):
        with pytest.raises(BarleriaError, match=f"^{name} of shape .* build the prior for its widths\\.$") as e: prior(*given)
        assert "\n" not in str(e.value)


# ---------------------------------------------------------------- the network

def plain(module):
    "PyTorch's encoder layer with the weights of a module."
    dim = module.norm1.normalized_shape[0]
    layer = nn.TransformerEncoderLayer(dim, module.attn.heads, module.mlp[0].out_features, 0., "gelu", batch_first=True, norm_first=True).double()
    for name, part in dict(norm1=module.norm1, norm2=module.norm2, linear1=module.mlp[0], linear2=module.mlp[2]).items():
        getattr(layer, name).load_state_dict(part.state_dict())
    layer.self_attn.load_state_dict({"in_proj_weight": module.attn.qkv.weight, "in_proj_bias": module.attn.qkv.bias,
        "out_proj.weight": module.attn.proj.weight, "out_proj.bias": module.attn.proj.bias})
    return layer


def silent(net):
    "The biases on the prior's way back to zero, where they start."
    for q in (net.joint.bias, *(m.adapt.bias for m in net.blocks), *(m.attn.prior.bias for m in net.blocks)): nn.init.zeros_(q)
    return net


def test_without_a_prior_it_is_plain_transformers():
    net, a = silent(network()), inputs()
    front, deaf = 5 + 6, torch.cat((torch.zeros(3, 5, dtype=torch.bool), ~a["mask"], torch.zeros(3, 9, dtype=torch.bool)), 1)
    x = torch.cat((net.queries.expand(3, -1, -1), net.joint(a["words"]), net.tokens(a["patches"])), 1)
    for module, fuse, v in zip(net.blocks, net.fuse, a["side"]):
        x = plain(module)(x, src_key_padding_mask=deaf)
        x = torch.cat((x[:, :front], x[:, front:] + fuse(v)), 1)
    y = net(**a | dict(p=torch.zeros_like(a["p"])))
    torch.testing.assert_close(y, x[:, front:])
    assert (net(**a) - y).abs().max() > 1e-3


def test_module_is_its_formula():
    torch.manual_seed(0)
    m, x, p = GSTModule(12, 3).double(), torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    q, k, v = m.attn.qkv(m.norm1(x)).chunk(3, -1)
    v = v + m.adapt(p) @ m.attn.prior.weight.T
    heads = [F.softmax(q[..., c] @ k[..., c].transpose(1, 2) / 2, -1) @ v[..., c] for c in (slice(0, 4), slice(4, 8), slice(8, 12))]
    y = x + m.attn.proj(torch.cat(heads, -1))
    torch.testing.assert_close(m(x, p), y + m.mlp(m.norm2(y)))


def test_nothing_but_features_when_the_blocks_are_silent():
    net, a = network(), inputs()
    for m in net.blocks:
        for q in (*m.attn.proj.parameters(), *m.mlp[2].parameters()): nn.init.zeros_(q)
    torch.testing.assert_close(net(**a), net.tokens(a["patches"]) + sum(fuse(v) for fuse, v in zip(net.fuse, a["side"])))


def test_queries_have_no_rows_of_the_prior():
    net, a, given = network(), inputs(), []
    hook = net.blocks[0].register_forward_pre_hook(lambda m, x: given.extend(x))
    net(**a), hook.remove()
    x, p, mask = given
    assert not p[:, :5].any() and x.shape == p.shape == (3, 5 + 6 + 9, 12)
    torch.testing.assert_close(p[:, 5:], net.joint(a["p"]))
    assert mask[:, :5].all() and mask[:, 11:].all() and torch.equal(mask[:, 5:11], a["mask"])


def test_batch_mates_do_not_matter():
    net, a = network(), inputs()
    y = net(**a)
    for b in range(3): torch.testing.assert_close(net(**each(a, lambda x: x[b:b + 1])), y[b:b + 1])


@pytest.mark.parametrize("more", [1, 11])
def test_padding_does_not_matter(more):
    net, a = network(), inputs()
    front, back = a["p"].split([6, 9], 1)
    filling = torch.full((3, more, 12), 1e3, dtype=torch.float64)
    longer = a | dict(words=torch.cat((a["words"], filling), 1), mask=F.pad(a["mask"], (0, more)), p=torch.cat((front, filling, back), 1))
    torch.testing.assert_close(net(**longer), net(**a))
    nonsense = a | dict(words=a["words"].masked_fill(~a["mask"][..., None], -1e3))
    torch.testing.assert_close(net(**nonsense), net(**a))


def test_gradients():
    net, a = network(), each(inputs(), leaf)
    weighed(net(**a)).backward()
    assert all(v.grad is None for v in (a["patches"], *a["side"]))
    for k in ("words", "p"): assert a[k].grad[:, :6][a["mask"]].norm(dim=-1).min() > 0 and not a[k].grad[:, :6][~a["mask"]].any()
    assert a["p"].grad[:, 6:].norm(dim=-1).min() > 0
    for n, q in net.named_parameters(): assert q.grad.norm() > 1e-6, n
    for m in net.blocks:  # softmax takes the keys' bias out again: the one part that nothing can train
        grads = m.attn.qkv.bias.grad.chunk(3)
        assert grads[1].abs().max() < 1e-12 < 1e-6 < min(grads[0].norm(), grads[2].norm())


def test_every_tensor_moves_from_the_default_start():
    torch.manual_seed(0)
    net, a = GST(20, 12, dim=12, queries=5).double(), inputs()
    before = {n: q.detach().clone() for n, q in net.named_parameters()}
    step = torch.optim.Adam(net.parameters())
    for _ in range(3):
        step.zero_grad(), net(**a).square().mean().backward(), step.step()
    assert not [n for n, q in net.named_parameters() if torch.equal(q, before[n])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    net, a = network(dtype), inputs(dtype)
    y = net(**a)
    assert y.dtype == dtype and y.shape == (3, 9, 12) and y.isfinite().all()
    torch.testing.assert_close(y.double(), network()(**inputs()), atol={torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: .2}[dtype], rtol=.05)


def test_autocast():
    net, a = network(torch.float32), inputs(torch.float32)
    prior, given = GlobalPrior(20, 12), (a["words"], a["patches"], a["words"][:, 0])
    with torch.autocast("cpu", torch.bfloat16): y = net(**a | dict(p=prior(*given)))
    torch.testing.assert_close(y.float(), net(**a | dict(p=prior(*given))), atol=.2, rtol=.05)


@pytest.mark.parametrize("change, line", [
    (lambda a: dict(side=a["side"][:3]), r"^3 side features for M = 4 modules; .* GST\(modules=3\)\.$"),
    (lambda a: dict(side=[]), r"^0 side features for M = 4 modules"),
    (lambda a: dict(patches=a["patches"][..., 1:]), r"^patches of shape .* build GST for its widths\.$"),
    (lambda a: dict(side=[*a["side"][:3], a["side"][3][..., 1:]]), r"^side\[3\] of shape"),
    (lambda a: dict(side=[v[:, 1:] for v in a["side"]]), r"^side\[0\] of shape"),
    (lambda a: dict(words=a["words"][..., 1:]), r"^words of shape"),
    (lambda a: dict(words=a["words"][:1]), r"^words of shape"),
    (lambda a: dict(mask=a["mask"][:, 1:]), r"^mask of shape"),
    (lambda a: dict(mask=a["mask"].double()), r"mask of words is of torch.float64; make it boolean"),
    (lambda a: dict(p=a["p"][:, 1:]), r"^a prior of shape \(3, 14, 12\) for 6 words and 9 patches, .* make it by GlobalPrior"),
    (lambda a: dict(p=a["p"][..., 1:]), r"^a prior of shape \(3, 15, 11\)"),
    (lambda a: dict(p=F.pad(a["p"], (0, 0, 5, 0))), r"^a prior of shape \(3, 20, 12\)"),
    (lambda a: dict(p=a["p"][:1]), r"^a prior of shape \(1, 15, 12\)"),
])
def test_refuses(change, line):
    a = inputs()
    with pytest.raises(BarleriaError, match=line) as e: network()(**a | change(a))
    assert "\n" not in str(e.value)


def test_refuses_sizes():
    for joint in (None, 0):
        with pytest.raises(BarleriaError, match="take one with a projection"): GST(20, joint)
    for make in (lambda: GST(20, 12, dim=10), lambda: GSTModule(10), lambda: GSTAttention(10)):
        with pytest.raises(BarleriaError, match="width 10 does not divide into 3 heads"): make()
    for heads in (0, -4):
        with pytest.raises(BarleriaError, match="does not divide into"): MultiHead(16, heads)


# ---------------------------------------------------------------- with the towers

def reaches(tuners):
    "Names of the tuners' tensors that GST's output sends a gradient to."
    torch.manual_seed(0)
    model = build_tiny_clip(range(40), dict(TINY, width=32, heads=2, embed_dim=24, layers=4)).double()
    encoder = DualEncoder(visual_tower(model.visual), TextTower(model), tuners).double()
    image, ids, words = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.randint(2, 40, (2, 6)), torch.arange(6) < torch.tensor([[6], [4]])
    e = encoder(image, ids * words, words)
    spoken, seen = encoder.text.project(e.words), rearrange(e.taps[-1], "b c h w -> b (h w) c")
    p = GlobalPrior(encoder.dims[-1], encoder.joint).double()(spoken, seen, e.sentence)
    y = GST(32, 24, dim=12, queries=4).double()(e.patches, e.side, spoken, e.mask, p)
    assert y.shape == (2, 64, 12)
    weighed(y).backward()
    return {n for n, q in encoder.named_parameters() if q.grad is not None and q.grad.norm() > 0}


def test_gst_sends_nothing_into_the_image_tower():
    assert reaches([SNF(("visual",))]) == set()
    assert {n.split(".")[0] for n in reaches([SNF(("text",))])} == {"tuners"}


def test_gst_teaches_guests_through_the_words():
    names = reaches([Intertwine(8)])
    assert {"tuners.0.to_text.0.weight", "tuners.0.to_visual.0.weight"} <= names and {n.split(".")[0] for n in names} == {"tuners"}
