"What other programs run gives our logits, and what torch writes down is our networks, gradients too."
import copy
import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import nn

from bundles import pair_bundle
from mgmt_fast import cli
from mgmt_fast.backbones import ARCHS, MEDICALNETS, create_backbone
from mgmt_fast.bundle import Bundle
from mgmt_fast.core import MGMTError, get_recipe
from mgmt_fast.export import describe_network, export_model, onnx_bytes, onnx_difference, parts_of
from mgmt_fast.fusion import FusionModel
from mgmt_fast.learner import MGMTModel, load_model
from mgmt_fast.networks import create_network
from mgmt_fast.operators import plain_operators, route
from mgmt_fast.pack import pack_bundle
from mgmt_fast.prepare import VolumeStore

LACKING = [o for o in ('onnx','onnxruntime','onnxscript') if importlib.util.find_spec(o) is None]
needs_onnx = pytest.mark.skipif(LACKING!=[], reason=f'of the extra `onnx`, {LACKING} are absent')
SMALL = dict(in_chans=2, anisotropic=2)
ALL = *ARCHS,'resnet10',*MEDICALNETS


def moved(net, size=(8,32,32)):
    "Weights and statistics away from where they start; nothing is drawn in training"
    torch.manual_seed(0)
    for p in net.parameters():
        p.data += torch.randn_like(p)*(.1*p.std() if p.numel()>1 and p.std()>0 else .05)
    net.train()
    with torch.no_grad():
        for _ in range(3): net(torch.rand(4, net.config['in_chans'], *size))
    for m in net.modules():
        if isinstance(m, nn.modules.dropout._DropoutNd): m.p = 0.
        if hasattr(m, 'drop_prob'): m.drop_prob = 0.
    return net.eval()


def step(net, x):
    "Logits, gradients of what can be learned and of the input, and statistics, of one step"
    net.train().zero_grad()
    x = x.clone().requires_grad_()
    y = net(x)
    (y*torch.arange(1., 1+len(y))[:,None].to(y)).sum().backward()
    grads = {k: p.grad for k,p in net.named_parameters() if p.grad is not None}
    return dict(y=y.detach(), **grads, x=x.grad, **dict(net.named_buffers()))


def same(a, b, eps=1e-7):
    "Equal but for rounding, each beside the largest of its kind"
    assert a.keys()==b.keys()
    most = max(v.abs().max().item() for k,v in a.items() if k not in ('y','x'))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=eps, atol=eps*max(1., most))


KINDS = [dict(), dict(depth='full'), dict(depth='full', depth_padding='zeros'), dict(depth='separable_all'),
    dict(mode='slice'), dict(anisotropic=2), dict(stem='adapter', head='published'), dict(checkpoint=True)]
NETS = ['timm/test_efficientnet', 'timm/test_resnet', 'timm/test_convnext']


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('arch', NETS)
def test_the_plain_route_is_the_fast_one(arch, kind):
    net = moved(create_backbone(arch, in_chans=2, **kind), (32,32,32)).double()
    twin,x = copy.deepcopy(net),torch.rand(3,2,32,48,48).double()
    fast = step(net, x)
    with plain_operators():
        assert route(x)=='plain'
        same(fast, step(twin, x))
    assert route(x)=='cpu'


@pytest.mark.slow
@pytest.mark.parametrize('arch', ALL)
def test_the_plain_route_of_every_backbone(arch):
    net = moved(create_backbone(arch, in_chans=2), (32,64,64)).double()
    twin,x = copy.deepcopy(net),torch.rand(2,2,32,64,64).double()
    fast = step(net, x)
    with plain_operators(): same(fast, step(twin, x), 1e-6)


def test_plain_operators_may_be_nested_and_end_with_an_error():
    x = torch.zeros(1)
    with plain_operators():
        with plain_operators(): pass
        assert route(x)=='plain'
    with pytest.raises(KeyError), plain_operators(): raise KeyError
    assert (route(x),route(x.to('meta')))==('cpu','plain')


def compiled_is_eager(arch, size=(16,32,32), batches=(2,3), **kw):
    net = moved(create_backbone(arch, **kw), (16,32,32)).double()
    torch._dynamo.reset()
    twin = copy.deepcopy(net)
    fast = torch.compile(twin, backend='aot_eager', fullgraph=True)
    for B in batches:
        x = torch.rand(B,1,*size).double()
        ours = step(net, x)
        theirs = {k.removeprefix('_orig_mod.'): v for k,v in step(fast, x).items()}
        same(ours, theirs)


@pytest.mark.parametrize('checkpoint', [False, True])
def test_a_compiled_training_is_the_eager_one(checkpoint):
    compiled_is_eager('timm/test_efficientnet', anisotropic=2, checkpoint=checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize('arch', ['resnet10','efficientnet_b0'])
def test_a_compiled_training_of_the_usual_networks(arch): compiled_is_eager(arch, (32,64,64), (2,3,2))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning',
    'ignore::torch.jit.TracerWarning')
def test_a_batch_of_any_size_is_traced_and_exported():
    net = moved(create_backbone('timm/test_efficientnet', **SMALL))
    x,other = torch.rand(2,2,8,32,32),torch.rand(5,2,8,32,32)
    with torch.no_grad():
        traced = torch.jit.trace(net, x, check_trace=False)
        exported = torch.export.export(net, (x,), dynamic_shapes=({0:torch.export.Dim('batch')},)).module()
        for f in (traced, exported): torch.testing.assert_close(f(other), net(other), rtol=1e-5, atol=1e-5)


@needs_onnx
@pytest.mark.parametrize('arch,kind', [('timm/test_efficientnet', {}), ('resnet10', dict(depth='separable_all')),
    ('timm/test_convnext', dict(depth='full', depth_padding='zeros'))], ids=str)
def test_onnx_gives_our_logits_for_any_batch(arch, kind):
    net = moved(create_backbone(arch, **{**SMALL, **kind}))
    shape = (2,8,32,32)
    assert onnx_difference(onnx_bytes(net, shape), net, shape, batches=(1,3,7))<1e-4


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize('arch', ALL)
def test_onnx_of_every_backbone(arch):
    net = moved(create_backbone(arch, in_chans=2), (32,64,64))
    shape = (2,32,64,64)
    d = onnx_difference(onnx_bytes(net, shape), net, shape, batches=(1,3))
    print(f'{arch}: {d:.1e}')
    assert d<1e-4


@needs_onnx
@pytest.mark.parametrize('how', [dict(network='2d', slices=8, stem='adapter1x1'), dict(network='siamese'),
    dict(checkpoint=True, head='published', standardize='backbone')], ids=str)
def test_networks_of_other_kinds(how):
    net = create_network(**{**dict(arch='timm/test_resnet', in_chans=2), **how})
    if how.get('network')=='siamese': net.head.prototypes.normal_()
    shape = (2,8,64,64) if how.get('network')=='2d' else (2,32,64,64)
    net = moved(net, shape[1:])
    assert onnx_difference(onnx_bytes(net, shape), net, shape, batches=(1,3))<1e-4


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A trained model of two sequences, and a bundle of it at a temperature"
    return pair_bundle(tmp_path_factory.mktemp('made'), dict(n=36, slices=12, size=48, sequences='FLAIR,T1wCE'),
        dict(epochs=1), temperatures=1.7)


def in_a_process(script, *args):
    "What a script prints, that cannot import this library"
    code = ("import runpy,sys; sys.modules.update(mgmt_fast=None, torch=None); sys.argv=sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')")
    r = subprocess.run([sys.executable,'-I','-c',code,script,*args], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    return float(r.stdout)


@needs_onnx
def test_a_bundle_is_predicted_without_this_library(made, tmp_path, capsys):
    assert cli.mgmt_export(made/'bundle', tmp_path/'onnx')==0
    assert "logits within" in capsys.readouterr().out
    assert {o.name for o in (tmp_path/'onnx').iterdir()}=={'model-0.onnx','model-0.json','predict.py'}
    store,bundle = VolumeStore(made/'store'),Bundle(made/'bundle')
    ours = bundle.predict(store, progress=False).set_index('patient').prob
    for p in list(ours.index[:3]):
        np.savez(tmp_path/'patient.npz', **dict(zip(store.sequences, store.read(p, store.sequences))))
        assert abs(in_a_process(tmp_path/'onnx/predict.py', tmp_path/'patient.npz')-ours[p])<1e-4


@needs_onnx
def test_the_json_is_of_the_model_that_ran(made, tmp_path):
    export_model(made/'bundle', tmp_path/'onnx')
    d = json.loads((tmp_path/'onnx/model-0.json').read_text())
    bundle,m = Bundle(made/'bundle'),load_model(made/'model')
    assert d['input']['sequences']==list(m.sequences) and d['input']['axes']==['batch',2,*m.size]
    assert d['calibrate']['temperature']==1.7 and d['calibrate']['threshold']==bundle.threshold
    assert d['prepare']['choices']==json.loads(json.dumps(m.recipe.room('prepare')))
    assert (d['bundle'],d['trained_with'],d['config'])==(bundle.signature, m.version, m.model.config)
    raw = b''.join(o.read_bytes() for o in (tmp_path/'onnx').iterdir())
    for o in (str(made), sys.prefix, *VolumeStore(made/'store').table.patient): assert o.encode() not in raw


@needs_onnx
def test_pack_folder_and_file_are_the_same_export(made, tmp_path):
    pack_bundle(made/'bundle', tmp_path/'bundle.zip')
    assert cli.mgmt_export(tmp_path/'bundle.zip', tmp_path/'onnx')==0
    before = {o: o.read_bytes() for o in (tmp_path/'onnx').iterdir()}
    assert len(export_model(made/'bundle', tmp_path/'onnx'))==1
    assert before=={o: o.read_bytes() for o in (tmp_path/'onnx').iterdir()}
    assert cli.mgmt_export(made/'model.json', tmp_path/'onnx')==2, 'another thing is in the way'
    assert before=={o: o.read_bytes() for o in (tmp_path/'onnx').iterdir()}
    assert cli.mgmt_export(made/'model', tmp_path/'alone')==0


@needs_onnx
def test_a_mean_of_models_is_predicted_as_one(made, tmp_path):
    m = load_model(made/'model')
    other = MGMTModel(moved(copy.deepcopy(m.model), m.size), m.recipe, m.sequences)
    both,rng = FusionModel(dict(a=m, b=other)),np.random.default_rng(0)
    assert export_model(both, tmp_path/'onnx').file.tolist()==['model-a.onnx','model-b.onnx']
    volumes = {s: rng.integers(0, 256, m.size, dtype=np.uint8) for s in m.sequences}
    np.savez(tmp_path/'patient.npz', **volumes)
    p = expit(both.logit({m.key: volumes}, {})[0])
    assert abs(in_a_process(tmp_path/'onnx/predict.py', tmp_path/'patient.npz')-p)<1e-4


@needs_onnx
def test_nothing_is_left_where_it_fails(made, tmp_path, monkeypatch, capsys):
    from mgmt_fast import export
    assert cli.mgmt_export(tmp_path/'nothing', tmp_path/'onnx')==2
    monkeypatch.setattr(export, 'onnx_difference', lambda *args: float('nan'))
    assert cli.mgmt_export(made/'model', tmp_path/'onnx')==2
    assert 'differ' in capsys.readouterr().err
    monkeypatch.undo()
    def no(*args, **kwargs): raise RuntimeError('no such operator')
    monkeypatch.setattr(torch.onnx, 'export', no)
    with pytest.raises(MGMTError, match='no such operator'): export_model(made/'model', tmp_path/'onnx')
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    with pytest.raises(MGMTError, match=r"pip install 'mgmt_fast\[onnx\]'"): export_model(made/'model', tmp_path/'onnx')
    assert not [*tmp_path.glob('*onnx*')] and not [*tmp_path.glob('.mgmt*')]


def test_what_is_no_average_of_networks_is_refused():
    r = get_recipe('default', arch='timm/test_resnet', size=(8,32,32), anisotropic=2)
    m = MGMTModel(create_backbone(r.arch, anisotropic=2), r, ('T1wCE',))
    assert describe_network(parts_of(m)[0], m)['calibrate']['networks']==['model']
    for odd in (FusionModel(dict(a=m), weights=dict(a=[0.,1.])), FusionModel(dict(a=FusionModel(dict(b=m))))):
        with pytest.raises(MGMTError, match='one by one'): parts_of(odd)
    views = MGMTModel.__new__(MGMTModel)
    views.model = nn.Identity()
    with pytest.raises(MGMTError, match='views'): parts_of(views)
