"Released checkpoints: the table against the stored lists of names and arrays, the whole model by another road, there and back, and hostile files. Nothing here touches a network."
import io
import json
import pickle
import resource
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import barleria_nb.importing as module
from barleria_nb.backbones import DualEncoder, TextTower, _released_positions, visual_tower, weights_folder
from barleria_nb.baselines import Bridger, Listen
from barleria_nb.densecross import DenseCross, DenseCrossAdapter
from barleria_nb.detris import ConvBottleneck, ConvTextAdapter
from barleria_nb.head import Decoder, Head, Neck, Projector
from barleria_nb.importing import FORMS, RELEASED, check_fit, import_release, misfits, our_state, plan, read_release, release_of, rules, split_class_row, take, to_released
from barleria_nb.model import BACKBONES, RISModel, build_model, config, load_tuned, read_about, towers_hash, tuned_state
from common import line
from test_weights import RAN, Evil, no_network, stand_in # noqa: F401, two of them fixtures

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"
TINY = {"etris-64-tiny": "etris", "detris-tinydino": "detris"}


def skeleton(name):
    with torch.device("meta"): return build_model(config(name, True, pretrained=False))


@torch.no_grad()
def shaken(name, seed=0):
    "A tiny model whose every tuned number is random."
    model = build_model(config(name, True, pretrained=False)).eval()
    g = torch.Generator().manual_seed(seed)
    for n, t in tuned_state(model).items():
        if n.endswith("num_batches_tracked"): t += 3
        elif n.endswith("running_var"): t.copy_(.5 + torch.rand(t.shape, generator=g))
        else: t += .1 * torch.randn(t.shape, generator=g)
    return model


@pytest.fixture(scope="module")
def models(): return {name: shaken(name) for name in TINY}


@pytest.fixture(scope="module")
def released(models): return {name: to_released(m) for name, m in models.items()}


def saved(state, path, wrap=True, **kw):
    torch.save(dict(epoch=1, best_iou=.5, optimizer=dict(state={0: dict(step=torch.tensor(1.))}), state_dict={f"module.{k}": v for k, v in state.items()}) if wrap else state, path, **kw)
    return path


def inputs(length=17):
    g = torch.Generator().manual_seed(1)
    words = torch.arange(17) < torch.tensor([length, max(3, length - 5)])[:, None]
    ids = torch.randint(300, 40000, (2, 17), generator=g)
    ids[:, 0] = 49406
    ids[torch.arange(2), words.sum(1) - 1] = 49407
    return torch.randn(2, 3, 64, 64, generator=g), ids * words, words


# ---------------------------------------------------------------- the table
@pytest.mark.parametrize("name", [*TINY, *RELEASED])
def test_bijection(name):
    "Every number of ours has one source; every released number is used once, or is a dead query or key, or the class token's row."
    model = skeleton(name)
    ours, theirs, where = our_state(model), to_released(model), plan(model)
    assert where.keys() == ours.keys() >= tuned_state(model).keys() - {"encoder.text.embedding.table.weight"}
    assert len(set(where.values())) == len(where), "no source is used twice in one form"
    used = {}
    for n, (t, form) in where.items(): used.setdefault(t, []).append(form)
    assert used.keys() == theirs.keys()
    kinds = {tuple(sorted(f)) for f in used.values()}
    assert kinds <= {("",), ("turned",), ("cell",), ("turned cell",), ("v",), ("kv", "q"), ("k", "q", "v")}
    assert {t for t, f in used.items() if f == ["v"]} == {f"neck.fusion{i}.multihead_attn.in_proj_{k}" for i in (3, 4, 5) for k in ("weight", "bias")}
    dead = sum(2 * (g.value.weight.numel() + g.value.bias.numel()) for g in model.head.neck.gates)
    row = model.encoder.visual.width if release_of(model) == "detris" else 0
    count = lambda s: sum(t.numel() for t in s.values())
    assert count(theirs) == count(ours) + dead + row


@pytest.mark.parametrize("name", TINY)
def test_every_number_is_taken_once(models, name):
    "With the numbers numbered. (The class token's row is zero here, so the token itself counts.)"
    model, start, state = models[name], 0, {}
    for n, t in to_released(model).items(): state[n] = torch.arange(start, start := start + t.numel()).view(t.shape)
    taken = torch.cat([FORMS[form](state[t][:, 1:] if t == "dinov2.pos_embed" else state[t]).flatten() for t, form in plan(model).values()])
    times = torch.bincount(taken, minlength=start)
    for n, t in state.items():
        if "neck.fusion" in n and "in_proj" in n: times[t[:2 * len(t) // 3].flatten()] += 1
        if n == "dinov2.pos_embed": times[t[:, :1].flatten()] += 1
    assert times.min() == times.max() == 1


def names(path):
    if not path.is_file(): pytest.skip(f"{path} is missing: released names and shapes")
    return {n: tuple(s) for n, s in json.loads(path.read_text())["names"]}


def clip(text, layers, joint, length, words, **vision):
    return open_clip.CLIP(joint, open_clip.CLIPVisionCfg(layers=layers, head_width=16, **vision), open_clip.CLIPTextCfg(context_length=length, vocab_size=words, width=text, heads=4, layers=layers), quick_gelu=True)


def listed(release):
    "A model of the sizes of the stored list of names, without numbers."
    with torch.device("meta"):
        if release == "detris":
            image = timm.models.vision_transformer.VisionTransformer(img_size=518, patch_size=14, embed_dim=48, depth=4, num_heads=4, num_classes=0, reg_tokens=4, no_embed_class=True, init_values=1.)
            words = clip(64, 4, 512, 12, 200, width=32, patch_size=16, image_size=32)
            tuners = [DenseCross((1, 3), 32, (16, 8, 8), (2, 2), 24, 4), ConvTextAdapter((1, 3), 32)]
            encoder = DualEncoder(visual_tower(image), TextTower(words), tuners)
        else:
            both = clip(64, 12, 64, 20, 100, width=64, patch_size=16, image_size=96)
            encoder = DualEncoder(visual_tower(both.visual), TextTower(both), [Bridger(16, 4)])
        head = Head(encoder.dims, 64, encoder.joint, width=64, heads=4, ffn=96, layers=2, residual=release == "detris")
    return RISModel(encoder, head, config("detris-b14" if release == "detris" else "etris-64-b16"))


def test_names_of_detris():
    "The stored list is the table's, shape for shape."
    stored, ours = names(GOLDEN / "dcris/names_detris.json"), {n: tuple(t.shape) for n, t in to_released(listed("detris")).items() if not n.endswith("num_batches_tracked")}
    assert stored.keys() - ours.keys() == {"txt_backbone.logit_scale", "dinov2.mask_token"} and not ours.keys() - stored.keys()
    assert {n for n in ours if ours[n] != stored[n]} == set()
    found = {n: torch.empty(s, device="meta") for n, s in stored.items()}
    assert not any(misfits(found, listed("detris")).values())


def test_names_of_etris():
    "The stored list has no head; that of DETRIS has, and so has the table."
    stored, ours = names(GOLDEN / "barleria/names_etris.json"), {n: tuple(t.shape) for n, t in to_released(listed("etris")).items() if not n.endswith("num_batches_tracked")}
    assert stored == {n: s for n, s in ours.items() if n.startswith(("backbone.", "bridger."))}
    head = {n for n in names(GOLDEN / "dcris/names_detris.json") if n.startswith(("neck.", "decoder.", "proj."))}
    assert head == ours.keys() - stored.keys()


# ---------------------------------------------------------------- stored arrays, through the table
def golden(path, prefix):
    if not (GOLDEN / path).is_file(): pytest.skip(f"{GOLDEN / path} is missing: stored outputs of the published modules")
    with np.load(GOLDEN / path) as z: arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "ctor_args"}
    return arrays, {k[len(prefix):]: v for k, v in arrays.items() if k.startswith(prefix)}


def filled(part, ours, table, state):
    "Fill a module called `ours…` from released numbers called as the table says."
    new = {}
    for n, t in part.state_dict().items():
        r = max((r for r in table if (ours + n).startswith(r.ours)), key=lambda r: len(r.ours))
        theirs = r.theirs + (ours + n)[len(r.ours):]
        if theirs in state: new[n] = FORMS[r.form](state[theirs])
        else: assert n.endswith("num_batches_tracked"), theirs
    part.load_state_dict(new, strict=False)
    return part.eval()


def close(a, b): torch.testing.assert_close(a.detach(), b, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_stored_head(models, name):
    table = rules(models[name])
    a, state = golden("barleria/neck_vit.npz", "sd/")
    close(filled(Neck((24, 24, 16), 16, 16), "head.neck.", table, {f"neck.{k}": v for k, v in state.items()})([a["v3"], a["v4"], a["v5"]], a["state"]), a["output"])
    a, state = golden("barleria/decoder_1layer.npz", "sd/")
    close(filled(Decoder(16, 4, 32, 1), "head.decoder.", table, {f"decoder.{k}": v for k, v in state.items()})(a["vis"], a["txt"], ~a["pad_mask"]).flatten(2), a["output"])
    a, state = golden("barleria/projector.npz", "sd/")
    close(filled(Projector(12, 16, 8), "head.projector.", table, {f"proj.{k}": v for k, v in state.items()})(a["x"], a["word"]), a["output"])


def test_stored_adapters(models):
    table = rules(models["detris-tinydino"])
    a, state = golden("dcris/dense_aligner_small.npz", "w.")
    m = DenseCrossAdapter(48, 40, 32, (16, 8, 8), (2, 2), 24, 4)
    filled(m, "encoder.tuners.0.adapters.1.", table, {f"dinov2.blocks.1.adapter.{k}": v for k, v in state.items()})
    close(m(a["x"], a["text"], None, (6, 6), 5), a["y"])
    a, state = golden("dcris/text_adapter_detris_small.npz", "w.")
    m = filled(ConvBottleneck(48, 32), "encoder.tuners.1.adapters.1.", table, {f"txt_backbone.transformer.resblocks.1.adapter.{k}": v for k, v in state.items()})
    close(m(a["x"]), a["y"])


@pytest.mark.parametrize("who, there", [("patches", "fusion_v"), ("words", "fusion_t")])
def test_stored_interaction(models, who, there):
    a, state = golden("barleria/etris_interactorT.npz", "sd/")
    m = filled(Listen(16, 4), f"encoder.tuners.0.stages.3.{who}.", rules(models["etris-64-tiny"]), {f"bridger.{there}.1.{k}": v for k, v in state.items()})
    close(m(a["tgt"].transpose(0, 1), a["memory"].transpose(0, 1)).transpose(0, 1), a["output"])


# ---------------------------------------------------------------- the whole model, by another road
class Released:
    "ETRIS's and DETRIS's models on a tiny scale, written out from the released names in PyTorch's own operations."
    heads, patch = 3, 8

    def __init__(self, state, taps=(1, 3)): self.w, self.taps = state, taps
    def linear(self, n, x): return F.linear(x, self.w[n + ".weight"], self.w[n + ".bias"])
    def norm(self, n, x, eps=1e-5): return F.layer_norm(x, x.shape[-1:], self.w[n + ".weight"], self.w[n + ".bias"], eps)
    def bn(self, n, x, eps=1e-5): return F.batch_norm(x, *(self.w[f"{n}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")), eps=eps).relu()
    def has(self, n): return any(k.startswith(n) for k in self.w)

    def attend(self, n, q, k, v, heads, **more):
        mha = nn.MultiheadAttention(q.shape[-1], heads, batch_first=True).eval()
        mha.load_state_dict({k[len(n) + 1:]: t for k, t in self.w.items() if k.startswith(n + ".")})
        return mha(q, k, v, **more)[0]

    def clip_block(self, n, x, mask=None):
        z = self.norm(f"{n}.ln_1", x)
        x = x + self.attend(f"{n}.attn", z, z, z, self.heads, attn_mask=mask)
        u = self.linear(f"{n}.mlp.c_fc", self.norm(f"{n}.ln_2", x))
        y = x + self.linear(f"{n}.mlp.c_proj", u * (1.702 * u).sigmoid())
        return y + .2 * self.text_adapter(f"{n}.adapter", x) if self.has(f"{n}.adapter.") else y

    def dense(self, n, f, conv):
        def unit(n, x): return self.bn(f"{n}.bn", conv(x, self.w[f"{n}.conv.weight"], self.w[f"{n}.conv.bias"], padding=self.w[f"{n}.conv.weight"].shape[-1] // 2), 1e-3)
        f1 = unit(f"{n}.dense_branch1", f)
        f2 = unit(f"{n}.dense_branch2.1", unit(f"{n}.dense_branch2.0", torch.cat((f, f1), 1)))
        f3 = unit(f"{n}.dense_branch3.1", unit(f"{n}.dense_branch3.0", torch.cat((f, f1, f2), 1)))
        return torch.cat((f1, f2, f3), 1) + f

    def text_adapter(self, n, x):
        f = self.linear(f"{n}.D_fc1", x).relu()
        return self.linear(f"{n}.D_fc2", torch.cat((2 * f[:, :1], self.dense(n, f[:, 1:].mT, F.conv1d).mT), 1))

    def image_adapter(self, n, z, words):
        f = self.linear(f"{n}.D_fc1", z).relu()
        front, cells = f[:, :5], f[:, 5:]
        side = int(cells.shape[1]**.5)
        asks = self.linear(f"{n}.cross.image_proj", self.dense(n, cells.mT.unflatten(2, (side, side)), F.conv2d).flatten(2).mT)
        t = self.linear(f"{n}.cross.text_proj", words)
        heard = self.linear(f"{n}.cross.back_proj", self.attend(f"{n}.cross.multihead_attn", asks, t, t, 4))
        return self.linear(f"{n}.D_fc2", torch.cat((2 * front, heard + cells), 1))

    def dino_block(self, n, x, words):
        z = self.norm(f"{n}.norm1", x, 1e-6)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in self.linear(f"{n}.attn.qkv", z).chunk(3, -1))
        y = ((q @ k.mT / q.shape[-1]**.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + self.w[f"{n}.ls1.gamma"] * self.linear(f"{n}.attn.proj", y)
        z = self.norm(f"{n}.norm2", x, 1e-6)
        y = self.linear(f"{n}.mlp.fc2", F.gelu(self.linear(f"{n}.mlp.fc1", z)))
        if self.has(f"{n}.adapter."): y = y + .2 * self.image_adapter(f"{n}.adapter", z, words)
        return x + self.w[f"{n}.ls2.gamma"] * y

    def bridge(self, k, v, t, before):
        n, conv = "bridger", [F.conv2d, F.conv_transpose2d]
        side = int(v.shape[1]**.5)
        grid, flat = lambda x: x.mT.unflatten(2, (side, side)), lambda x: x.flatten(2).mT
        a = flat(self.bn(f"{n}.zoom_in.{k}.1", conv[k == 2](grid(v), self.w[f"{n}.zoom_in.{k}.0.weight"])))
        b = self.linear(f"{n}.linear1.{k}", t)
        if before: a, b = self.norm(f"{n}.ln_v.{k - 1}", a + before[0]), self.norm(f"{n}.ln_t.{k - 1}", b + before[1])
        x, y = a * self.attend(f"{n}.fusion_v.{k}.multihead_attn", a, b, b, 4), b * self.attend(f"{n}.fusion_t.{k}.multihead_attn", b, a, a, 4)
        out = flat(self.bn(f"{n}.zoom_out.{k}.1", conv[k != 2](grid(x), self.w[f"{n}.zoom_out.{k}.0.weight"])))
        return v + out, t + self.linear(f"{n}.linear2.{k}", y), (a, b)

    def head(self, taps, words, sentence, pad, residual):
        fused, t = [], self.linear("neck.txt_proj", sentence)
        for n, v in zip("345", taps):
            v = self.bn(f"neck.f{n}_proj.1", (F.conv_transpose2d if n == "5" else F.conv2d)(v, self.w[f"neck.f{n}_proj.0.weight"]))
            cells = v.flatten(2).mT
            fused.append((cells * self.attend(f"neck.fusion{n}.multihead_attn", cells, t[:, None], t[:, None], 3)).mT.view_as(v))
        joined = self.bn("neck.aggr.1", F.conv2d(torch.cat(fused, 1), self.w["neck.aggr.0.weight"]))
        b, c, h, w = joined.shape
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        m = torch.cat((joined, x.expand(b, 1, h, w), y.expand(b, 1, h, w)), 1)
        for n in ("neck.coordconv.0.conv1", "neck.coordconv.1"): m = self.bn(f"{n}.1", F.conv2d(m, self.w[f"{n}.0.weight"], padding=1))
        m = m + joined if residual else m
        def sines(k, d):
            angle = torch.arange(k)[:, None].double() * 10000.**(-torch.arange(0, d, 2).double() / d)
            return torch.stack((angle.sin(), angle.cos()), -1).flatten(1).float()
        P = torch.cat((sines(w, c // 2).repeat(h, 1), sines(h, c // 2).repeat_interleave(w, 0)), 1)
        x, Q = m.flatten(2).mT, sines(words.shape[1], c)
        for i in range(3):
            n = f"decoder.layers.{i}"
            z = self.norm(f"{n}.norm1", x)
            x = x + self.norm(f"{n}.self_attn_norm", self.attend(f"{n}.self_attn", z + P, z + P, z, 3))
            z = self.norm(f"{n}.norm2", x)
            x = x + self.norm(f"{n}.cross_attn_norm", self.attend(f"{n}.multihead_attn", z + P, words + Q, words, 3, key_padding_mask=pad))
            x = x + self.linear(f"{n}.ffn.4", self.norm(f"{n}.ffn.3", self.linear(f"{n}.ffn.0", self.norm(f"{n}.norm3", x)).relu()))
        m = self.norm("decoder.norm", x).mT.view(b, c, h, w)
        for n in ("proj.vis.1", "proj.vis.3"):
            m = F.interpolate(m, scale_factor=2, mode="bilinear", align_corners=False)
            m = self.bn(f"{n}.1", F.conv2d(m, self.w[f"{n}.0.weight"], padding=1))
        m = F.conv2d(m, self.w["proj.vis.4.weight"], self.w["proj.vis.4.bias"])
        kernel = self.linear("proj.txt", sentence)
        return torch.cat([F.conv2d(a[None], k[:-1].view(1, -1, 3, 3), k[-1:], padding=1) for a, k in zip(m, kernel)])

    @torch.no_grad()
    def __call__(self, image, ids):
        dino = self.has("dinov2.")
        text = "txt_backbone" if dino else "backbone"
        L, ends = ids.shape[1], (torch.arange(len(ids)), ids.argmax(-1))
        t, mask = self.w[f"{text}.token_embedding.weight"][ids] + self.w[f"{text}.positional_embedding"][:L], torch.full((L, L), -torch.inf).triu(1)
        taps, before, k = [], None, 0
        if dino:
            for i in range(6): t = self.clip_block(f"{text}.transformer.resblocks.{i}", t, mask)
            words, n, table = self.norm(f"{text}.ln_final", t), "dinov2", self.w["dinov2.pos_embed"]
            x = F.conv2d(image, self.w[f"{n}.patch_embed.proj.weight"], self.w[f"{n}.patch_embed.proj.bias"], stride=self.patch).flatten(2).mT
            rows = table[:, 1:] if table.shape[1] == 1 + x.shape[1] else _released_positions(table[:, 1:], [8, 8])
            x = torch.cat(((self.w[f"{n}.cls_token"] + table[:, :1]).expand(len(x), -1, -1), self.w[f"{n}.register_tokens"].expand(len(x), -1, -1), x + rows), 1)
            for i in range(6):
                x = self.dino_block(f"{n}.blocks.{i}", x, words)
                if i in self.taps: taps.append(x[:, 5:])
            taps.append(self.norm(f"{n}.norm", x, 1e-6)[:, 5:])
        else:
            n = "backbone.visual"
            x = F.conv2d(image, self.w[f"{n}.conv1.weight"], stride=self.patch).flatten(2).mT
            x = torch.cat((self.w[f"{n}.class_embedding"].expand(len(x), 1, -1), x), 1) + self.w[f"{n}.positional_embedding"]
            x = self.norm(f"{n}.ln_pre", x)
            for i in range(6):
                x, t = self.clip_block(f"{n}.transformer.resblocks.{i}", x), self.clip_block(f"backbone.transformer.resblocks.{i}", t, mask)
                if i in (1, 3, 5):
                    v, t, before = self.bridge(k, x[:, 1:], t, before)
                    x, k = torch.cat((x[:, :1], v), 1), k + 1
                if i in self.taps: taps.append(x[:, 1:])
            taps.append((self.norm(f"{n}.ln_post", x) @ self.w[f"{n}.proj"])[:, 1:])
            words = self.norm("backbone.ln_final", t)
        sentence = words[ends] @ self.w[f"{text}.text_projection"]
        return self.head([x.mT.unflatten(2, (8, 8)) for x in taps], words, sentence, ids == 0, dino)


def random_release(model, seed=3):
    "The released shapes with random numbers for all that is tuned, dead queries and keys included, and the model's own towers."
    g, state, tuned = torch.Generator().manual_seed(seed), {}, tuned_state(model).keys()
    tuned = {theirs for ours, (theirs, _) in plan(model).items() if ours in tuned}
    for n, t in to_released(model).items():
        if n.endswith("num_batches_tracked"): continue
        noise = torch.randn(t.shape, generator=g)
        state[n] = t.clone() if n not in tuned else .5 + torch.rand(t.shape, generator=g) if n.endswith("running_var") else 1 + .1 * noise if t.dim() == 1 and n.endswith("weight") else noise / max(1, t[0].numel())**.5
    if "dinov2.pos_embed" in state: # a row for the class token, which timm folds into it: the sum is the tower's own token
        token = state["dinov2.cls_token"]
        state["dinov2.pos_embed"][:, :1], state["dinov2.cls_token"] = 3 * token, -2 * token
    return state


def aloud(model):
    "Padding is heard, as in the released code."
    model.encoder.padding = True
    if hasattr(model.encoder.tuners[0], "padding"): model.encoder.tuners[0].padding = True
    return model


def alike(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("name", TINY)
def test_imported_model_gives_the_released_answers(models, tmp_path, name):
    "With and without padding; and what is dead may be anything."
    state = random_release(models[name])
    import_release(saved(state, tmp_path/"r.pth"), models[name].config, tmp_path/"o.safetensors")
    model = aloud(load_tuned(tmp_path/"o.safetensors"))
    for length in (17, 9):
        image, ids, words = inputs(length)
        want = Released(state)(image, ids)
        with torch.no_grad(): alike(model(image, ids, words), want)
        assert want.std() > 1e-3
    for i in (3, 4, 5): state[f"neck.fusion{i}.multihead_attn.in_proj_weight"][:192] = 9.
    alike(Released(state)(image, ids), want)


def test_as_configured_it_hears_padding(models):
    "`etris-64` as it is built, with nothing set by hand: exact with padding and without."
    model, state = models["etris-64-tiny"], random_release(models["etris-64-tiny"])
    mine = build_model(model.config).eval()
    mine.load_state_dict(take(state, mine)[0], strict=False)
    for length in (17, 9):
        image, ids, words = (x[:1] for x in inputs(length))
        with torch.no_grad(): gap = (mine(image, ids, words) - (want := Released(state)(image, ids))).norm() / want.norm()
        assert gap < 1e-5


@pytest.fixture(scope="module")
def road(models):
    state, (image, ids, _) = random_release(models["etris-64-tiny"]), inputs()
    image, ids = image[:1], ids[:1]
    return state, image, ids, Released(state)(image, ids)


@pytest.mark.parametrize("part", ["neck.f5_proj.0.weight", "fusion_v.1.multihead_attn.in_proj_weight", "ln_t.0.weight", "zoom_out.1.0.weight", "decoder.layers.1.norm2.bias", "visual.positional_embedding", "proj.txt.bias"])
def test_the_other_road_sees_each_part(road, part):
    "Changed there alone, the answers part: the comparison above is not blind."
    state, image, ids, want = road
    n = next(n for n in state if n.endswith(part))
    assert not torch.allclose(Released(state | {n: state[n].flip(0) + .1})(image, ids), want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_a_native_table_of_positions(models):
    "DETRIS stores DINOv2's 37 × 37 rows and resamples them at each step."
    model = models["detris-tinydino"]
    state = random_release(model)
    native = torch.cat((state["dinov2.pos_embed"][:, :1], .3 * torch.randn(1, 37 * 37, 96)), 1)
    assert not any(misfits(state | {"dinov2.pos_embed": native}, model).values())
    back, (image, ids, words) = aloud(build_model(model.config).eval()), (x[:1] for x in inputs(9))
    back.load_state_dict(take(state | {"dinov2.pos_embed": native}, back)[0], strict=False)
    assert torch.equal(back.encoder.visual.positions, _released_positions(native[:, 1:], [8, 8]))
    want = Released(state | {"dinov2.pos_embed": native})(image, ids)
    with torch.no_grad(): alike(back(image, ids, words), want)


def test_the_class_token_has_a_row():
    "It is split off the table and added to the token, without changing what was given."
    state = {"dinov2.pos_embed": torch.randn(1, 5, 3), "dinov2.cls_token": torch.randn(1, 1, 3)}
    before = {n: t.clone() for n, t in state.items()}
    new = split_class_row(state)
    assert torch.equal(new["dinov2.cls_token"], state["dinov2.cls_token"] + state["dinov2.pos_embed"][:, :1]) and torch.equal(new["dinov2.pos_embed"], state["dinov2.pos_embed"][:, 1:])
    assert all(torch.equal(t, before[n]) for n, t in state.items())


# ---------------------------------------------------------------- there and back
@pytest.mark.parametrize("name, wrap", [("etris-64-tiny", True), ("detris-tinydino", False)])
def test_there_and_back(models, released, tmp_path, name, wrap):
    model, out = models[name], tmp_path/"o.safetensors"
    there = released[name]
    report = import_release(saved(there, tmp_path/"r.pth", wrap), model.config, out)
    back, kept = load_tuned(out), tuned_state(model)
    assert all(torch.equal(t, kept[n]) for n, t in tuned_state(back).items())
    again = to_released(back)
    assert there.keys() == again.keys() and all(torch.equal(t, again[n]) for n, t in there.items())
    about = read_about(out)
    assert about["towers"] == towers_hash(model) and about["extra"]["imported"]["release"] == report["release"] == TINY[name] and report["towers_apart"] == 0
    assert (report["tensors"], report["numbers"]) == (len(kept), sum(t.numel() for t in kept.values()))
    with torch.no_grad(): assert torch.equal(back(*inputs(9)), model(*inputs(9)))


def test_without_counters_and_with_extras(models, released):
    model = models["detris-tinydino"]
    state = {n: t for n, t in released["detris-tinydino"].items() if not n.endswith("num_batches_tracked")} | {"dinov2.mask_token": torch.zeros(1, 96), "txt_backbone.logit_scale": torch.zeros(())}
    assert not any(misfits(state, model).values())
    kept = tuned_state(model)
    for n, t in take(state, model)[0].items(): assert t == 0 if n.endswith("tracked") else torch.equal(t, kept[n])


def test_halves(models, released):
    "bfloat16 is too coarse for the comparison of the towers, half is not."
    model = models["etris-64-tiny"]
    state = lambda dtype: {n: t.to(dtype) if t.is_floating_point() else t for n, t in released["etris-64-tiny"].items()}
    half, kept = state(torch.float16), tuned_state(model)
    assert not any(misfits(half, model).values())
    tuned, apart = take(half, model)
    assert 0 < apart < 1e-3 and all(torch.equal(t, kept[n].half().float() if t.is_floating_point() else kept[n]) for n, t in tuned.items())
    line(lambda: take(state(torch.bfloat16), model), "other towers")
    assert len(misfits(state(torch.float64), model)["of another shape or type"]) > 300


@pytest.fixture
def narrow(monkeypatch, stand_in):
    "The stand-in for b16 with a head as narrow as itself."
    monkeypatch.setitem(BACKBONES, "b16", BACKBONES["b16"] | dict(head=dict(width=16, heads=2, ffn=16)))
    return stand_in


def test_with_published_towers(narrow, tmp_path):
    "The weights in their folder are what a release is compared with, and whose fingerprint the file gets."
    stand_in = narrow
    save_file(stand_in, weights_folder()/"b16.safetensors")
    wanted = config("etris-64-b16", True, pretrained=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build_model(wanted, seed=5)
        with torch.no_grad():
            for n, t in tuned_state(model).items(): t += 0 if n.endswith("tracked") else .01
        state = to_released(model)
        assert torch.equal(state["backbone.visual.conv1.weight"], stand_in["visual.conv1.weight"]) and torch.equal(state["backbone.token_embedding.weight"], stand_in["token_embedding.weight"])
        import_release(saved(state, tmp_path/"r.pth"), wanted, tmp_path/"o.safetensors")
        assert read_about(tmp_path/"o.safetensors")["towers"] == towers_hash(model)
        assert torch.equal(load_tuned(tmp_path/"o.safetensors").encoder.visual.positions, model.encoder.visual.positions)
        save_file({k: t + (.01 if k == "visual.ln_post.bias" else 0) for k, t in stand_in.items()}, weights_folder()/"b16.safetensors")
        line(lambda: import_release(tmp_path/"r.pth", wanted, tmp_path/"p.safetensors"), "other towers", "backbone.visual.ln_post.bias", "published weights")
    assert not (tmp_path/"p.safetensors").exists()


def test_without_published_towers(narrow, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = saved(to_released(build_model(config("etris-64-b16", True))), tmp_path/"r.pth")
    line(lambda: import_release(path, config("etris-64-b16", True, pretrained=True), tmp_path/"o.safetensors"), "no weights for 'b16'", str(weights_folder()/"b16.safetensors"))
    assert not (tmp_path/"o.safetensors").exists()


@pytest.mark.long
@pytest.mark.full
def test_full_size(tmp_path):
    "detris-b14 with random towers, 700 MB: as released, and exact."
    wanted = config("detris-b14", True)
    state = to_released(build_model(wanted, seed=3))
    state["dinov2.pos_embed"] = torch.cat((state["dinov2.pos_embed"][:, :1], torch.randn(1, 37 * 37, 768)), 1)
    import_release(saved(state, tmp_path/"r.pth"), wanted, tmp_path/"o.safetensors")
    back = to_released(load_tuned(tmp_path/"o.safetensors"))
    assert torch.equal(back["dinov2.pos_embed"][:, 1:], _released_positions(state["dinov2.pos_embed"][:, 1:], [32, 32]))
    for n, t in state.items():
        same = slice(2 * len(t) // 3, None) if "neck.fusion" in n and "in_proj" in n else ...
        assert n == "dinov2.pos_embed" or torch.equal(t[same], back[n][same]), n


# ---------------------------------------------------------------- what does not fit
def test_the_list(models, released, tmp_path):
    model, state = models["detris-tinydino"], released["detris-tinydino"]
    bad = {n: t for n, t in state.items() if ".cross." not in n} | {"z": torch.ones(1), "proj.txt.bias": torch.ones(3), "proj.txt.weight": state["proj.txt.weight"].int()}
    found = misfits(bad, model)
    assert found["missing"] == sorted(n for n in state if ".cross." in n) and found["surplus"] == ["z"] and len(found["of another shape or type"]) == 2
    text = line(lambda: import_release(saved(bad, tmp_path/"r.pth"), model.config, tmp_path/"o.safetensors"), "60 missing", "1 surplus (z)", "2 of another shape or type", "proj.txt.bias is (3,) of float32, expected (433,)")
    assert "Give a released checkpoint" in text and not (tmp_path/"o.safetensors").exists()


def test_which_it_would_fit():
    for name, other in (("etris-b16", "etris-64-b16"), ("detris-l14", "detris-b14")):
        line(lambda: check_fit(to_released(skeleton(name)), config(other, True), "r.pth"), f"does not fit '{other}'", f"It fits '{name}'.")
    check_fit(to_released(skeleton("detris-b14")), config("detris-b14", True))


def test_who_has_none(released, tmp_path):
    path = saved(released["etris-64-tiny"], tmp_path/"r.pth")
    line(lambda: import_release(path, config("snf-tiny", True), tmp_path/"o.safetensors"), "'snf-tiny' has no released checkpoints", "detris-l14")
    line(lambda: import_release(path, config("etris-64-tiny"), tmp_path/"o.safetensors"), "position tables", "config('etris-64-tiny', True)")
    line(lambda: import_release(path, config("etris-64-tiny", True), tmp_path/"none"/"o.safetensors"), "no such folder")
    before = path.read_bytes()
    line(lambda: import_release(path, config("etris-64-tiny", True), path), "the checkpoint itself")
    assert path.read_bytes() == before
    line(lambda: import_release(tmp_path/"none.pth", config("etris-64-tiny", True), tmp_path/"o.safetensors"), "none.pth", "No such file")
    line(lambda: import_release(tmp_path, config("etris-64-tiny", True), tmp_path/"o.safetensors"), "cannot be read")


@pytest.mark.parametrize("n, change, says", [("proj.txt.bias", lambda t: t / 0, "cannot be"), ("bridger.zoom_in.1.1.running_var", lambda t: -t, "cannot be"), ("backbone.ln_final.weight", lambda t: t * torch.nan, "other towers"),
    ("backbone.token_embedding.weight", lambda t: t.flip(0), "other towers"), ("neck.fusion3.multihead_attn.in_proj_weight", lambda t: torch.cat((t[:192] * torch.nan, t[192:])), None)])
def test_numbers_that_cannot_be(models, released, n, change, says):
    "What is dead may be anything."
    model, state = models["etris-64-tiny"], released["etris-64-tiny"]
    before = {k: t.clone() for k, t in tuned_state(model).items()}
    call = lambda: take(state | {n: change(state[n])}, model, "r.pth")
    line(call, says, n[-30:], "r.pth") if says else call()
    assert all(torch.equal(t, before[k]) for k, t in tuned_state(model).items())


def test_an_old_file_survives(models, tmp_path):
    model, out = models["etris-64-tiny"], tmp_path/"o.safetensors"
    out.write_bytes(b"precious")
    line(lambda: import_release(saved({"a": torch.ones(1)}, tmp_path/"r.pth"), model.config, out), "does not fit")
    assert out.read_bytes() == b"precious" and [p.name for p in tmp_path.glob("o*")] == ["o.safetensors"]


# ---------------------------------------------------------------- hostile files
def packed(parts, compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as z:
        warnings.simplefilter("ignore")
        for name, data in parts: z.writestr(name, data)
    return file.getvalue()


def torch_bytes(obj, **kw):
    file = io.BytesIO()
    torch.save(obj, file, **kw)
    return file.getvalue()


def patched(obj, old, new):
    "A saved file with its program changed."
    with zipfile.ZipFile(io.BytesIO(torch_bytes(obj))) as z: parts = [(n, z.read(n)) for n in z.namelist()]
    assert sum(old in d for n, d in parts if n.endswith("data.pkl"))
    return packed([(n, d.replace(old, new) if n.endswith("data.pkl") else d) for n, d in parts])


def program(data): return packed([("a/data.pkl", data), ("a/version", b"3\n"), ("a/byteorder", b"little")])


class Calls:
    "Pickled, it calls a function that torch itself would let it call."
    def __init__(self, *reduced): self.reduced = reduced
    def __reduce__(self): return self.reduced


A = {"a": torch.ones(7)}
HUGE = b"J\xff\xff\xff\x7f" # 2^31 − 1
HOSTILE = { # name -> (bytes, what the line says)
    "empty": (lambda: b"", "not a zip file"),
    "text": (lambda: b"<!doctype html><title>not found</title>", "not a zip file"),
    "a bare pickle": (lambda: pickle.dumps(Evil()), "not a zip file"),
    "torch's oldest format": (lambda: torch_bytes(A, _use_new_zipfile_serialization=False), "not a zip file"),
    "an empty archive": (lambda: packed([]), "not one archive of tensors"),
    "no program": (lambda: packed([("a/version", b"3")]), "not one archive of tensors"),
    "two programs": (lambda: packed([("a/data.pkl", pickle.dumps({}, 2)), ("b/data.pkl", pickle.dumps(Evil(), 2))]), "not one archive"),
    "one name twice": (lambda: packed([("a/data.pkl", pickle.dumps({}, 2)), ("a/version", b"3"), ("a/version", b"4")]), "not one archive"),
    "compressed": (lambda: packed([("a/data.pkl", bytes(10**6))], zipfile.ZIP_DEFLATED), "compressed"),
    "TorchScript": (lambda: packed([("a/data.pkl", b""), ("a/constants.pkl", b"")]), "TorchScript"),
    "a long description": (lambda: program(bytes(2**24 + 1)), "too long"),
    "a function of its own": (lambda: torch_bytes({"a": Evil()}), "and nothing in it was run"),
    "beside the tensors": (lambda: torch_bytes(dict(state_dict=A, epoch=Evil())), "and nothing in it was run"),
    "newer pickle": (lambda: torch_bytes({"a": Evil()}, pickle_protocol=4), "asks for STACK_GLOBAL"),
    "oldest instruction": (lambda: program(b"(cos\nsystem\nS'true'\nios\nsystem\n."), "asks for os.system"),
    "an instance": (lambda: program(b"(S'true'\nios\nsystem\n."), "asks for os.system"),
    "a copyreg extension": (lambda: program(b"\x80\x02\x82\x01."), "asks for"),
    "a numpy scalar": (lambda: torch_bytes(dict(state_dict=A, best_iou=np.float64(.5))), "asks for numpy"),
    "all of the memory": (lambda: torch_bytes({"a": Calls(bytearray, (2**40,))}), "asks for __builtin__.bytearray"),
    "a tensor subclass": (lambda: torch_bytes({"a": Calls(torch._tensor._rebuild_from_type_v2, (torch.Tensor, torch.Tensor, (), {}))}), "asks for torch"),
    "sparse": (lambda: torch_bytes({"a": torch.eye(3).to_sparse()}), "asks for torch"),
    "meta": (lambda: torch_bytes({"a": torch.ones(2, device="meta")}), "asks for torch"),
    "quantised": (lambda: torch_bytes({"a": torch.quantize_per_tensor(torch.ones(2), .1, 0, torch.qint8)}), "asks for torch"),
    "complex": (lambda: torch_bytes({"a": torch.ones(2, dtype=torch.complex64)}), "asks for torch.ComplexFloatStorage"),
    "no program at all": (lambda: program(b""), "cannot be read"),
    "program cut short": (lambda: program(pickle.dumps({"a": 1}, 2)[:-3]), "cannot be read"),
    "garbage": (lambda: program(bytes(range(256))), "cannot be read"),
    "deeply nested": (lambda: program(b"\x80\x02" + b"(" * 10**5 + b"t" * 10**5 + b"."), ""),
    "nested lists": (lambda: program(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."), ""),
    "a dictionary in itself": (lambda: program(b"\x80\x02}q\x00X\x0a\x00\x00\x00state_dicth\x00s."), "no list of named tensors"),
    "cut in half": (lambda: (b := torch_bytes(dict(state_dict=A)))[:len(b) // 2], "not a zip file"),
    "a storage that is not there": (lambda: packed([("a/data.pkl", zipfile.ZipFile(io.BytesIO(torch_bytes(A))).read("archive/data.pkl")), ("a/version", b"3\n"), ("a/byteorder", b"little")]), "cannot be read"),
    "a list": (lambda: torch_bytes([torch.ones(2)]), "no list of named tensors"),
    "one tensor": (lambda: torch_bytes(torch.ones(2)), "no list of named tensors"),
    "nothing": (lambda: torch_bytes({}), "no list of named tensors"),
    "an empty state": (lambda: torch_bytes(dict(state_dict={})), "no list of named tensors"),
    "numbers for names": (lambda: torch_bytes({1: torch.ones(2)}), "no list of named tensors"),
    "more than tensors": (lambda: torch_bytes({"a": torch.ones(2), "b": 3}), "no list of named tensors"),
    "a tensor larger than its bytes": (lambda: patched(A, b"K\x07\x85", HUGE + b"\x85"), ""),
    "a tensor beyond its bytes": (lambda: patched(A, b"K\x00K\x07\x85", HUGE + b"K\x07\x85"), ""),
    "a storage larger than the file": (lambda: patched(A, b"K\x07tq", HUGE + b"tq"), ""),
    "both larger": (lambda: patched(A, b"K\x07", HUGE), ""),
    "a negative step": (lambda: patched(A, b"K\x01\x85", b"J\xff\xff\xff\xff\x85"), "cannot be read"),
    "a negative size": (lambda: patched(A, b"K\x07\x85", b"J\xff\xff\xff\xff\x85"), "cannot be read"),
    "a negative start": (lambda: patched(A, b"K\x00K\x07\x85", b"J\xff\xff\xff\xffK\x07\x85"), "cannot be read"),
    "every number the same one": (lambda: patched(A, b"K\x07\x85q\x08K\x01\x85", HUGE + b"\x85q\x08K\x00\x85"), "does not fit"),
    "a name of a megabyte": (lambda: torch_bytes({"!" * 10**6: torch.ones(1)}), "does not fit"),
    "a name with lines": (lambda: torch_bytes({"a\nb\x1b[2J": torch.ones(1)}), "does not fit"),
    "another model": (lambda: torch_bytes(nn.Linear(3, 3).state_dict()), "does not fit"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile(tmp_path, case):
    make, says = HOSTILE[case]
    path = tmp_path/"r.pth"
    path.write_bytes(make())
    start, before = time.time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = line(lambda: import_release(path, config("etris-64-tiny", True, pretrained=False), tmp_path/"o.safetensors"), str(path), says)
    assert not RAN.exists(), "nothing was run"
    assert not (tmp_path/"o.safetensors").exists() and "torch.load" not in text
    assert time.time() - start < 20 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 5e5, "half a gigabyte at most"


def test_broken_bytes(tmp_path):
    "Bytes changed at random: tensors, or one line; nothing else."
    good, draw, refused = torch_bytes(dict(state_dict={"module.a": torch.ones(3, 2), "module.b": torch.zeros(2).half()}, epoch=1)), np.random.default_rng(0), 0
    for _ in range(150):
        bad = bytearray(good)
        for i in draw.integers(0, len(good), 1 + draw.integers(4)): bad[i] = draw.integers(256)
        (tmp_path/"r.pth").write_bytes(bad)
        try: found = read_release(tmp_path/"r.pth")
        except module.BarleriaError as e: refused += 1; assert "\n" not in str(e) and len(str(e)) < 500
        else: assert all(float(t.double().sum()) is not None for t in found.values())
    assert 10 < refused < 150 and not RAN.exists()


def test_what_training_leaves_is_read(tmp_path):
    "Optimiser and schedule as PyTorch stores them."
    m = nn.Linear(2, 2)
    optimiser = torch.optim.Adam(m.parameters())
    m(torch.ones(1, 2)).sum().backward(); optimiser.step()
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [35], .1)
    torch.save(dict(epoch=1, cur_iou=.5, best_iou=.5, prec={"Pr@50": .7}, state_dict=nn.DataParallel(m).state_dict(), optimizer=optimiser.state_dict(), scheduler=schedule.state_dict()), tmp_path/"r.pth")
    found = read_release(tmp_path/"r.pth")
    assert found.keys() == {"weight", "bias"} and torch.equal(found["weight"], m.weight)
    torch.save(dict(state_dict=dict(m.named_parameters())), tmp_path/"p.pth")
    assert torch.equal(read_release(tmp_path/"p.pth")["weight"], m.weight)


def test_names_are_shortened_at_their_start_and_say_so():
    "The longest that fits is printed whole."
    for n in range(40, 60):
        name = "abcdefghij" * 6
        shown = module._end(name[:n])
        assert shown == name[:n] or shown[0] == "…" and name[:n].endswith(shown[1:])
