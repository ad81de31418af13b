"Inflation: what a 2D network answers, its 3D twin answers at every depth; and what cannot be inflated says so."
import copy

import pytest, timm, torch
from torch import nn

from mgmt_fast import operators
from mgmt_fast.core import MGMTError
from mgmt_fast.convert import *
from mgmt_fast.inflate import *
from mgmt_fast.operators import *


def randomise(net, seed=0):
    "Random statistics and norms, mild enough that rounding is not amplified"
    g = torch.Generator().manual_seed(seed)
    for n,b in net.named_buffers():
        if n.endswith('running_mean'): b.copy_(torch.randn(b.shape, generator=g)*.1)
        if n.endswith('running_var'): b.copy_(torch.rand(b.shape, generator=g)+.5)
    for n,p in net.named_parameters():
        if p.ndim==1: p.data.copy_(torch.rand(p.shape, generator=g)*(.5 if 'bias' in n or 'gamma' in n else 1))
    return net.eval()


def error(net2, net3, C=1, D=32, size=64):
    "Largest error of the 3D features at any depth, relative to the largest 2D feature"
    x = torch.rand(2,1,size,size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a,b = net2.forward_features(x.expand(-1,3,-1,-1)),net3.eval().forward_features(x[:,:,None].expand(-1,C,D,-1,-1))
    assert b.ndim==5
    return float((b-a[:,:,None]).abs().max()/a.abs().max())


@pytest.mark.parametrize('name,C,D,mode', [('tf_efficientnet_b0',1,33,'mean'), ('seresnet18',4,32,'mean'),
    ('resnetblur18',1,33,'centre'), ('resnet18d',3,33,'mean'), ('ese_vovnet19b_dw',1,32,'mean'),
    ('mobilenetv3_small_100',1,32,'mean')])
def test_other_networks_are_exact_or_refused(name, C, D, mode):
    if not timm.is_model(name): pytest.skip(f'this timm has no {name}')
    net = randomise(timm.create_model(name))
    try: net3 = inflate_model(net, in_chans=C, mode=mode)
    except MGMTError as e:
        assert name not in ('tf_efficientnet_b0','resnet18d') and "at '" in str(e)
        return
    assert error(net, net3, C, D) < 1e-4
    assert error(net, separate_depth(net3, 'all'), C, D) < 1e-4


def test_depth_position_matters_not_and_zeros_do():
    net = randomise(timm.create_model('efficientnet_b0'))
    assert error(net, inflate_model(net, 1)) < 1e-4
    assert error(net, inflate_model(net, 1, depth_padding='zeros')) > 1e-2


def test_separated_and_merged_train_alike():
    "One step of gradient descent on the parts is not one on the whole, but outputs and input gradients agree before it"
    net = inflate_model(randomise(timm.create_model('efficientnet_b0')), 1)
    twin = separate_depth(copy.deepcopy(net))
    xs = [torch.rand(1,1,32,48,48, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in 'ab']
    ys = [m.eval().forward_features(x) for m,x in zip((net,twin),xs)]
    for y in ys: y.square().mean().backward()
    assert torch.allclose(*ys, rtol=1e-3, atol=1e-4*ys[0].abs().max().item())
    assert (xs[0].grad-xs[1].grad).norm() < 1e-2*xs[0].grad.norm()
    merge_depth(twin)
    assert {k:v.shape for k,v in twin.state_dict().items()} == {k:v.shape for k,v in net.state_dict().items()}


@pytest.mark.parametrize('k,stride,padding,H', [(5,1,2,17), (5,2,2,16), (7,1,3,15), (7,2,3,16)])
def test_wide_depthwise_gradient(k, stride, padding, H, monkeypatch):
    monkeypatch.setattr(operators, '_wide_pays', True)
    conv = InflatedConv3d(6, 6, (1,k,k), (1,stride,stride), groups=6, bias=False, padding=(0,padding,padding))
    conv.weight.data.normal_(); ref = nn.Conv2d(6, 6, k, stride, padding, groups=6, bias=False)
    ref.weight.data = conv.weight.data[:,:,0].clone()
    x = torch.randn(2,6,3,H,H, requires_grad=True); x2 = as_images(x.detach()).requires_grad_()
    y,y2 = conv(x),ref(x2)
    g = torch.randn_like(y); y.backward(g); y2.backward(as_images(g))
    assert torch.allclose(as_images(y), y2, atol=1e-5) and torch.allclose(as_images(x.grad), x2.grad, atol=1e-5)
    assert torch.allclose(conv.weight.grad[:,:,0], ref.weight.grad, atol=1e-3)


@pytest.mark.parametrize('groups,mode,k,s,D,d', [*((*o,1) for o in [(1,'replicate',3,1,6), (1,'replicate',3,2,7),
    (1,'zeros',3,2,6), (1,'zeros',7,1,5), (1,'replicate',3,1,1), (1,'zeros',3,1,1), (4,'replicate',5,2,9),
    (2,'zeros',3,1,4)]),
    *((1,*o) for o in [('replicate',3,1,8,1), ('zeros',3,2,9,1), ('replicate',7,2,16,1), ('replicate',7,1,8,1),
    ('replicate',3,1,12,2), ('replicate',3,2,9,2), ('replicate',2,4,9,1), ('replicate',3,2,2,1)])])
@pytest.mark.parametrize('B', [1, 2])
def test_fast_convolution_is_conv3d(groups, mode, k, s, D, d, B):
    "Computed whole or, for single small volumes, in windows: values and gradients are those of `conv3d`"
    conv = InflatedConv3d(4, 8, (k,k,k), (s,s,s), (d,d,d), groups, padding=(d*(k-1)//2,)*3, depth_padding=mode)
    for p in conv.parameters(): p.data.normal_()
    ref = copy.deepcopy(conv)
    xs = [torch.randn(B,4,D,12,12, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in 'ab']
    a,b = conv(xs[0]),ref._conv3d(xs[1])
    g = torch.randn_like(b); a.backward(g); b.backward(g)
    for p,q in [(a,b),(xs[0].grad,xs[1].grad),(conv.weight.grad,ref.weight.grad),(conv.bias.grad,ref.bias.grad)]:
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('k,s,d,lo,hi,D', [(3,1,1,1,1,8), (5,1,1,2,2,3), (5,2,1,2,2,9), (3,2,1,0,1,8), (3,1,2,2,2,6),
    (7,1,1,3,3,2), (3,1,1,0,0,7)])
def test_depth_convolution_replicates_the_ends(k, s, d, lo, hi, D):
    x,w = torch.randn(2,4,D,11, dtype=torch.double),torch.randn(4,k, dtype=torch.double)
    def conv(x, w): return nn.functional.conv2d(pad_depth(x, lo, hi), w[:,None,:,None], None, (s,1), 0, (d,1), 4)
    def fast(x, w): return operators._DepthConv.apply(x, w, lo, hi, s, d)
    (a,ga),(b,gb) = (torch.autograd.functional.vjp(f, (x,w), conv(x, w).sin()) for f in (fast,conv))
    for p,q in zip((a,*ga), (b,*gb)): assert torch.allclose(p, q)


@pytest.mark.parametrize('k,s,p,D', [(3,2,1,8), (3,2,1,7), (3,1,1,1), (2,2,0,6), (3,2,0,6)])
def test_maximum_pool_replicates_the_ends(k, s, p, D):
    pool,x = InflatedPool3d(nn.MaxPool2d(k, s, p), 'max', k, s, padding=p),torch.randn(2,3,D,9,10)
    assert torch.equal(pool(x), nn.functional.max_pool3d(pad_depth(x, *pool.along.pads(D)), k, s, (0,p,p)))


@pytest.mark.parametrize('training', [True, False])
def test_batch_norm_and_silu(training):
    a = BatchNormAct3d(5, act=nn.SiLU(inplace=True)); b = nn.Sequential(nn.BatchNorm3d(5), nn.SiLU())
    a.weight.data.normal_(); b[0].load_state_dict(a.state_dict())
    xs = [torch.randn(2,5,3,4,4, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in 'ab']
    ys = [m.train(training)(x) for m,x in zip((a,b),xs)]
    for y in ys: (y*torch.arange(4.)).sum().backward()
    for p,q in [ys,[x.grad for x in xs],(a.weight.grad,b[0].weight.grad),(a.running_var,b[0].running_var)]:
        assert torch.allclose(p, q, atol=1e-4)


@pytest.mark.parametrize('ni,no,D,H,off', [(16,96,4,16,0), (16,96,4,16,30), (40,240,8,16,5)])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('act', [nn.SiLU(), nn.ReLU6(inplace=True)])
def test_norm_in_the_convolution(ni, no, D, H, off, training, act):
    "The norm within the convolution is as near to float64 as one after the other, also with large means"
    g = torch.Generator().manual_seed(0)
    conv,norm = InflatedConv3d(ni, no, (1,1,1), bias=False),BatchNormAct3d(no, act=act)
    for p in (conv.weight,norm.weight,norm.bias): p.data.normal_(generator=g)
    x = torch.randn(2,ni,D,H,H, generator=g)+off*torch.randn(ni, generator=g).view(-1,1,1,1)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    def run(f, dtype):
        c,n = (copy.deepcopy(o).to(dtype).train(training) for o in (conv,norm))
        u = x.detach().clone().to(dtype).requires_grad_()
        y = f(c, n, u)
        (y*torch.randn(y.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        return [o.double() for o in (y, u.grad, c.weight.grad, n.weight.grad, n.bias.grad, n.running_mean,
            n.running_var)]
    def two(c, n, u): return n(c(u))
    for a,b,ref in zip(run(conv_norm, torch.float32), run(two, torch.float32), run(two, torch.float64)):
        assert (a-ref).norm() <= 3*(b-ref).norm()+1e-6*ref.norm()


@pytest.mark.parametrize('training', [True, False])
def test_shortcuts_change_nothing(training, monkeypatch):
    "A whole EfficientNet with and without what is only there for speed: outputs, gradients and running statistics"
    net2 = randomise(timm.create_model('efficientnet_b0', num_classes=1, drop_path_rate=0.))
    net = inflate_model(net2, 1).train(training)
    twin,x = copy.deepcopy(net),torch.rand(2,1,32,64,64, generator=torch.Generator().manual_seed(0))
    nets = [net.double(),twin.double()]
    ys = [nets[0](x.double())]
    monkeypatch.setattr(operators, '_large', lambda x: False)
    monkeypatch.setattr(operators, '_is_pointwise', lambda conv: False)
    ys.append(nets[1](x.double()))
    for y in ys: y.sum().backward()
    assert torch.allclose(*ys, rtol=1e-9)
    for a,b in zip(net.parameters(), twin.parameters()): assert (a.grad-b.grad).norm() <= 1e-6*b.grad.norm()+1e-9
    for a,b in zip(net.buffers(), twin.buffers()): assert torch.allclose(a, b, rtol=1e-9)


def test_bfloat16_autocast_trains():
    net = separate_depth(inflate_model(timm.create_model('efficientnet_b0', num_classes=1), 1)).train()
    with torch.autocast('cpu', torch.bfloat16): loss = net(torch.rand(2,1,32,32,32)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


class Gelu2(nn.Module):
    "A user's own leaf"
    def forward(self, x): return x*torch.sigmoid(1.7*x)


def test_unknown_leaf_is_named():
    with pytest.raises(MGMTError, match="Gelu2, at '1'"): inflate_model(nn.Sequential(nn.Conv2d(3,4,3), Gelu2()))


class MeanOfPlane(nn.Module):
    "Runs in 3D without an error, and wrongly"
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(4,4,1)
    def forward(self, x): return x*self.conv(x.mean((2,3), keepdim=True)).sigmoid()


def test_wrong_answer_is_named():
    with pytest.raises(MGMTError, match="MeanOfPlane, at '1'"):
        inflate_model(nn.Sequential(nn.Conv2d(3,4,3,padding=1), MeanOfPlane()))


def test_errors():
    for f,what in [(lambda: inflate_model(nn.Sequential(nn.Conv3d(1,2,3))), '3D already'),
            (lambda: inflate_model(nn.Conv2d(3,4,3), mode='center'), "'centre'"),
            (lambda: inflate_model(nn.Conv2d(4,4,3), in_chans=2), 'only a first convolution of 3'),
            (lambda: inflate_model(nn.Conv2d(3,4,3,padding_mode='reflect')), 'reflect'),
            (lambda: inflate_model(nn.Sequential(nn.Conv2d(3,4,3), nn.UpsamplingBilinear2d(2))), 'no 3D counterpart'),
            (lambda: inflate_model(nn.Sequential(nn.Conv2d(3,4,3), nn.Upsample(2))), 'only .nearest., by whole'),
            (lambda: separate_depth(nn.Sequential(), 'some'), 'depthwise'),
            (lambda: checkpoint_blocks(nn.Sequential(nn.Conv3d(1,2,3))), 'no blocks')]:
        with pytest.raises(MGMTError, match=what): f()


def same_answer(net, size):
    "Does the network inflated answer a constant volume as the network answers its slice, classifier included?"
    x = torch.rand(1,3,size,size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): a,b = net(x),inflate_model(net).eval()(x[:,:,None].expand(-1,-1,64,-1,-1))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3*a.abs().max().item())


@pytest.mark.parametrize('name', ['resnet18','mobilenet_v2','mobilenet_v3_small','squeezenet1_1','regnet_x_400mf',
    'alexnet','convnext_tiny','mnasnet0_5','shufflenet_v2_x0_5','densenet121','inception_v3'])
def test_networks_of_torchvision(name):
    "Some activations work in place, one may be used several times, and some networks' own code counts axes"
    torchvision = pytest.importorskip('torchvision')
    more = dict(init_weights=False) if name=='inception_v3' else {}
    assert same_answer(randomise(torchvision.models.get_model(name, weights=None, **more)), 75 if more else 64)


@pytest.mark.parametrize('name', ['legacy_seresnet18','skresnet18','resnest14d','ghostnet_050','dla46_c','selecsls42',
    'hrnet_w18_small','inception_next_atto','rdnet_tiny','repvit_m0_9'])
def test_networks_of_timm_whose_code_counts_axes(name):
    assert same_answer(randomise(timm.create_model(name)), 64)


@pytest.mark.parametrize('how', [dict(anisotropic=2), dict(anisotropic=4), dict(mode='slice')], ids=str)
def test_what_is_enlarged_again_meets_what_was_not_reduced(how):
    "HRNet adds features of several resolutions, whatever the depth is spared"
    net = inflate_model(timm.create_model('hrnet_w18_small', num_classes=2), 1, **how).eval()
    with torch.no_grad(): assert net(torch.rand(1,1,16,64,64)).shape==(1,2)


def test_second_classifiers_train():
    "They are asked in training only, where nothing compares"
    torchvision = pytest.importorskip('torchvision')
    net = inflate_model(torchvision.models.googlenet(weights=None, init_weights=False, num_classes=2), 1).train()
    answers = net(torch.rand(2,1,64,64,64))
    assert len(answers)==3 and all(o.shape==(2,2) for o in answers)


def test_what_stays_2d_sees_the_mean_over_the_depth():
    "timm's VGG classifies places of the plane by a convolution"
    net = randomise(timm.models.vgg.VGG(cfg=[8,'M',16,'M'], num_classes=3, mlp_ratio=.01))
    assert same_answer(net, 64)


@pytest.mark.parametrize('make,weight', [(lambda: timm.create_model('vit_tiny_patch16_224'), 'pos_embed'),
    (lambda: timm.create_model('swin_tiny_patch4_window7_224'), 'relative_position_bias_table')], ids=['vit','swin'])
def test_a_transformer_is_refused_for_its_positions(make, weight):
    with pytest.raises(MGMTError, match=f'is a transformer: .*{weight}'): inflate_model(make())
