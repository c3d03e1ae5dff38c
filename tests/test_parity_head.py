"The head, the loss, the flow and the value-supplemented attention against stored outputs of the published modules."
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from barleria_nb.gst import GSTAttention
from barleria_nb.head import Decoder, Gate, Head, Neck, Projector, coordinates, sine_1d, sine_2d
from barleria_nb.loss import batch_iou, resize_target, text_to_pixel_loss
from common import close, load

SHARED = Path(__file__).resolve().parents[2] / "shared"
GOLDEN = SHARED / "golden" / "barleria"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"{GOLDEN} is missing: stored outputs of the published modules")


def golden(name):
    if not (GOLDEN / f"{name}.npz").is_file(): pytest.skip(f"{GOLDEN / name}.npz is missing")
    with np.load(GOLDEN / f"{name}.npz") as z: arrays = {k: torch.from_numpy(z[k]) for k in z.files}
    return {k: v for k, v in arrays.items() if not k.startswith("sd/")}, {k[3:]: v for k, v in arrays.items() if k.startswith("sd/")}


def renamed(state, table):
    "Published names to ours, the longest fitting prefix of `table` first; nothing is left over."
    prefix = lambda name: max((p for p in table if name.startswith(p)), key=len)
    return {table[prefix(k)] + k[len(prefix(k)):]: v for k, v in state.items()}


def gate_state(state, old, new):
    "Of a packed attention keep the value rows and the output map: query and key cannot act on a single key."
    width = len(state[f"{old}out_proj.bias"])
    return {f"{new}value.weight": state[f"{old}in_proj_weight"][2 * width:], f"{new}value.bias": state[f"{old}in_proj_bias"][2 * width:],
            f"{new}out.weight": state[f"{old}out_proj.weight"], f"{new}out.bias": state[f"{old}out_proj.bias"]}


def neck_state(state):
    table = {"txt_proj": "text", "f3_proj": "levels.0", "f4_proj": "levels.1", "f5_proj": "levels.2", "aggr": "join",
             "coordconv.0.conv1": "coord.conv", "coordconv.1": "smooth"}
    ours = renamed({k: v for k, v in state.items() if not k.startswith("fusion")}, table)
    ours["levels.2.0.weight"] = ours["levels.2.0.weight"].transpose(0, 1)  # a transposed convolution stores (in, out)
    for i, f in enumerate(("fusion3", "fusion4", "fusion5")): ours |= gate_state(state, f"{f}.multihead_attn.", f"gates.{i}.")
    return ours


def decoder_state(state, layers):
    inside = {"self_attn_norm": "norm_a", "cross_attn_norm": "norm_b", "self_attn.": "cells.", "multihead_attn.": "words.", "ffn.": "mlp.",
              "norm1": "norm1", "norm2": "norm2", "norm3": "norm3"}
    return renamed(state, {"norm.": "norm."} | {f"layers.{i}.{a}": f"layers.{i}.{b}" for i in range(layers) for a, b in inside.items()})


def projector_state(state): return renamed(state, {"vis.1": "wide", "vis.3": "narrow", "vis.4": "last", "txt": "text"})


def test_neck():
    a, state = golden("neck_vit")
    neck = load(Neck((24, 24, 16), text=16, width=16), neck_state(state))
    t = neck.text(a["state"])
    close(t, a["mid/txt_proj"][0])
    taps = [a["v3"], a["v4"], a["v5"]]
    levels = [level(v) for level, v in zip(neck.levels, taps)]
    gated = [gate(v, t) for gate, v in zip(neck.gates, levels)]
    for i, (level, gate) in enumerate(zip(levels, gated), 3):
        close(level, a[f"mid/f{i}_proj"])
        close(gate.flatten(2).permute(2, 0, 1), a[f"mid/fusion{i}"])
    close(neck.join(torch.cat(gated, 1)), a["mid/aggr"])
    close(coordinates(6, 6).permute(2, 0, 1), a["coord_xy_6x6"])
    close(neck(taps, a["state"]), a["output"])


def etris():
    "The released neck of ETRIS, the ancestor of DCRIS's and DETRIS's: DETRIS adds the sum round the coordinate convolutions."
    path = SHARED / "golden" / "dcris" / "neck_etris_small.npz"
    if not path.is_file(): pytest.skip(f"{path} is missing")
    with np.load(path) as z: arrays = {k: torch.from_numpy(z[k]) for k in z.files if k != "ctor_args"}
    return arrays, {k[2:]: v for k, v in arrays.items() if k.startswith("w.")}


def written_neck(state, taps, sentence):
    "The released neck in PyTorch's own operations, up to the joined map, and behind the coordinates."
    def unit(name, x, conv=nn.functional.conv2d, **more):
        w = {k[len(name) + 1:]: v for k, v in state.items() if k.startswith(name + ".")}
        y = conv(x, w["0.weight"], **more)
        return nn.functional.batch_norm(y, w["1.running_mean"], w["1.running_var"], w["1.weight"], w["1.bias"]).relu()

    t = sentence @ state["txt_proj.weight"].T + state["txt_proj.bias"]
    fused = []
    for n, v in zip("345", taps):
        v, mha = unit(f"f{n}_proj", v, nn.functional.conv_transpose2d if n == "5" else nn.functional.conv2d), nn.MultiheadAttention(16, 4, batch_first=True)
        mha.load_state_dict({k[len(f"fusion{n}.multihead_attn."):]: w for k, w in state.items() if k.startswith(f"fusion{n}.multihead_attn.")})
        cells = v.flatten(2).mT
        fused.append((cells * mha(cells, t[:, None], t[:, None])[0]).mT.view_as(v))
    joined = unit("aggr", torch.cat(fused, 1))
    b, _, h, w = joined.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
    placed = unit("coordconv.0.conv1", torch.cat((joined, x.expand(b, 1, h, w), y.expand(b, 1, h, w)), 1), padding=1)
    return joined, unit("coordconv.1", placed, padding=1)


def test_neck_with_and_without_the_residual():
    "Without it ETRIS's stored output; with it (DETRIS) the sum, by another road. Same names, same numbers, on 5 × 4 cells."
    a, state = etris()
    taps, made = [a["v3"], a["v4"], a["v5"]], {}
    for residual in (False, True): made[residual] = load(Neck((24, 24, 40), text=40, width=16, residual=residual), neck_state(state))(taps, a["state"])
    joined, y = written_neck(state, taps, a["state"])
    close(made[False], a["y"]); close(y, a["y"])
    close(made[True], (a["y"] + joined).detach())
    assert joined.max() > .1


def test_residual_of_the_head():
    "It reaches the neck, adds no number and is off unless asked for: then nothing changes, bit for bit."
    heads, inputs = {}, ([torch.randn(2, 24, 3, 4) for _ in range(3)], torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 12))
    for name, more in dict(default={}, off=dict(residual=False), on=dict(residual=True)).items():
        torch.manual_seed(0)
        heads[name] = Head((24, 24, 24), 16, 12, width=16, heads=4, ffn=16, layers=1, **more).eval()
    states = [h.state_dict() for h in heads.values()]
    for other in states[1:]: assert states[0].keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in states[0].items())
    out = {k: h(*inputs) for k, h in heads.items()}
    assert torch.equal(out["default"], out["off"]) and not torch.allclose(out["default"], out["on"])


def test_single_key_attention_is_the_gate():
    a, state = golden("neck_crossattn_single_key")
    gate = load(Gate(16), gate_state(state, "multihead_attn.", ""))
    ours = gate(a["tgt"].permute(1, 2, 0)[..., None], a["memory"][0])
    close(ours[..., 0].permute(2, 0, 1), a["output"])


@pytest.mark.parametrize("layers", [1, 3])
def test_decoder(layers):
    a, state = golden(f"decoder_{layers}layer")
    decoder = load(Decoder(16, heads=4, ffn=32, layers=layers), decoder_state(state, layers))
    P, Q = sine_2d(5, 7, 16), sine_1d(9, 16)
    close(P, a["pos2d_hw_1_c"][:, 0]); close(Q, a["pos1d_l_1_c"][:, 0])
    x, mask = a["vis"].flatten(2).transpose(1, 2), ~a["pad_mask"]
    for layer, want in zip(decoder.layers, a["layer_outputs_hw_b_c"]):
        x = layer(x, P, a["txt"], Q, mask)
        close(x.transpose(0, 1), want)
    close(decoder(a["vis"], a["txt"], mask).flatten(2), a["output"])


def test_three_layers_by_hand():
    "The published layer written out with PyTorch's own attention, three times, on random weights."
    torch.manual_seed(0)
    ours = Decoder(16, heads=4, ffn=32, layers=3).eval()
    for p in ours.parameters(): p.data += .1 * torch.randn_like(p)
    grid, w, mask = torch.randn(2, 16, 5, 7), torch.randn(2, 9, 16), torch.arange(9) < torch.tensor([[9], [4]])

    def attend(m, q, k, v, pad=None):
        mha = nn.MultiheadAttention(16, 4, batch_first=True).eval()
        mha.load_state_dict(m.state_dict())
        return mha(q, k, v, key_padding_mask=pad, need_weights=True)[0]

    x, P, Q = grid.flatten(2).transpose(1, 2), sine_2d(5, 7, 16), sine_1d(9, 16)
    for l in ours.layers:
        x = x + l.norm_a(attend(l.cells, l.norm1(x) + P, l.norm1(x) + P, l.norm1(x)))
        x = x + l.norm_b(attend(l.words, l.norm2(x) + P, w + Q, w, ~mask))
        up, _, _, norm_c, down = l.mlp
        x = x + down(norm_c(up(l.norm3(x)).relu()))
    close(ours(grid, w, mask).flatten(2), ours.norm(x).transpose(1, 2).detach())


def test_projector():
    a, state = golden("projector")
    projector = load(Projector(text=12, width=16, out=8, kernel=3), projector_state(state))
    close(projector.grow(a["x"]), a["mid_vis"])
    close(projector.text(a["word"]), a["mid_txt"])
    close(nn.functional.interpolate(a["x"], scale_factor=2, mode="bilinear", align_corners=False), a["mid_up2x"])
    close(projector(a["x"], a["word"]), a["output"])


def test_loss():
    a, _ = golden("loss")
    close(resize_target(a["mask"], (10, 10)), a["mask_resized"])
    close(text_to_pixel_loss(a["pred_logits"], a["mask"]), a["loss"])


def test_training_metric():
    a, _ = golden("loss")
    iou = batch_iou(a["pred_logits"], a["mask"], threshold=.35)
    close(100 * iou.mean(), a["train_iou_percent"])
    close(100 * (iou > .5).float().mean(), a["train_pr50_percent"])


def test_value_supplement():
    a, state = golden("td_attention")
    attention = GSTAttention(24, heads=3)
    width = 24  # the published code passes the supplement through the value rows once more; the paper gives it a matrix of its own
    load(attention, state | {"prior.weight": state["qkv.weight"][2 * width:], "prior.bias": state["qkv.bias"][2 * width:]})
    close(attention(a["x"], None), a["output_no_td"])
    close(attention(a["x"], a["td"]), a["output_td"])


def flow_state(arrays, group):
    "The flow's parameters, or their gradients, in our names: one affine map, and the planar steps stacked."
    pick = lambda k: arrays[f"{group}/{k}"]
    steps = lambda k: torch.stack([pick(f"transforms.{i}.{k}").flatten() for i in range(4)])
    return dict(mu=pick("affine_transform.mu"), s=pick("affine_transform.logsigma"), w=steps("weight"), u=steps("scale"), b=steps("bias")[:, 0])


@pytest.mark.parametrize("group, out", [("init", "output_at_init"), ("sd", "output")])
def test_flow(group, out):
    from barleria_nb.snf import AffinePlanarFlow
    a, state = golden("flow")
    a |= {f"sd/{k}": v for k, v in state.items()}
    flow = load(AffinePlanarFlow(16, length=4), flow_state(a, group))
    x = a["input"].clone().requires_grad_()
    y = flow(x)
    close(y, a[out])
    if group == "init": return
    y.square().sum().backward()
    close(x.grad, a["grad_input"])
    for k, want in flow_state(a, "grad").items(): close(getattr(flow, k).grad, want)


def test_published_head_names():
    "Every head name of the published stored names goes somewhere, and fills a head completely."
    _, neck = golden("neck_vit"); _, decoder = golden("decoder_1layer"); _, projector = golden("projector")
    state = ({f"neck.{k}": v for k, v in neck_state(neck).items()} | {f"decoder.{k}": v for k, v in decoder_state(decoder, 1).items()}
             | {f"projector.{k}": v for k, v in projector_state(projector).items()})
    head = Head((24, 24, 16), text_width=16, joint=16, width=16, heads=4, ffn=32, layers=1)
    head.projector = Projector(text=12, width=16)
    load(head, state)


def test_head_counts():
    with torch.device("meta"): base, large = Head((768, 768, 512), 512, 512), Head((1024, 1024, 768), 768, 768)
    n = lambda m: sum(p.numel() for p in m.parameters())
    assert base.published_count == 9_983_488 + 7_899_136 + 4_788_737 == 22_671_361
    assert n(base) == 8_407_552 + 7_899_136 + 4_788_737 == 21_095_425
    assert n(base.words) == 0 and n(large.words) == 768 * 512 + 512
