"""Contracts of shortcut flows and intertwined tokens, on random towers small enough to run in float64."""
from types import SimpleNamespace

import pytest
import torch

from barleria_nb.backbones import DualEncoder
from barleria_nb.core import BarleriaError, count
from barleria_nb.intertwine import Bottleneck, Intertwine
from barleria_nb.snf import AffinePlanarFlow, HadamardFlow, SNF, folds, invert, planar_step
from common import batch, towers, weighed

BOTH = ("visual", "text")
METHODS = {
    "snf": lambda: [SNF()],
    "snf-text": lambda: [SNF(("text",))],
    "snf-both": lambda: [SNF(BOTH)],
    "snf-hadamard": lambda: [SNF(BOTH, form="hadamard")],
    "intertwine": lambda: [Intertwine(8)],
    "noglobal": lambda: [Intertwine(8), SNF(BOTH)],
}


def outputs(e):
    "Everything a head can read, and nothing of what padding rows hold."
    return [*e.taps, e.side[0], e.words * e.mask[..., None], e.sentence]


LOSSES = {
    "all": lambda e: weighed(outputs(e)),
    "image": lambda e: weighed(e.taps),
    "text": lambda e: weighed([e.words * e.mask[..., None], e.sentence]),
}


def without_gradient(method, loss, depth=3):
    """Names of the tuners' tensors that cannot matter to a loss on one tower's output alone.

    Without guests the towers are strangers. With guests, what the last block of one tower gives is read by no block of the other."""
    index, mute = (1 if method == "noglobal" else 0), {"all": None, "image": "text", "text": "visual"}[loss]
    if mute is None or method == "intertwine": return lambda name: False
    alone = f"{index}.flows.{mute}."
    return lambda name: name.startswith(alone if method != "noglobal" else f"{alone}{depth - 1}.")


@pytest.mark.parametrize("method", [m for m in METHODS if "snf" in m])
def test_flow_identity(method):
    "mu = s = u = 0 is the frozen tower."
    tuners = METHODS[method]()
    tuned = towers(tuners)
    with torch.no_grad():
        for name, p in tuned.tuners.named_parameters():
            if name.endswith((".mu", ".s", ".u")): p.zero_()
        for a, b in zip(outputs(tuned(*batch())), outputs(towers()(*batch()))): torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["planar", "hadamard"])
def test_fresh_flows_are_nearly_the_identity(form):
    with torch.no_grad(): a, b = towers([SNF(BOTH, form=form)])(*batch()), towers()(*batch())
    for x, y in zip(outputs(a), outputs(b)): assert 0 < (x - y).norm() < .05 * y.norm()


class Silent(Intertwine):
    "Guests behind closed masks."
    def guests(self, i, v, t, ctx):
        closed = torch.zeros_like(ctx.words)
        return super().guests(i, v, t, ctx)._replace(visual_mask=closed, text_mask=closed[:, :1])


def test_silent_guests_are_the_frozen_towers():
    with torch.no_grad(): a, b = towers([Silent(8)])(*batch()), towers()(*batch())
    for x, y in zip(outputs(a), outputs(b)): torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def literal(encoder, tuner, image, ids, words):
    "Eq. 2 and 3 with whole frozen blocks over [cls, T', patches] and [cls', T], cut after each block."
    v, t, one = encoder.visual.embed(image), encoder.text.embed(ids), torch.ones(len(ids), 1, dtype=torch.bool)
    heard, n = torch.cat((one, words), 1), ids.shape[1]
    see = torch.cat((one, words, one.expand(-1, v.shape[1] - 1)), 1)[:, None, None]
    read = (torch.ones(n + 1, n + 1).tril().bool() & heard[:, None])[:, None]
    steps = min(encoder.visual.depth, encoder.text.depth)
    mine = lambda tower, i: tower.blocks[i * tower.depth // steps:(i + 1) * tower.depth // steps]
    for i in range(steps):
        T, cls = tuner.to_visual(t), tuner.to_text(v[:, :1])
        for phi in mine(encoder.visual, i):
            row = phi(torch.cat((v[:, :1], T, v[:, 1:]), 1), see)
            v = torch.cat((row[:, :1], row[:, 1 + n:]), 1)
        for psi in mine(encoder.text, i):
            t = psi(torch.cat((cls, t), 1), read)[:, 1:]
    return encoder.visual.finish(v)[:, 1:], encoder.text.finish(t)


@pytest.mark.parametrize("visual,text", [(3, 3), (4, 2), (6, 2), (2, 4)])
def test_guests_equal_the_papers_longer_rows(visual, text):
    "Also where one tower is deeper: the same guests enter all its blocks of a step."
    tuner = Intertwine(8)
    encoder, (image, ids, words) = towers([tuner], visual, text), batch()
    with torch.no_grad(): ours, (patches, said) = encoder(image, ids, words), literal(encoder, tuner, image, ids, words)
    torch.testing.assert_close(ours.taps[-1].flatten(2).mT, patches, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.words[words], said[words], rtol=0, atol=1e-12)


def test_who_hears_whom():
    "The first class token is the same for all images; news of the image reaches the words from step two, and the patches of others never."
    class Spy(Intertwine):
        def guests(self, i, v, t, ctx):
            self.seen = [*(self.seen if i else []), super().guests(i, v, t, ctx)]
            return self.seen[-1]
    spy, (image, ids, words) = Spy(8), batch()
    with torch.no_grad(): towers([spy])(image, ids[:1].expand(3, -1), words[:1].expand(3, -1))
    differ = lambda g: bool((g[0] - g[1]).abs().max() > 1e-9)
    assert [differ(g.text) for g in spy.seen] == [False, True, True]
    assert [differ(g.visual[:, :3]) for g in spy.seen] == [False, False, True]


@pytest.mark.parametrize("optimiser", [lambda p: torch.optim.Adam(p, 1e-3), lambda p: torch.optim.SGD(p, 1e-3)], ids=["adam", "sgd"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("method", METHODS)
def test_only_the_declared_trains_and_all_of_it_moves(method, loss, optimiser):
    encoder = towers(METHODS[method]()).train()
    tuned = dict(encoder.tuners.named_parameters())
    mute = {n for n in tuned if without_gradient(method, loss)(n)}
    assert {n for n, p in encoder.named_parameters() if p.requires_grad} == {f"tuners.{n}" for n in tuned}
    e = encoder(*batch())
    if mute == set(tuned):
        assert not LOSSES[loss](e).requires_grad
        return
    grads = torch.autograd.grad(LOSSES[loss](e), list(tuned.values()), allow_unused=True)
    assert {n for n, g in zip(tuned, grads) if g is None} == mute  # not in the graph at all: that is the proof
    assert all(g.abs().max() > 0 for g in grads if g is not None)
    before = {n: p.detach().clone() for n, p in encoder.state_dict().items()}
    opt = optimiser(encoder.tuners.parameters())
    for _ in range(3):
        opt.zero_grad()
        LOSSES[loss](encoder(*batch())).backward()
        opt.step()
    moved = {n for n, p in encoder.state_dict().items() if not torch.equal(p, before[n])}
    assert moved == {f"tuners.{n}" for n in tuned if n not in mute}
    assert all(p.grad is None for t in (encoder.visual, encoder.text) for p in t.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_batch_and_padding_do_not_matter(method):
    encoder, (image, ids, words) = towers(METHODS[method]()).eval(), batch()
    wide = torch.cat((ids, torch.full((3, 6), 7)), 1), torch.cat((words, torch.zeros(3, 6, dtype=torch.bool)), 1)
    with torch.no_grad(): whole, padded = encoder(image, ids, words), encoder(image, *wide)
    for k in range(3):
        n = int(words[k].sum())
        with torch.no_grad(): alone = encoder(image[k:k + 1], ids[k:k + 1, :n], words[k:k + 1, :n])
        for full in (whole, padded):
            for a, b in zip([*full.taps, full.sentence, full.words[:, :n]], [*alone.taps, alone.sentence, alone.words]):
                torch.testing.assert_close(a[k:k + 1], b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", METHODS)
def test_saved_tuners_restore_the_outputs(method):
    first, second = towers(METHODS[method]()), towers(METHODS[method]())
    with torch.no_grad():
        for p in first.tuners.parameters(): p.add_(.05)
        assert not torch.equal(first(*batch()).words, second(*batch()).words) or method == "snf"
        second.tuners.load_state_dict(first.tuners.state_dict())
        for a, b in zip(outputs(first(*batch())), outputs(second(*batch()))): assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_follows_double(method):
    exact, rough = towers(METHODS[method]()), towers(METHODS[method]()).to(torch.bfloat16)
    a, b = exact(*batch()), rough(*batch(torch.bfloat16))
    weighed([x.double() for x in outputs(b)]).backward()
    for x, y in zip(outputs(a), outputs(b)):
        assert y.dtype == torch.bfloat16 and (x - y.double()).norm() < .05 * x.norm()
    assert all(p.grad.isfinite().all() for p in rough.tuners.parameters())


def test_order_of_the_two_tuners_does_not_matter():
    flows, guests = SNF(BOTH), Intertwine(8)
    one = towers([flows, guests])
    with torch.no_grad():
        for a, b in zip(outputs(one(*batch())), outputs(DualEncoder(one.visual, one.text, [Again(guests), Again(flows)])(*batch()))): assert torch.equal(a, b)


def Again(tuner):
    "The same tuner, not attached a second time."
    tuner.attach = lambda encoder: None
    return tuner


def sized(visual=768, text=512, depth=(12, 12), prefix=1):
    "As much of an encoder as `attach` asks about."
    return SimpleNamespace(visual=SimpleNamespace(width=visual, depth=depth[0], prefix=prefix), text=SimpleNamespace(width=text, depth=depth[1]))


def numbers(tuner, encoder):
    with torch.device("meta"): tuner.attach(encoder)
    return count(tuner)[0]


def test_counts_of_the_paper():
    "ViT-B/16: the rows SNF (0.18 M) and No Global (0.39 M) of Table 5, by part."
    assert numbers(SNF(), sized()) == 184_416
    assert numbers(SNF(("text",)), sized()) == 122_976
    assert numbers(SNF(BOTH), sized()) == 307_392
    assert numbers(SNF(form="hadamard"), sized()) == 221_184
    meeting = Intertwine()
    assert numbers(meeting, sized()) == 83_264
    assert (count(meeting.to_visual)[0], count(meeting.to_text)[0]) == (41_760, 41_504)
    assert numbers(SNF(BOTH), sized()) + 83_264 == 390_656


@pytest.mark.parametrize("dim,length", [(1, 1), (16, 4), (96, 3)])
def test_count_formula(dim, length):
    assert count(AffinePlanarFlow(dim, length))[0] == 2 * dim + length * (2 * dim + 1)
    assert count(HadamardFlow(dim, length))[0] == 3 * dim * length


def rough(form, dim=6, length=4, size=.5):
    torch.manual_seed(3)
    flow = form(dim, length).double()
    with torch.no_grad():
        for p in flow.parameters(): p.normal_(0, size)
    return flow


def loop(flow, x):
    "The formula, step by step."
    z = flow.mu + flow.s.exp() * x
    for u, w, b in zip(flow.u, flow.w, flow.b): z = planar_step(z, u, w, b)
    return z


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("length", [1, 2, 4, 9])
def test_recurrence_equals_the_loop(length, shape):
    flow, x = rough(AffinePlanarFlow, length=length), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, wanted = torch.randn(shape, dtype=torch.float64), [x, *flow.parameters()]
    a, b = flow(x), loop(flow, x)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    for g, h in zip(*(torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True) for y in (a, b))):
        torch.testing.assert_close(g, h, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("form", [AffinePlanarFlow, HadamardFlow])
def test_log_det_equals_autograd(form):
    flow, x = rough(form), torch.randn(2, 4, 6, dtype=torch.float64)
    brute = [torch.linalg.slogdet(torch.autograd.functional.jacobian(flow, row)).logabsdet for row in x.flatten(0, 1)]
    torch.testing.assert_close(flow.log_det(x), torch.stack(brute).view(2, 4), rtol=0, atol=1e-10)


def test_inverse_and_folding():
    flow, x = rough(AffinePlanarFlow, size=.2), torch.randn(50, 6, dtype=torch.float64)
    torch.testing.assert_close(invert(flow, flow(x)), x, rtol=0, atol=1e-10)
    with torch.no_grad(): flow.w[1], flow.u[1] = 1., -.2
    assert folds(flow).tolist() == [False, True, False, False]
    with pytest.raises(BarleriaError, match=r"steps \[1\] fold"): invert(flow, x)


def test_autocast_keeps_the_residual_stream_exact():
    "Only what a flow adds is rounded to bf16, not the tokens that pass through."
    flow, x = AffinePlanarFlow(64), torch.randn(3, 64)
    with torch.autocast("cpu", torch.bfloat16): y = flow(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, flow(x), rtol=0, atol=1e-3)


def test_mistakes_are_named():
    for make, words in ((lambda: SNF(form="planer"), "Did you mean planar"), (lambda: SNF(()), "name visual, text or both"),
                        (lambda: SNF(("image",)), "name visual, text or both"), (lambda: AffinePlanarFlow(4, 0), "at least one"),
                        (lambda: HadamardFlow(0), "at least one"), (lambda: Bottleneck(4, 4, 0), "at least one"),
                        (lambda: Intertwine().attach(sized(prefix=0)), "no class token")):
        with pytest.raises(BarleriaError, match=words): make()
