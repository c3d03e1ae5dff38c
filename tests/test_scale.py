"Batch normalisation over processes, and recomputation: against PyTorch's own, and on whole models."
import copy

import pytest
import torch
from torch import nn

from barleria_nb.head import conv_layer
from barleria_nb.loss import text_to_pixel_loss
from barleria_nb.model import build_model, config
from barleria_nb.scale import SharedNorm, compiled, computing, share_norms, spread, still
from barleria_nb.training import optimiser
from common import line

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


@pytest.mark.parametrize("dtype,eps", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind,shape", [(nn.BatchNorm1d, (6, 5)), (nn.BatchNorm1d, (4, 5, 7)), (nn.BatchNorm2d, (4, 5, 3, 2)), (nn.BatchNorm1d, (2, 5))])
def test_alone_it_is_batch_norm(kind, shape, dtype, eps):
    "Values, gradients, statistics, types, both modes; after several batches, and with a large mean."
    torch.manual_seed(0)
    theirs = kind(5, eps=1e-3)
    with torch.no_grad(): theirs.weight.uniform_(.5, 2), theirs.bias.normal_()
    if dtype == torch.float64: theirs.double()
    ours = share_norms(nn.Sequential(copy.deepcopy(theirs)))[0]
    assert type(ours) is SharedNorm
    for k in range(3):
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 3).to(dtype)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weigh = torch.randn(shape, dtype=torch.float64).to(dtype)
        y, z = ours(a), theirs(b)
        assert y.dtype == z.dtype == dtype and torch.allclose(y.double(), z.double(), rtol=eps, atol=eps)
        (y * weigh).sum().backward(), (z * weigh).sum().backward()
        assert torch.allclose(a.grad.double(), b.grad.double(), rtol=eps, atol=4 * eps)
    for p, q in zip(ours.parameters(), theirs.parameters()): assert torch.allclose(p.grad.double(), q.grad.double(), rtol=4 * eps, atol=20 * eps)
    for (n, p), (m, q) in zip(ours.state_dict().items(), theirs.state_dict().items()): assert n == m and p.dtype == q.dtype and torch.allclose(p.double(), q.double(), rtol=1e-5, atol=1e-6), n
    assert torch.allclose(ours.eval()(x).double(), theirs.eval()(x).double(), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_gradient_of_the_gradient_check():
    torch.manual_seed(0)
    norm = SharedNorm(3).double().train()
    assert torch.autograd.gradcheck(lambda x, w, b: torch.func.functional_call(norm, dict(weight=w, bias=b), x),
        tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 2), (3,), (3,))))


def test_one_value_per_channel():
    "It has no variance: told, as PyTorch tells it; in evaluation mode it is fine."
    norm = SharedNorm(3)
    line(lambda: norm(torch.randn(1, 3)), "(1, 3)", "larger batch")
    line(lambda: norm.eval()(torch.randn(3)), "no channels")
    assert norm(torch.randn(1, 3)).shape == (1, 3) and norm.num_batches_tracked == 0
    with pytest.raises(ValueError): nn.BatchNorm1d(3)(torch.randn(1, 3))


@pytest.mark.parametrize("name", ["dcris-tiny", "detris-tiny", "barleria-tiny", "adapter-tiny"])
def test_of_a_whole_model(name):
    "None is forgotten; names, numbers, modes and the very objects stay, so an optimiser made before still moves them."
    model = build_model(config(name, pretrained=False)).train()
    adam = optimiser(model, 1e-3)
    names, norms = list(model.state_dict()), {n: (m.training, m.eps, m.momentum) for n, m in model.named_modules() if isinstance(m, NORMS)}
    objects, modes = {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]}, {n: m.training for n, m in model.named_modules()}
    assert share_norms(model) is model and norms
    assert not any(isinstance(m, NORMS) for m in model.modules())
    assert {n: (m.training, m.eps, m.momentum) for n, m in model.named_modules() if isinstance(m, SharedNorm)} == norms
    assert list(model.state_dict()) == names and {n: m.training for n, m in model.named_modules()} == modes
    assert {n: id(t) for n, t in [*model.named_parameters(), *model.named_buffers()]} == objects
    assert {id(p) for g in adam.param_groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_one_process_needs_no_wrapping():
    part = conv_layer(3, 4, 3)
    assert spread(part) is part and isinstance(part[1], nn.BatchNorm2d)


KINDS = ["snf-tiny", "barleria-tiny", "etris-tiny", "dcris-tiny", "detris-tiny", "lora-tiny", "compacter-tiny", "adapter-tiny", "full-tiny"]

@pytest.mark.parametrize("name", KINDS)
def test_recomputing(name):
    "Bit for bit the same gradients, dropout included, and the same running statistics, with PyTorch's batch normalisation and the shared one."
    g = torch.Generator().manual_seed(0)
    image, ids, mask = torch.randn(3, 3, 64, 64, generator=g), torch.randint(300, 400, (3, 9), generator=g), torch.rand(3, 1, 64, 64, generator=g)
    for change in (lambda m: m, share_norms):
        found = []
        for recompute in (False, True):
            model = change(build_model(config(name, pretrained=False))).train()
            for m in model.modules():
                if isinstance(m, nn.Dropout): m.p = .3
            model.encoder.recompute = recompute
            torch.manual_seed(1)
            loss = text_to_pixel_loss(model(image, ids, torch.ones(3, 9, dtype=torch.bool)), mask)
            with still(model): loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers()))
        for n, t in found[0].items(): assert torch.equal(t, found[1][n]), n


def test_still_ends_with_its_block():
    "Also when the block fails."
    net = nn.Sequential(nn.BatchNorm1d(2), SharedNorm(2), nn.BatchNorm1d(2, track_running_stats=False))
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError):
        with still(net): raise KeyError(net(torch.randn(4, 2)).shape)
    for n, t in net.state_dict().items(): assert torch.equal(t, before[n]), n
    net(torch.randn(4, 2))
    assert net[0].num_batches_tracked == net[1].num_batches_tracked == 1


@pytest.mark.parametrize("name", KINDS)
def test_what_is_compiled_computes(name):
    "Every part can be called, and between them they hold all numbers of the tuners that are called at all."
    tuners = build_model(config(name, pretrained=False)).encoder.tuners
    parts = computing(tuners)
    assert not any(isinstance(m, (nn.ModuleList, nn.ModuleDict)) for m in parts)
    held = {id(p) for m in parts for p in m.parameters()}
    alone = {id(p) for q in tuners.modules() if type(q).forward is nn.Module.forward for p in q.parameters(recurse=False)} # such as the one rule of all of Compacter's products
    assert held | alone >= {id(p) for p in tuners.parameters()}


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_compiling(name):
    "The same gradients up to rounding, under the same names; with recomputation too."
    g = torch.Generator().manual_seed(0)
    image, ids, mask = torch.randn(3, 3, 64, 64, generator=g), torch.randint(300, 400, (3, 9), generator=g), torch.rand(3, 1, 64, 64, generator=g)
    found = []
    for change, recompute in ((lambda m: m, False), (compiled, False), (compiled, True)):
        model = change(build_model(config(name, pretrained=False))).train()
        model.encoder.recompute = recompute
        torch.manual_seed(1)
        loss = text_to_pixel_loss(model(image, ids, torch.ones(3, 9, dtype=torch.bool)), mask)
        with still(model): loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad} | {n: b for n, b in model.named_buffers() if b.is_floating_point()})
    for other in found[1:]:
        assert list(other) == list(found[0])
        for n, t in found[0].items(): assert (t - other[n]).norm() <= 1e-3 * t.norm() + 1e-6, n
