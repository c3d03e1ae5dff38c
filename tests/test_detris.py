"""DETRIS, the released successor of DCRIS: its text adapter, taps and position table, against stored outputs and by other roads."""
import pytest
import timm
import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from timm.layers import resample_abs_pos_embed
from torch import nn

from barleria_nb.backbones import Block, DualEncoder, TextTower, _dino, _released_positions, build_encoder, build_tiny_clip, text_mask, visual_tower
from barleria_nb.core import count
from barleria_nb.densecross import DenseCross, DenseCrossAdapter
from barleria_nb.detris import ConvBottleneck, ConvTextAdapter
from common import close, line, load
from test_densecross import NAMES, batch, golden, towers

AT = (1, 3, 5)


def ours(state, prefix=""):
    "Published names to ours."
    table = {k: v for k, v in NAMES.items() if "cross" not in k}
    new = {}
    for k, v in state.items():
        if not k.startswith(prefix): continue
        k = k[len(prefix):]
        old = next(p for p in table if k.startswith(p))
        new[table[old] + k[len(old):].replace("conv.", "0.").replace("bn.", "1.")] = v
    return new


class Written(nn.Module):
    "The text adapter written out from its published names, first token past the convolutions and doubled."
    def __init__(self, state): super().__init__(); self.w = state

    def unit(self, name, x):
        w = {k: self.w[f"{name}.{k}"] for k in ("conv.weight", "conv.bias", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")}
        k, n = w["conv.weight"].shape[-1], x.shape[-1]
        wide = F.pad(x, (k // 2, k // 2))
        y = sum(w["conv.weight"][:, :, i] @ wide[:, :, i:i + n] for i in range(k)) + w["conv.bias"][:, None]
        return F.batch_norm(y, w["bn.running_mean"], w["bn.running_var"], w["bn.weight"], w["bn.bias"], eps=1e-3).relu()

    def forward(self, x): # (B, L, T)
        f = F.linear(x, self.w["D_fc1.weight"], self.w["D_fc1.bias"]).relu()
        g = f[:, 1:].mT
        f1 = self.unit("dense_branch1", g)
        f2 = self.unit("dense_branch2.1", self.unit("dense_branch2.0", torch.cat((g, f1), 1)))
        f3 = self.unit("dense_branch3.1", self.unit("dense_branch3.0", torch.cat((g, f1, f2), 1)))
        return F.linear(torch.cat((2 * f[:, :1], torch.cat((f1, f2, f3), 1).mT + f[:, 1:]), 1), self.w["D_fc2.weight"], self.w["D_fc2.bias"])


# ---------------------------------------------------------------- stored outputs
def test_parity_text_adapter():
    s, a, state = golden("text_adapter_detris_small")
    m = load(ConvBottleneck(s["fc_in_channels"], s["in_channels"]), ours(state))
    close(m(a["x"]), a["y"]); close(m(a["x"]) + a["x"], a["y_skip"])
    close(Written(state)(a["x"]), a["y"])


@pytest.mark.parametrize("road", ["module", "written"])
def test_parity_of_its_place(road):
    "A block of CLIP's text tower: fork before the norm, factor 0.2."
    s, a, state = golden("clip_text_block_small")
    source = ResidualAttentionBlock(s["d_model"], s["n_head"], act_layer=QuickGELU)
    load(source, {k: v for k, v in state.items() if not k.startswith("adapter")})
    block, tuner = Block(source), ConvTextAdapter((0,), s["txt_adapter_dim"])
    m = tuner.make(s["d_model"]) if road == "module" else Written({k[8:]: v for k, v in state.items() if k.startswith("adapter")})
    tuner.adapters = nn.ModuleDict({"0": load(m, ours(state, "adapter.")) if road == "module" else m})
    x = a["x"].transpose(0, 1)
    mask = text_mask(torch.ones(x.shape[:2], dtype=torch.bool))
    close(block(x, mask), a["y_no_adapter"].transpose(0, 1))
    x = x + block.attn(block.norm1(x), None, mask)
    z = block.norm2(x)
    close(x + tuner.branch("text", 0, "mlp", x, z, block.mlp(z), None), a["y"].transpose(0, 1))


# ---------------------------------------------------------------- counts, start
def test_counts():
    m = ConvBottleneck(512)
    parts = {n: count(p)[0] for n, p in [("down", m.down), ("one", m.dense.one), ("three", m.dense.three), ("five", m.dense.five), ("up", m.up)]}
    assert parts == dict(down=32_832, one=2_144, three=636, five=828, up=33_280)
    assert count(m) == (69_720,) * 2 and count(m)[0] + count(DenseCrossAdapter(768, 512))[0] == 452_616
    with torch.device("meta"): encoder = build_encoder("detris-b14", [DenseCross(), ConvTextAdapter()], pretrained=False)
    assert [count(t)[1] for t in encoder.tuners] == [2_297_376, 418_320] and 2_297_376 + 418_320 == 2_715_696


def test_start():
    "Every linear map and convolution as PyTorch draws it: uniform, 1 / √fan-in wide."
    torch.manual_seed(0)
    for m in ConvBottleneck(512).modules():
        if isinstance(m, (nn.Linear, nn.Conv1d)):
            bound = m.weight[0].numel()**-.5
            assert .8 * bound < m.weight.abs().max() <= bound and m.bias.abs().max() > 0


# ---------------------------------------------------------------- in the tower
def shaken(tuner, seed=0):
    encoder = towers("dino", [tuner])
    torch.manual_seed(seed)
    for p in encoder.tuners.parameters(): p.data += .1 * torch.randn_like(p)
    return encoder.eval()


def test_later_words_are_heard_three_tokens_back_but_not_by_the_start_token():
    encoder, (image, ids, words) = shaken(ConvTextAdapter((5,), 64)), batch(lengths=(9, 9, 9))
    changed = ids.clone()
    changed[:, 7] = 2 + (ids[:, 7] - 1) % 38
    with torch.no_grad(): gap = (encoder(image, ids, words).words - encoder(image, changed, words).words).abs().amax((0, 2))
    assert gap[:4].max() == 0 and gap[4:].min() > 1e-9


@pytest.mark.parametrize("at, heard", [((5,), 3), ((1, 4), 6)])
def test_padding_is_heard_three_tokens_far(at, heard):
    encoder, sentences = shaken(ConvTextAdapter(at, 64)), []
    image, ids, words = (x[:1] for x in batch(lengths=(5,), length=5))
    for n in range(12):
        with torch.no_grad(): sentences.append(encoder(image, F.pad(ids, (0, n)), F.pad(words, (0, n))).sentence)
    gap = [(s - sentences[-1]).abs().max().item() for s in sentences]
    assert gap[0] > 1e-3 and gap[heard - 1] > 1e-11 and max(gap[heard:]) < 1e-13


def test_batch_mates_do_not_matter():
    encoder, (image, ids, words) = shaken(ConvTextAdapter(AT, 32)), batch()
    with torch.no_grad():
        every = encoder(image, ids, words)
        for b in range(3):
            one = encoder(image[b:b + 1], ids[b:b + 1], words[b:b + 1])
            torch.testing.assert_close(one.words, every.words[b:b + 1], rtol=0, atol=1e-11)
            torch.testing.assert_close(one.taps, [x[b:b + 1] for x in every.taps], rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_sentence_of_one_word_is_enough_to_train(dtype):
    encoder = towers("dino", [ConvTextAdapter(AT, 16)], dtype)
    image, ids, words = (x[:1] for x in batch(dtype, lengths=(3,), length=3))
    out = encoder(image, ids, words).sentence
    out.square().sum().backward()
    assert out.dtype == dtype and all(p.grad.isfinite().all() for p in encoder.tuners.parameters())


def test_every_number_trains():
    "Except the biases that BatchNorm takes off; the towers stay frozen, running statistics are stored."
    encoder = towers("dino", [ConvTextAdapter(AT, 64)])
    out = encoder(*batch())
    (out.words * out.mask[..., None] * torch.randn(out.words.shape, dtype=torch.float64)).sum().backward()
    still = {n for n, p in encoder.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    before_norm = {n for n, _ in encoder.named_parameters() if ".dense." in n and n.endswith(("one.0.bias", "0.0.bias", "1.0.bias"))}
    assert still == {n for n, _ in encoder.named_parameters() if not n.startswith("tuners.")} | before_norm and len(before_norm) == 5 * len(AT)
    assert all(b.abs().max() > 0 for n, b in encoder.tuners.state_dict().items() if n.endswith("running_mean"))


def test_mistakes():
    line(lambda: ConvBottleneck(512, 40), "40", "multiple of 16")
    line(lambda: towers("clip", [ConvTextAdapter(AT, 8)]), "multiple of 16")
    line(lambda: towers("clip", [ConvTextAdapter()]), "ConvTextAdapter at block 7 of a tower of 6")
    line(lambda: ConvTextAdapter(3), "ConvTextAdapter at positions 3")


# ---------------------------------------------------------------- taps
@pytest.mark.parametrize("name, taps, plain", [("detris-b14", (4, 8), (3, 7)), ("detris-l14", (8, 16), (7, 15))])
def test_taps_by_name(name, taps, plain):
    with torch.device("meta"):
        assert build_encoder(name, pretrained=False).taps == taps
        assert build_encoder(name.replace("detris", "dino"), pretrained=False).taps == plain


def test_taps_are_those_of_blocks_4_and_8():
    "On twelve tiny blocks: the raw stream behind blocks 4 and 8 (from zero), and the last through the final norm."
    torch.manual_seed(0)
    model, words = build_tiny_clip([1, 2], dict(image_size=32, patch_size=8, width=32, layers=12, heads=2, embed_dim=24, context_length=8)).double().eval(), torch.ones(2, 4, dtype=torch.bool)
    encoder = DualEncoder(visual_tower(model.visual), TextTower(model), taps=(4, 8))
    image, ids = torch.randn(2, 3, 32, 32).double(), torch.ones(2, 4).long()
    with torch.no_grad():
        out, x, streams = encoder(image, ids, words), encoder.visual.embed(image), []
        for block in encoder.visual.blocks: streams.append(x := block(x))
    grid = lambda x: x[:, 1:].mT.unflatten(2, (4, 4))
    for tap, want in zip(out.taps, (streams[4], streams[8], encoder.visual.finish(streams[11]))): torch.testing.assert_close(tap, grid(want), rtol=0, atol=1e-11)


# ---------------------------------------------------------------- position table
def cubic(d):
    "Keys' cubic with a = −0.75, PyTorch's bicubic."
    d = d.abs()
    near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -.75 * (d**3 - 5 * d**2 + 8 * d - 4)
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def rows(new, old, by):
    "The (new, old) matrix that reads row i at (i + ½) / by − ½, beyond the edge the edge itself."
    at = (torch.arange(new, dtype=torch.float64) + .5) / by - .5
    out = torch.zeros(new, old, dtype=torch.float64)
    for k in range(-1, 3):
        j = at.floor() + k
        out[torch.arange(new), j.clamp(0, old - 1).long()] += cubic(at - j)
    return out


def table(side=37, width=3):
    torch.manual_seed(0)
    return torch.randn(1, side * side, width, dtype=torch.float64)


@pytest.mark.parametrize("grid", [(32, 32), (24, 40)])
def test_released_positions_by_hand(grid):
    "Separable, not smoothed, the factor a tenth of a cell too large."
    down, across = (rows(n, 37, (n + .1) / 37) for n in grid)
    want = torch.einsum("ih,jw,hwc->ijc", down, across, table()[0].view(37, 37, 3)).flatten(0, 1)
    torch.testing.assert_close(_released_positions(table(), list(grid))[0], want, rtol=0, atol=1e-6)
    theirs = F.interpolate(table().view(1, 37, 37, 3).permute(0, 3, 1, 2), scale_factor=tuple((n + .1) / 37 for n in grid), mode="bicubic")
    torch.testing.assert_close(_released_positions(table(), list(grid))[0], theirs[0].flatten(1).T, rtol=0, atol=1e-12)


def test_released_positions_differ_from_the_official():
    "About a third on noise, a few percent on a smooth table; timm's is smoothed first."
    def gap(t):
        official, released = resample_abs_pos_embed(t, [32, 32], num_prefix_tokens=0), _released_positions(t, [32, 32])
        assert official.shape == released.shape == (1, 1024, t.shape[-1])
        return ((official - released).norm() / official.norm()).item()
    y, x = torch.meshgrid(*(torch.linspace(0, 3, 37, dtype=torch.float64),) * 2, indexing="ij")
    smooth = torch.stack((y.sin(), (x + y).cos(), (2 * x).sin()), -1).view(1, -1, 3)
    assert .2 < gap(table()) < .5 and 1e-3 < gap(smooth) < .1


def test_a_stored_table_reaches_the_tower_resampled(monkeypatch):
    "Of two readings of one file only the table differs. DINOv2 with one narrow block, so that it is quick."
    make, made = timm.create_model, {}
    monkeypatch.setattr(timm, "create_model", lambda *args, **more: make(*args, **more, embed_dim=24, depth=1, num_heads=2))
    name = "vit_base_patch14_reg4_dinov2"
    state = timm.create_model(name, pretrained=False, num_classes=0).state_dict()
    for released in (False, True): made[released] = _dino(name, 448, state, released).state_dict()
    assert {k for k in state if not torch.equal(made[False][k], made[True][k])} == {"pos_embed"} and state["pos_embed"].shape[1] == 37 * 37
    torch.testing.assert_close(made[True]["pos_embed"], _released_positions(state["pos_embed"], [32, 32]))
    torch.testing.assert_close(made[False]["pos_embed"], resample_abs_pos_embed(state["pos_embed"], [32, 32], num_prefix_tokens=0))
