"""Contracts of the baselines (adapter, Compacter, LoRA, the Bridger of ETRIS) on tiny random towers, their counts at full size, and ETRIS' interaction against stored outputs."""
import copy
from functools import lru_cache
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from barleria_nb.backbones import Context, DualEncoder, TextTower, build_encoder, build_tiny_clip, visual_tower
from barleria_nb.baselines import PHM, Adapter, Bridge, Bridger, Compacter, Listen, LoRA, LowRank, Rule
from barleria_nb.core import count
from barleria_nb.snf import SNF
from common import SIZES, batch, line, towers as pair

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "barleria" / "etris_interactorT.npz"
METHODS = {
    "adapter": lambda: Adapter(8),
    "adapter-both": lambda: Adapter(8, ("attn", "mlp")),
    "compacter": lambda: Compacter(16, 4, 2),
    "lora": lambda: LoRA(2),
    "lora-scaled": lambda: LoRA(2, "ko", "qkvo", alpha=8.),
    "bridger": lambda: Bridger(16, 4),
}
methods = pytest.mark.parametrize("method", METHODS)


def towers(*tuners, **sizes): return pair(tuners, **sizes)


def outputs(e): return [*e.taps, *e.side, e.words * e.mask[..., None], e.sentence]


def shaken(method, **where):
    "No tuned number, running statistics included, is where it was built."
    model, g = towers(METHODS[method](), **where), torch.Generator().manual_seed(2)
    with torch.no_grad():
        model(*batch())
        for p in model.parameters():
            if p.requires_grad: p += .1 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return model.eval()


def hush(tuner):
    "The setting at which a method should not act."
    with torch.no_grad():
        for m in tuner.modules():
            if isinstance(tuner, Adapter) and isinstance(m, nn.Sequential): m[2].weight.zero_(), m[2].bias.zero_()
            if isinstance(tuner, Compacter) and isinstance(m, nn.ModuleList): m[1].t.zero_(), m[1].bias.zero_()
            if isinstance(tuner, LoRA) and hasattr(m, "B"): m.B.zero_()
            if isinstance(m, Bridge): [p.zero_() for p in (*m.norm_out.parameters(), *m.text_out.parameters())]


def same(a, b, atol=1e-12):
    assert len(a) == len(b)
    for x, y in zip(a, b): torch.testing.assert_close(x, y, rtol=0, atol=atol)


def backward(model, *inputs):
    g = torch.Generator().manual_seed(9)
    sum((x * torch.randn(x.shape, generator=g, dtype=x.dtype)).sum() for x in outputs(model(*inputs))).backward()


def step(model, optimiser):
    optimiser.zero_grad(), backward(model, *batch()), optimiser.step()


# ------------------------------------------------------------------------------------------------------------- contracts
@methods
def test_identity(method):
    frozen = towers().eval()
    model = shaken(method)
    with torch.no_grad():
        assert max((a - b).abs().max() for a, b in zip(outputs(model(*batch())), outputs(frozen(*batch())))) > 1e-2
        hush(model.tuners[0])
        same(outputs(model(*batch())), outputs(frozen(*batch())))


@pytest.mark.parametrize("method", ["compacter", "lora", "lora-scaled"])
def test_starts_at_the_frozen_towers(method):
    with torch.no_grad(): same(outputs(towers(METHODS[method]())(*batch())), outputs(towers()(*batch())))


def test_adapter_starts_nearby():
    with torch.no_grad():
        for a, b in zip(outputs(towers(Adapter(8))(*batch())), outputs(towers()(*batch()))): assert 0 < (a - b).norm() < .01 * b.norm()


@methods
def test_only_the_declared_trains(method):
    model = towers(METHODS[method]())
    mine = {id(p) for p in model.tuners.parameters()}
    assert {id(p) for p in model.parameters() if p.requires_grad} == mine
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3)
    for _ in range(3): step(model, optimiser)
    for n, p in model.named_parameters(): assert torch.equal(p, before[n]) != (id(p) in mine), n


@methods
@pytest.mark.parametrize("depths", [(3, 3), (6, 3), (3, 6)], ids=str)
def test_neither_batch_mates_nor_padding_matter(method, depths):
    model, (image, ids, words) = shaken(method, visual=depths[0], text=depths[1]), batch()
    with torch.no_grad():
        together = model(image, ids, words)
        noise = torch.where(words, ids, torch.randint_like(ids, 2, 50))
        same(outputs(model(image, noise, words)), outputs(together), 1e-10)
        for b, n in enumerate(words.sum(1).tolist()):
            alone = model(image[b:b + 1], ids[b:b + 1, :n], words[b:b + 1, :n])
            same([*alone.taps, *alone.side, alone.words, alone.sentence],
                 [x[b:b + 1] for x in (*together.taps, *together.side, together.words[:, :n], together.sentence)], 1e-10)


@methods
def test_saved_state_restores(method):
    model, fresh = shaken(method), towers(METHODS[method]()).eval()
    tuned = {n for n, p in model.named_parameters() if p.requires_grad} | {n for n, _ in model.named_buffers() if n.startswith("tuners")}
    missing, unexpected = fresh.load_state_dict({n: t for n, t in model.state_dict().items() if n in tuned}, strict=False)
    assert not unexpected and not tuned & set(missing)
    with torch.no_grad(): same(outputs(fresh(*batch())), outputs(model(*batch())), 0)


@methods
def test_number_types(method):
    model = shaken(method)
    with torch.no_grad():
        exact = outputs(model(*batch()))
        assert all(x.dtype == torch.float64 for x in exact)
        same(outputs(model.float()(*batch(torch.float32))), [x.float() for x in exact], 1e-3)
        rough = outputs(model.bfloat16()(*batch(torch.bfloat16)))
    assert all(x.dtype == torch.bfloat16 and x.isfinite().all() for x in rough)


@methods
@pytest.mark.parametrize("length", [1, 9])
def test_one_image_and_one_word(method, length):
    "Training included: BatchNorm then has the patches of one image; all words but the first are padding."
    model, (image, ids, _) = towers(METHODS[method]()), batch()
    few = image[:1], ids[:1, :length], torch.arange(length)[None] < 1
    backward(model, *few)
    assert all(p.grad.isfinite().all() for p in model.tuners.parameters())
    assert all(x.isfinite().all() for x in outputs(model.eval()(*few)))


@methods
def test_trains_in_mixed_precision(method):
    model = towers(METHODS[method]()).float()
    with torch.autocast("cpu", torch.bfloat16): backward(model, *batch(torch.float32))
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in model.tuners.parameters())


@methods
def test_a_copy_is_a_model_of_its_own(method):
    model = shaken(method)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = outputs(model(*batch()))
        same(outputs(twin(*batch())), before, 0)
        for p in twin.tuners.parameters(): p += .1
        assert (outputs(twin(*batch()))[0] - before[0]).abs().max() > 1e-3
        same(outputs(model(*batch())), before, 0)
    assert {id(p) for p in twin.parameters() if p.requires_grad} == {id(p) for p in twin.tuners.parameters()}


@methods
def test_towers_of_different_widths(method):
    torch.manual_seed(0)
    a, b = build_tiny_clip(range(40), SIZES), build_tiny_clip(range(40), dict(SIZES, width=48, heads=4))
    model = DualEncoder(visual_tower(a.visual), TextTower(b), [METHODS[method]()]).double()
    backward(model, *batch())
    assert all(p.grad is not None for p in model.tuners.parameters())


@pytest.mark.parametrize("pair", list(combinations_with_replacement(["adapter", "compacter", "lora", "bridger"], 2)), ids="+".join)
def test_two_at_once(pair):
    "Each of two methods moves all its numbers. (Of two LoRAs each has a tower.)"
    tuners = [LoRA(2, "qv", ""), LoRA(2, "", "qv")] if pair == ("lora", "lora") else [METHODS[m]() for m in pair]
    model = towers(*tuners)
    before, optimiser = [p.detach().clone() for p in model.tuners.parameters()], torch.optim.Adam(model.tuners.parameters(), 1e-3)
    for _ in range(3): step(model, optimiser)
    assert not any(torch.equal(p, old) for p, old in zip(model.tuners.parameters(), before))


@methods
def test_beside_flows(method):
    "A method and SNF in one list: at SNF's identity, the method alone."
    torch.manual_seed(3)
    model, alone = towers(METHODS[method](), SNF()).eval(), towers(METHODS[method]()).eval()
    alone.tuners[0].load_state_dict(model.tuners[0].state_dict())
    with torch.no_grad():
        for n, p in model.tuners[1].named_parameters():
            if n.endswith((".mu", ".s", ".u")): p.zero_()
        same(outputs(model(*batch())), outputs(alone(*batch())))


# ---------------------------------------------------------------------------------------------------------------- counts
@lru_cache
def full_size(backbone, *tuners):
    with torch.device("meta"): return count(build_encoder(backbone, [t() for t in tuners], pretrained=False))[0]


@pytest.mark.parametrize("backbone", ["dino-b14", "b16"])
def test_counts_at_full_size(backbone):
    assert [full_size(backbone, m) for m in (Adapter, Compacter, LoRA, Bridger)] == [1_982_976, 1_622_080, 1_572_864, 1_387_648]
    assert full_size(backbone, lambda: Bridger(64)) == 598_592
    assert full_size(backbone, SNF, Bridger) == 1_572_064


@pytest.mark.parametrize("backbone", ["eva02-b16", "l14", "dino-l14"])
def test_other_towers_are_served(backbone):
    for m in (Adapter, Compacter, LoRA, Bridger): assert full_size(backbone, m) > 1_000_000


def test_equal_counts_of_other_readings():
    assert full_size("dino-b14", lambda: Adapter(parts=("attn", "mlp"), at=range(6))) == full_size("dino-b14", Adapter)
    assert full_size("dino-b14", lambda: LoRA(64, "", "qv")) == full_size("dino-b14", LoRA)


# --------------------------------------------------------------------------------------------------------------- by part
def test_compacter_shares_one_rule():
    model = towers(Compacter(16, 4, 2))
    rules = [n for n, p in model.named_parameters() if p.shape == (4, 4, 4)]
    assert rules == ["tuners.0.rule.A"]
    with torch.no_grad():
        for pair in model.tuners[0].maps.values(): pair[1].t.normal_()
    outputs(model(*batch()))[0].sum().backward()
    assert model.tuners[0].rule.A.grad.abs().min() > 0


def test_phm_is_a_sum_of_kronecker_products():
    torch.manual_seed(0)
    phm, A, x = PHM(12, 8, 4, 2).double(), torch.randn(4, 4, 4).double(), torch.randn(5, 12).double()
    W = sum(torch.kron(A[i], phm.s[i] @ phm.t[i]) for i in range(4))
    torch.testing.assert_close(phm(x, A), x @ W + phm.bias)


@pytest.mark.parametrize("backbone", ["b16", "eva02-b16", "dino-b14"])
def test_lora_on_all_layouts(backbone):
    "Packed, separate and fused weights: only the rows that are named change, and the frozen weight stays as it was."
    with torch.device("meta"): encoder = build_encoder(backbone, pretrained=False)
    encoder.visual.blocks, encoder.text.blocks = encoder.visual.blocks[:1], encoder.text.blocks[:1]
    encoder.visual.depth = encoder.text.depth = 1
    encoder.to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters(): p.normal_()
    attn = encoder.visual.blocks[0].attn
    before = {k: getattr(*attn.weight(k)[:2])[attn.weight(k)[2]].clone() for k in "qkvo"}
    tuner = LoRA(2, "qo", "v", alpha=6.)
    tuner.attach(encoder)
    with torch.no_grad():
        for m in tuner.additions.values(): m.B.normal_()
    for k in "qkvo":
        module, attr, rows = attn.weight(k)
        now = getattr(module, attr)[rows]
        if k in "qo":
            m = tuner.additions[f"visual_0_{k}"]
            torch.testing.assert_close(now, before[k] + 3 * m.B @ m.A)
            assert torch.equal(module.parametrizations[attr].original[rows], before[k])
        else: assert torch.equal(now, before[k])


def test_lora_is_visible_and_leaves_the_frozen_weight():
    model, plain = shaken("lora"), towers()
    for tower in ("visual", "text"):
        for i, block in enumerate(getattr(model, tower).blocks):
            module, attr, rows = block.attn.weight("q")
            frozen = getattr(*getattr(plain, tower).blocks[i].attn.weight("q")[:2])
            assert parametrize.is_parametrized(module, attr) and torch.equal(module.parametrizations[attr].original, frozen)
            assert not torch.allclose(getattr(module, attr)[rows], frozen[rows])
            if tower == "text": assert torch.equal(getattr(module, attr)[32:64], frozen[32:64])  # k has no addition


def test_bridger_is_convolutions_on_the_grid():
    "BatchNorm2d and 1×1 convolutions on a grid of any sides give what rows of tokens give, statistics included."
    torch.manual_seed(0)
    bridge = Bridge(12, 10, 8, 2).double()
    v, t, words = torch.randn(2, 15, 12).double(), torch.randn(2, 4, 10).double(), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    conv, norm = nn.Conv2d(12, 8, 1, bias=False).double(), nn.BatchNorm2d(8).double()
    back, last = nn.ConvTranspose2d(8, 12, 1, bias=False).double(), nn.BatchNorm2d(12).double()
    conv.weight.data, back.weight.data = bridge.zoom_in.weight[..., None, None].data, bridge.zoom_out.weight.T[..., None, None].data
    for mode in (True, False):
        for m in (bridge, norm, last): m.train(mode)
        new, said, _ = bridge(v, t, words)
        a = norm(conv(v.mT.reshape(2, 12, 3, 5))).relu().flatten(2).mT
        grid = bridge.patches(a, bridge.text_in(t), words).mT.reshape(2, 8, 3, 5)
        torch.testing.assert_close(new, v + last(back(grid)).relu().flatten(2).mT)
        torch.testing.assert_close(said, t + bridge.text_out(bridge.words(bridge.text_in(t), a)))


def test_bridger_stages():
    for depths, steps in (((3, 3), (0, 1, 2)), ((4, 4), (0, 2, 3)), ((5, 5), (1, 2, 4)), ((6, 6), (1, 3, 5)), ((12, 6), (1, 3, 5)), ((24, 12), (3, 7, 11)), ((3, 6), (0, 1, 2))):
        assert tuple(map(int, towers(Bridger(16, 4), visual=depths[0], text=depths[1]).tuners[0].stages)) == steps
    tuner = shaken("bridger").tuners[0]
    v, t = torch.randn(1, 65, 32).double(), torch.randn(1, 4, 32).double()
    ctx = Context((8, 8), 1, torch.ones(1, 4, dtype=torch.bool))
    new, said = tuner.after(0, v, t, ctx)
    assert torch.equal(new[:, :1], v[:, :1]) and not torch.equal(new[:, 1:], v[:, 1:]) and not torch.equal(said, t)


def test_bridger_carries_over_the_stage_before():
    "The three stages by hand, by PyTorch's own attention: each takes over the last one's normed input, not its output; both exchanges read the same pair."
    model, (image, ids, words) = shaken("bridger"), batch()
    tuner, ctx = model.tuners[0], Context((8, 8), 1, words)

    def mha(m, a, b, padding):
        own = nn.MultiheadAttention(16, 4, batch_first=True).double()
        with torch.no_grad():
            own.in_proj_weight[:], own.in_proj_bias[:] = torch.cat((m.q.weight, m.kv.weight)), torch.cat((m.q.bias, m.kv.bias))
            own.out_proj.load_state_dict(m.out.state_dict())
        return own(a, b, b, key_padding_mask=padding)[0]

    with torch.no_grad():
        v, t, old = torch.randn(3, 65, 32).double(), torch.randn(3, 9, 32).double(), None
        flat = lambda norm, x: torch.nn.functional.batch_norm(x.mT, norm.running_mean, norm.running_var, norm.weight, norm.bias).mT.relu()
        for i in range(3):
            s = tuner.stages[str(i)]
            a, b = flat(s.norm_in, v[:, 1:] @ s.zoom_in.weight.T), s.text_in(t)
            if old: a, b = s.norms[0](a + old[0]), s.norms[1](b + old[1])
            old = a, b
            grown = v[:, 1:] + flat(s.norm_out, (a * mha(s.patches, a, b, ~words)) @ s.zoom_out.weight.T)
            expected = torch.cat((v[:, :1], grown), 1), t + s.text_out(b * mha(s.words, b, a, None))
            v, t = tuner.after(i, v, t, ctx)
            same((v, t), expected, 1e-10)


def test_bridger_keeps_nothing_between_passes():
    "Two passes that take turns do not hear of each other."
    tuner, g = shaken("bridger").tuners[0], torch.Generator().manual_seed(4)
    (v, w), (t, u) = (torch.randn(2, 1, n, 32, generator=g, dtype=torch.float64) for n in (65, 4))
    one, two, again = (Context((8, 8), 1, torch.ones(1, 4, dtype=torch.bool)) for _ in range(3))
    with torch.no_grad():
        alone = tuner.after(1, *tuner.after(0, v, t, again), again)
        first, _ = tuner.after(0, v, t, one), tuner.after(0, w, u, two)
        same(tuner.after(1, *first, one), alone, 0)


def test_two_bridgers_do_not_meet():
    torch.manual_seed(0)
    model = towers(Bridger(16, 4), Bridger(16, 2)).eval()
    hush(model.tuners[1])
    alone = towers(Bridger(16, 4)).eval()
    alone.tuners[0].load_state_dict(model.tuners[0].state_dict())
    with torch.no_grad(): same(outputs(model(*batch())), outputs(alone(*batch())))


def test_padding_of_the_release():
    "Heard on request: then it matters with what a row is filled up."
    model, (image, ids, words) = towers(Bridger(16, 4, padding=True)).eval(), batch()
    with torch.no_grad(): assert (model(image, ids, words).taps[0] - model(image, torch.where(words, ids, 7), words).taps[0]).abs().max() > 1e-6


# ---------------------------------------------------------------------------------------------------------------- errors
BLOCKS = [([1, 3], "no block 3"), (-1, "no block -1"), (1.5, "no block 1.5"), (True, "no block True"), ("01", "no block '01'"), ([[1]], "no block [1]"),
          (np.int64(1), "no block np.int64(1)"), (object(), "no block <object"), ([1, 1], "once"), ([], "at least one")]


@pytest.mark.parametrize("method", [Adapter, Compacter, LoRA])
def test_blocks(method):
    for at, words in BLOCKS: line(lambda: towers(method(at=at)), "visual tower", words)
    line(lambda: towers(method(at=3)), "0 to 2")
    line(lambda: towers(method(at=[5]), visual=6), "text tower has no block 5")
    everywhere = count(towers(method()).tuners)[0]
    for at in (range(3), {0, 1, 2}, (i for i in range(3))): assert count(towers(method(at=at)).tuners)[0] == everywhere
    assert count(towers(method(at=1)).tuners)[0] < everywhere


@pytest.mark.parametrize("method", [Adapter, Compacter])
def test_places(method):
    for parts in (("atn",), "atn"): line(lambda: method(parts=parts), "'atn'", "attn, mlp", "Did you mean attn")
    line(lambda: method(towers="image"), "'image'", "visual, text")
    line(lambda: method(towers=["visual", "visual"]), "once")
    line(lambda: method(parts=()), "at least one")
    for wrong in (None, 5, ["x" * 10**4]): line(lambda: method(parts=wrong), "attn, mlp")
    for wrong in (0, -1, 8., True, None, "8", torch.zeros(30, 30)): line(lambda: method(width=wrong), "width is", "whole number")


def test_sizes():
    line(lambda: towers(Compacter(16, 5, 2)), "32", "n = 5")
    line(lambda: towers(Compacter(18, 4, 2)), "18", "n = 4")
    for sizes in (dict(n=0), dict(n=2.), dict(rank=0)): line(lambda: Compacter(**sizes), *sizes)
    for sizes in ((0, 8, 4, 1), (8, 8, 0, 1), (8, 8, 4, 0), (8, 8, -2, 1)): line(lambda: PHM(*sizes), "whole number")
    line(lambda: Rule(0), "n is 0")
    for rank in (-1, 0, 1.5): line(lambda: LoRA(rank), f"rank is {rank}")
    line(lambda: LowRank(torch.zeros(4, 4), slice(None), 0), "rank is 0")
    for alpha in (0, -1, "x", True, 1j, float("nan"), float("inf")): line(lambda: LoRA(2, alpha=alpha), "alpha is", "above 0")
    line(lambda: LoRA(2, "qx"), "'x'", "q, k, v, o")
    line(lambda: LoRA(2, 5), "projection 5")
    for nothing in ("", None): line(lambda: LoRA(2, nothing, nothing), "nothing")
    line(lambda: LoRA(2, "qq"), "once")
    line(lambda: Bridger(20), "20", "8 heads")
    line(lambda: Bridger(16, 0), "heads is 0")
    for steps, words in ((2, "2 steps"), (1, "1 step;")): line(lambda: towers(Bridger(), visual=2, text=steps), "three stages", words)
    line(lambda: Listen(6, 4), "6", "4 heads")
    line(lambda: Listen(6, 0), "heads is 0")
    v, t = torch.randn(2, 4, 8), torch.randn(2, 3, 8)
    line(lambda: Bridge(8, 8, 8, 2, first=False)(v, t, None), "in order")
    line(lambda: Bridge(8, 8, 8, 2)(v, t, None, (v, t)), "in order")


@methods
def test_a_tuner_serves_one_model(method):
    tuner = METHODS[method]()
    model = towers(tuner)
    mine = {id(p) for p in tuner.parameters()}
    line(lambda: towers(tuner), type(tuner).__name__, "attached already", "new one")
    assert {id(p) for p in model.tuners.parameters()} == mine
    line(lambda: towers(*[METHODS[method]()] * 2), "attached already")


def test_towers_carry_one_lora():
    model = towers(LoRA(2))
    line(lambda: DualEncoder(model.visual, model.text, [LoRA(2)]), "tuned already", "anew")
    line(lambda: towers(LoRA(2), LoRA(2)), "tuned already")
    line(lambda: towers(LoRA(2, "q", ""), LoRA(2, "v", "")), "packed", "one LoRA")


# ---------------------------------------------------------------------------------------------------------------- parity
def published(state):
    "A packed attention's names to ours."
    w, b = state["multihead_attn.in_proj_weight"], state["multihead_attn.in_proj_bias"]
    d = w.shape[1]
    return {"q.weight": w[:d], "q.bias": b[:d], "kv.weight": w[d:], "kv.bias": b[d:],
            "out.weight": state["multihead_attn.out_proj.weight"], "out.bias": state["multihead_attn.out_proj.bias"]}


@pytest.mark.skipif(not GOLDEN.is_file(), reason=f"{GOLDEN} is missing: stored output of the published module")
def test_interaction_equals_the_published_one():
    with np.load(GOLDEN) as z: stored = {k: torch.from_numpy(z[k]) for k in z.files}
    listen = Listen(16, 4).eval()
    listen.load_state_dict(published({k[3:]: v for k, v in stored.items() if k.startswith("sd/")}))
    with torch.no_grad(): ours = listen(stored["tgt"].transpose(0, 1), stored["memory"].transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(ours, stored["output"], atol=1e-5, rtol=1e-5)
