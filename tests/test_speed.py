"Operations counted by hand, reports written and resumed, ways that compute the same, and mistakes in one line. Nothing here is timed."
import json
import shutil
import threading
from dataclasses import asdict

import pytest
import torch
from common import line
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

from barleria_nb import core, speed
from barleria_nb.backbones import QuickMLP
from barleria_nb.model import build_model, config
from barleria_nb.shapes import make_refshapes
from barleria_nb.training import optimiser, train_step

TINY = config("barleria-tiny", batch=2)


def tower_by_hand(n, guests, d, depth):
    "Forward operations of a tower of `depth` blocks of width d on n tokens, with guests as keys and values."
    m = n + guests
    return depth * (2 * m * d * 3 * d + 2 * 2 * n * m * d + 2 * n * d * d + 16 * n * d * d)


def test_flops_of_the_frozen_towers_are_those_of_the_formula():
    c = config("frozen-tiny")
    with torch.device("meta"), speed.FlopCounterMode(display=False) as counter:
        e = build_model(speed.replace(c, pretrained=False)).eval().encoder
        e(torch.empty(1, 3, 64, 64), torch.empty(1, c.words, dtype=torch.long), torch.ones(1, c.words, dtype=torch.bool))
    d, n, l = 96, 65, c.words
    patches, ends = 2 * 64 * (3 * 8 * 8) * d, 2 * n * d * d + 2 * d * d # patch embedding; projections of image and sentence
    assert counter.get_total_flops() == tower_by_hand(n, 0, d, 6) + tower_by_hand(l, 0, d, 6) + patches + ends


def test_flops_are_proportional_to_the_batch_and_a_step_is_less_than_three_forward_passes():
    forward, step = speed.flops(TINY, 1, backward=False), speed.flops(TINY, 1)
    assert forward < step < 3 * forward and 0 <= 3 * step - speed.flops(TINY, 3) < 1e-3 * step # a few products are of weights alone


@pytest.mark.parametrize("way", sorted(set(speed.WAYS) - {"here"}))
def test_every_way_computes_the_same_and_leaves_no_trace(way):
    def gradient(way):
        model = build_model(TINY)
        with speed.measured(way, model, adam := optimiser(model, 1e-3)):
            train_step(model, speed.random_batch(TINY))[0].backward()
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
            adam.step()
        assert all(g["fused"] is True for g in adam.param_groups)
        return grads, torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    forward = QuickMLP.forward
    (a, x), (b, y) = gradient("here"), gradient(way)
    assert QuickMLP.forward is forward
    assert (a - b).norm() < 1e-4 * a.norm() and (x - y).abs().max() < 2.1e-3 # one step of Adam moves by at most lr
    assert torch.equal(gradient("here")[0], a)


def unlike(t, u):
    "Whether two tensors lie differently in memory."
    return t.shape != u.shape or any(n > 1 and a != b for n, a, b in zip(t.shape, t.stride(), u.stride()))


def test_weights_gradients_and_means_lie_alike_in_every_way_and_after_it():
    model = build_model(TINY)
    adam, batch, seen = optimiser(model, 1e-3), speed.random_batch(TINY), {}
    wide = [p for p in model.head.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    def alike(): return all(not unlike(p, t) for p, kept in adam.state.items() for t in (p.grad, kept["exp_avg"], kept["exp_avg_sq"]))
    for way in ("here", "channels_last", "plain", "channels_last", "here"):
        before = [(kept["exp_avg"].clone(), kept["exp_avg_sq"].clone()) for kept in adam.state.values()]
        with speed.measured(way, model, adam):
            assert alike() and all(p.is_contiguous(memory_format=torch.channels_last) == (way == "channels_last") for p in wide)
            assert all(torch.equal(m, kept["exp_avg"]) and torch.equal(v, kept["exp_avg_sq"]) for (m, v), kept in zip(before, adam.state.values()))
            speed._one_step(model, adam, batch, torch.device("cpu"), "no")
            assert alike()
        assert alike() and all(p.is_contiguous() for p in wide)
    model = build_model(TINY)
    with speed.channels_last(model, adam := optimiser(model, 1e-3)): speed._one_step(model, adam, batch, torch.device("cpu"), "no") # means are made inside
    assert wide and adam.state and alike()


class Count:
    "A step of Adam's that says where it is."
    def __init__(self, device): self.device = str(device)
    def to(self, device): return Count(device)


@pytest.mark.parametrize("way", ["slow_adam", "plain"])
def test_without_fusing_pytorch_chooses_and_adams_steps_are_counted_on_the_cpu(way):
    there, made, idle = (torch.nn.Parameter(torch.zeros(2, device="meta")) for _ in range(3))
    adam = torch.optim.Adam([there, made, idle], fused=True)
    adam.state[there] = dict(step=Count("meta"))
    for _ in range(2):
        with speed.WAYS[way](None, adam):
            assert adam.param_groups[0]["fused"] is adam.param_groups[0]["foreach"] is None and adam.state[there]["step"].device == "cpu"
            adam.state.setdefault(made, dict(step=Count("cpu"))) # as Adam's first step makes it
        assert adam.param_groups[0]["fused"] is True and idle not in adam.state
        assert all(kept["step"].device == "meta" for kept in adam.state.values())


def test_a_profile_counts_a_gpus_time_once():
    event = lambda name, end, kind: FunctionEvent(id=1, name=name, thread=1, start_us=0, end_us=end, use_device="cuda", stack=[], input_shapes=[], device_type=kind)
    product, kernel, small = event("aten::mm", 10, DeviceType.CPU), event("sm90_gemm", 100, DeviceType.CUDA), event("aten::view", 20, DeviceType.CPU)
    product.append_kernel(kernel.name, 0, 100)
    small.thread = 2
    events = EventList([product, kernel, small], use_device="cuda")
    events._build_tree()
    assert speed._operations(events.key_averages(), True) == [("aten::mm", 1e-4, 1), ("aten::view", 0., 1)]
    assert speed._operations(events.key_averages(), False) == [("aten::view", 2e-5, 1), ("aten::mm", 1e-5, 1)]


def test_convolutions_are_measured_without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    speed._made(asdict(TINY), "cpu")
    assert torch.backends.cudnn.allow_tf32 is False


@pytest.mark.skipif(not core.can_onednn(), reason="onednn changes nothing here")
def test_onednn_products_of_any_layout_equal_the_usual_ones():
    g = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(150, 400, generator=g), torch.randn(400, 130, generator=g), torch.randn(130, generator=g)
    pairs = [(a, b), (a, b.t().contiguous().t()), (a.t().contiguous().t(), b), (torch.randn(150, 1200, generator=g).chunk(3, -1)[1], b), (a[:, :1].expand(150, 400), b), (a[::2], b), (a.bfloat16(), b.bfloat16())]
    usual = [(x @ y, torch.addmm(c.to(x.dtype), x, y), torch.addmm(c.to(x.dtype), x, y, alpha=2.)) for x, y in pairs]
    with core.onednn(), torch.inference_mode():
        for (x, y), wanted in zip(pairs, usual):
            found = x @ y, torch.addmm(c.to(x.dtype), x, y), torch.addmm(c.to(x.dtype), x, y, alpha=2.)
            for f, w in zip(found, wanted): torch.testing.assert_close(f, w, rtol=1e-4, atol=1e-3)
        with core.onednn(): inner = a @ b
        assert torch.equal(a @ b, inner) # leaving the inner one changes nothing
    assert torch.equal(a @ b, usual[0][0])


@pytest.mark.skipif(not core.can_onednn(), reason="onednn changes nothing here")
def test_onednn_stays_until_the_last_thread_leaves():
    a, b = torch.randn(300, 300), torch.randn(300, 300)
    usual, inside, left, done = a @ b, threading.Event(), threading.Event(), []
    def other():
        with core.onednn(): inside.set(), left.wait(20), done.append(a @ b)
    thread = threading.Thread(target=other)
    with core.onednn():
        mine = a @ b
        thread.start(), inside.wait(20)
    left.set(), thread.join()
    assert torch.equal(done[0], mine) and torch.equal(a @ b, usual) and not core._users and not core._put


@pytest.mark.skipif(not core.can_onednn(), reason="onednn changes nothing here")
def test_within_onednn_shapes_that_do_not_fit_are_told_as_usual():
    with core.onednn(), pytest.raises(RuntimeError, match="cannot be multiplied"): torch.randn(128, 256) @ torch.randn(200, 128)


def fake(task, **arguments):
    "What a measuring process would say."
    if task == "profile": return dict(total=1., rows=[dict(name="aten::mm", seconds=.5, calls=3)])
    if task == "sentence": return {str(b): dict(seconds=.1, sentences=n, memory=1) for b, n in zip(arguments["batches"], arguments["sentences"])}
    return {w: dict(seconds=2., best=2., all_seconds=[2.], samples_per_second=1., memory=10**9) for w in arguments["ways"]}


@pytest.fixture
def measured(monkeypatch):
    calls = []
    monkeypatch.setattr(speed, "_child", lambda task, **a: calls.append(task) or fake(task, **a))
    monkeypatch.setattr(speed, "flops", lambda config, batch: 10**9 * batch)
    monkeypatch.setattr(speed, "_rates", lambda device, threads: {"no": 1e9, "bf16": 2e9, "copy": 1e9})
    return calls


def test_a_report_is_written_row_by_row_and_resumed(measured, tmp_path, monkeypatch):
    out, told = tmp_path/"deep"/"cpu.json", []
    settings = dict(device="cpu", threads=1, repeats=1, growth=[dict(batch=4)])
    def stop(key):
        told.append(key)
        if len(told) == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): speed.report(out, [TINY], tell=stop, **settings)
    assert [tuple(r["key"]) for r in json.loads(out.read_text())["rows"]] == told[:4]
    kept = speed.report(out, [TINY], **settings)
    keys = [tuple(r["key"]) for r in kept["rows"]]
    assert len(set(keys)) == len(keys) == (14 if shutil.which("g++") or shutil.which("cl") else 12) and keys[:4] == told[:4] and kept == json.loads(out.read_text())
    assert {"hardware", "commit", "torch", "python", "data", "settings", "rates"} <= kept.keys()
    n = len(measured)
    assert speed.report(out, [TINY], **settings) == kept and len(measured) == n
    row = kept["rows"][0]
    assert row["floor"] == row["flops"] / 1e9 and row["share"] == row["floor"] / 2
    table = speed.speed_table(out.parent)
    assert len(table.splitlines()) == 3 and "barleria-tiny" in table and "bf16" in table


def test_a_report_of_other_settings_or_of_another_kind_is_refused_and_kept(measured, tmp_path):
    out = tmp_path/"cpu.json"
    speed.report(out, [TINY], device="cpu", threads=1, repeats=1, precisions=("no",))
    before = out.read_bytes()
    line(lambda: speed.report(out, [TINY], device="cpu", threads=2, repeats=1), "another settings", "choose another file")
    assert out.read_bytes() == before
    kept = json.loads(before)
    for key, said in dict(commit="000000000000", torch="1.0", python="2.7", data="photos: val 3 refs").items():
        out.write_text(json.dumps(kept | {key: said}))
        line(lambda: speed.report(out, [TINY], device="cpu", threads=1, repeats=1), f"another {key} ({said}; now", "choose another file")
    out.write_text(json.dumps({k: v for k, v in kept.items() if k != "data"})) # as reports were before they named it
    line(lambda: speed.report(out, [TINY], device="cpu", threads=1, repeats=1), "another data (not said; now")
    assert len(speed.speed_table(out).splitlines()) == 2
    other = tmp_path/"x.json"
    for text in ("[]", '{"format": "?"}'):
        other.write_text(text)
        line(lambda: speed.report(other, [TINY], device="cpu"), "another kind")
    line(lambda: speed.speed_table(tmp_path/"nowhere"), "no speed report")


def test_a_report_does_not_go_on_with_other_data(measured, tmp_path):
    make_refshapes(tmp_path/"shapes", "refshapes", dict(train=2, val=2), workers=1, progress=False)
    settings = dict(device="cpu", threads=1, repeats=1, precisions=("no",))
    speed.report(tmp_path/"cpu.json", [TINY], **settings)
    line(lambda: speed.report(tmp_path/"cpu.json", [TINY], folder=tmp_path/"shapes", **settings), "another data (refshapes", "now shapes:")


def test_shipped_reports_can_be_read():
    assert all(json.loads(p.read_text())["format"] == speed.REPORT for p in core.asset("results/speed").glob("*.json")) and "barleria-b16" in speed.speed_table(core.asset("results/speed"))


def test_mistakes_end_in_one_line(tmp_path):
    line(lambda: speed.step_speed("barleria-tiny"), "no configuration", "config('barleria-tiny')")
    line(lambda: speed.step_speed(TINY, device="cpu", precision="bf61"), "bf61", "Did you mean bf16")
    line(lambda: speed.step_speed(TINY, device="cpu", precision="fp16"), "needs a GPU")
    line(lambda: speed.step_speed(TINY, device="cpu", threads=0), "threads is 0")
    line(lambda: speed.step_speed(TINY, device="cpu", repeats=0), "repeats is 0")
    line(lambda: speed.step_speed(TINY, device="cpu", ways=("here", "plane")), "plane", "plain")
    line(lambda: speed.step_speed(TINY, device="cpu", ways=()), "no way was named")
    line(lambda: speed.step_profile(TINY, device="gpu"), "gpu")
    line(lambda: speed.sentence_speed(TINY, tmp_path, device="cpu"), "instances.json")
    line(lambda: speed.sentence_speed(TINY, tmp_path, device="cpu", batches=(1,)), "give one number for each batch")
    line(lambda: speed.flops(TINY, 0), "batch is 0")
    line(lambda: speed.flops("tiny"), "no configuration")
    line(lambda: speed.report(tmp_path/"x.json", ["barleria-tyni"], device="cpu"), "barleria-tiny")


def test_a_failed_process_ends_in_one_line():
    line(lambda: speed._child("step", config={}, device="cpu", threads=1, precision="no", recompute=False, compile=False, repeats=1, ways=["here"]), "a measurement failed", "name")


def test_a_real_process_measures_time_and_memory():
    found = speed.step_speed(TINY, device="cpu", threads=1, repeats=1, ways=("here",))["here"]
    assert found["seconds"] > 0 and found["memory"] > 10**8 and found["ratio"] == 1
