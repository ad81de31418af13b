"Backbones: exact for every name, MONAI's checkpoints, weights from files, freezing, and errors that say what to do."
import hashlib, json, math, os, pickle
from pathlib import Path

import numpy as np, pytest, safetensors.torch as st, timm, torch
from torch import nn

from mgmt_fast.core import MGMTError, rng_for
from mgmt_fast.backbones import *
from mgmt_fast.backbones import ARCHS as NAMES
from mgmt_fast.operators import separate_depth
from test_inflate import randomise

ARCHS = list(NAMES)
FIXTURE = json.loads((Path(__file__).parent/'monai_resnet10.json').read_text())


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "Files of random 2D weights, made when asked for, and their networks"
    folder = tmp_path_factory.mktemp('weights')
    def make(arch):
        net = randomise(timm.create_model(NAMES[arch]))
        torch.save(net.state_dict(), folder/f'{arch}.pth')
        return net,folder
    return make


def check(net, model, C, Ds, size=64):
    x = torch.rand(1,1,size,size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(): a = net.forward_features(x.expand(-1,3,-1,-1))
    for D in Ds:
        with torch.no_grad(): b = model.body(x[:,:,None].expand(-1,C,D,-1,-1))
        assert b.shape[:2]==(1,model.body.num_features)
        assert float((b-a[:,:,None]).abs().max()) < 1e-4*float(a.abs().max()), (C,D,model.config)


def make(folder, arch, C, **kwargs):
    model = create_backbone(arch, C, pretrained=folder, **kwargs).eval()
    assert not (set(model.report.action)-{'copied','inflated','adapted',
        'left out'}) and (model.report.query("action=='left out'").reason.str.startswith('classifier')).all()
    return model


@pytest.mark.parametrize('i,arch', list(enumerate(ARCHS)))
def test_constant_volume_gives_2d_features(i, arch, weights):
    "Every backbone once; the choices take turns"
    (net,folder),C = weights(arch),(1,3,4)[i%3]
    check(net, make(folder, arch, C, mode=('mean','centre')[i//2%2], depth=('separable','full','separable_all')[i%3]),
        C, [(32,33)[i%2]])


@pytest.mark.slow
@pytest.mark.parametrize('i,arch', list(enumerate(ARCHS)))
def test_constant_volume_gives_2d_features_always(i, arch, weights):
    "All channels and kernels with each backbone; modes, depths and halvings take turns"
    net,folder = weights(arch)
    for j,C in enumerate((1,3,4)):
        model = make(folder, arch, C, mode=('mean','centre')[(i+j)%2], depth='full')
        for k,split in enumerate((None,'depthwise','all')):
            if split: separate_depth(model.body.net, split)
            check(net, model, C, [(32,33,64)[(i+j+k)%3]], size=32)
    check(net, make(folder, arch, 1, anisotropic=(1,2,5)[i%3]), 1, [64])
    check(net, make(folder, arch, 1, mode='slice'), 1, [5])


def test_anisotropic_depths():
    x = torch.rand(1,1,16,64,64)
    for arch in ('resnet18','convnext_tiny','xception'):
        for n in (1,2,3):
            model = create_backbone(arch, anisotropic=n).eval()
            assert model.body.depth_stride==32>>n
            with torch.no_grad(): assert model.body(x).shape[2]==16//(32>>n)
    with torch.no_grad(): assert create_backbone('resnet10', anisotropic=2).eval().body(x).shape[2:]==(4,4,4)


def monai_weights():
    out = {}
    for k,s in FIXTURE['shapes'].items():
        r = rng_for(0, 'monai resnet10', k)
        if k.endswith('num_batches_tracked'): out[k] = torch.tensor(7)
        else: out[k] = torch.tensor(monai_weight(k, s, r), dtype=torch.float32)
    return out


def monai_weight(k, s, r):
    if k.endswith('running_var'): return r.uniform(.5,1.5,s)
    if len(s)>1: return r.standard_normal(s)*(2/np.prod(s[1:]))**.5
    return r.uniform(.1,1.,s) if 'weight' in k else r.standard_normal(s)*.1


def test_monai_checkpoint(tmp_path):
    state,x = monai_weights(),torch.tensor(rng_for(0,'volumes').uniform(0,1,(3,1,24,40,32)), dtype=torch.float32)
    want = torch.tensor(FIXTURE['logits'])[:,None]
    torch.save({'state_dict': {f'module.{k}':v for k,v in state.items()}}, tmp_path/'r.pth')
    a,b = create_backbone('resnet10', pretrained=tmp_path/'r.pth'),create_backbone('resnet10')
    b.load_state_dict(state)
    with torch.no_grad():
        for m in (a,b): assert torch.allclose(m.eval()(x), want, atol=2e-5)
    assert set(a.report.action)=={'copied'} and len(a.report)==len(state)
    with pytest.raises(MGMTError, match='layer1.0.conv1.weight'):
        st.save_file({k:v for k,v in state.items() if k!='layer1.0.conv1.weight'}, tmp_path/'s.safetensors')
        create_backbone('resnet10', pretrained=tmp_path/'s.safetensors')
    with pytest.raises(MGMTError, match='wants'): create_backbone('resnet10', in_chans=4, pretrained=tmp_path/'r.pth')


def test_monai_itself():
    nets = pytest.importorskip('monai.networks.nets', reason='MONAI is not installed')
    torch.manual_seed(0)
    ref,x = nets.resnet10(spatial_dims=3, n_input_channels=1, num_classes=1),torch.rand(2,1,32,32,32)
    ours = create_backbone('resnet10'); ours.load_state_dict(ref.state_dict())
    for m in (ref,ours): m.train()
    a,b = ref(x),ours(x)
    assert torch.allclose(a, b, atol=1e-4)
    for o in (a,b): o.sum().backward()
    assert torch.allclose(ref.conv1.weight.grad, ours.body.net.conv1.weight.grad, rtol=1e-2,
        atol=1e-3*ref.conv1.weight.grad.abs().max().item())


def test_bad_weights(tmp_path, weights):
    net,folder = weights('efficientnet_b0')
    class Evil:
        def __reduce__(self): return os.mkdir, (str(tmp_path/'ran'),)
    torch.save({'state_dict': Evil()}, tmp_path/'evil.pth')
    (tmp_path/'cut.safetensors').write_bytes(b'\x08\0\0\0\0\0\0\0{}')
    (tmp_path/'cut.pth').write_bytes((folder/'efficientnet_b0.pth').read_bytes()[:9999])
    torch.save([1], tmp_path/'list.pth')
    half = {k:v.half() if v.is_floating_point() else v for k,v in net.state_dict().items()}
    st.save_file(half, tmp_path/'half.safetensors')
    st.save_file({k:v.contiguous() for k,v in create_backbone('efficientnet_b0').body.net.state_dict().items()},
        tmp_path/'three.safetensors')
    for name,what in [('evil.pth','more than tensors'), ('cut.safetensors','cannot be read'),
            ('cut.pth','cannot be read'), ('list.pth','list'), ('none.pth','no weights at'),
            ('three.safetensors','3D already'), ('.','no weights of')]:
        with pytest.raises(MGMTError, match=what): create_backbone('efficientnet_b0', pretrained=tmp_path/name)
    assert not (tmp_path/'ran').exists()
    assert create_backbone('efficientnet_b0',
        pretrained=tmp_path/'half.safetensors').report.reason.str.contains('float16 to float32').any()
    with pytest.raises(MGMTError, match='another architecture'):
        create_backbone('resnet18', pretrained=folder/'efficientnet_b0.pth')


def test_mgmt_weights_then_offline(tmp_path, monkeypatch):
    "What `mgmt_weights` writes, `create_backbone` reads; without internet and cache the error says so"
    real = timm.create_model
    def fake(name, pretrained=False, **kwargs): return randomise(real(name, **kwargs))
    monkeypatch.setattr(timm, 'create_model', fake)
    table = mgmt_weights(tmp_path, 'resnet18')
    assert Path(table.file[0]).exists() and table.arch[0]=='resnet18'
    assert (create_backbone('resnet18', pretrained=tmp_path).report.action!='left out').all()
    def gone(*args, pretrained=False, **kwargs): raise FileNotFoundError('not cached') if pretrained else AssertionError
    monkeypatch.setattr(timm, 'create_model', gone)
    with pytest.raises(MGMTError, match='mgmt_weights DEST resnet18'): create_backbone('resnet18', pretrained=True)


def test_errors():
    x = torch.rand(1,1,16,64,64)
    for f,what in [(lambda: create_backbone('efficientnet_b9'), "did you mean 'efficientnet_b"),
            (lambda: create_backbone('resnet10', pretrained=True), 'no 2D weights'),
            (lambda: mgmt_weights('x', 'resnet10'), 'no 2D weights'),
            (lambda: create_backbone('resnet18', depth='half'), 'depth'),
            (lambda: create_backbone('resnet18', head='big'), 'head'),
            (lambda: create_backbone('resnet18', freeze='all_but_last'), 'freeze'),
            (lambda: create_backbone('resnet18').eval()(x), 'D must be 32'),
            (lambda: create_backbone('resnet18', 2).eval()(x), r'\(B,2,D,H,W\)'),
            (lambda: create_backbone('timm/vit_tiny_patch16_224'), 'is a transformer'),
            (lambda: create_backbone('resnet10', head='published').train()(x), '2 volumes')]:
        with pytest.raises(MGMTError, match=what): f()


def test_frozen_is_frozen():
    model = create_backbone('efficientnet_b0', head='published', freeze='all_but_last=15')
    table = model.frozen
    assert (table.weights=='trained').sum()==15 and table.weights.iloc[-15:].eq('trained').all()
    before = {k:v.clone() for k,v in model.state_dict().items()}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1)
    model.train()
    model(torch.rand(2,1,32,32,32)).sum().backward(); opt.step()
    cold = tuple(f'body.{n}.' for n in table.query("weights=='frozen'").layer)
    moved = {k for k,v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved and not any(k.startswith(cold) for k in moved)
    assert any('running_mean' in k for k in moved)
    table = freeze_body(model, 'all_but_last=10,batchnorm')
    assert not table.statistics.eq('trained').any() and (table.weights=='trained').any()


def test_config_makes_it_again(tmp_path):
    for kw in (dict(arch='efficientnet_b0', in_chans=2, anisotropic=2, head='published', checkpoint=True),
            dict(arch='convnext_tiny', stem='adapter', freeze='all'), dict(arch='resnet10')):
        a = create_backbone(**kw).eval(); b = create_backbone(**json.loads(json.dumps(a.config))).eval()
        b.load_state_dict(a.state_dict())
        x = torch.rand(1,kw.get('in_chans',1),32,64,64)
        with torch.no_grad(): assert torch.equal(a(x), b(x))


def my_net(): return nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU())
def my_3d(): return nn.Sequential(nn.Conv3d(1,8,3,2,1), nn.ReLU())
def my_classifier(): return nn.Sequential(my_net(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,2))

def test_own_networks():
    assert create_backbone(my_net, in_chans=2)(torch.rand(2,2,8,16,16)).shape==(2,1)
    assert create_backbone(my_3d)(torch.rand(2,1,8,16,16)).shape==(2,1)
    with pytest.raises(MGMTError, match='must end in features'): create_backbone(my_classifier)


@pytest.mark.cuda
@pytest.mark.parametrize('arch', ['efficientnet_b1','resnet18','resnet10'])
def test_gpu_gives_what_the_cpu_gives(arch):
    torch.manual_seed(0)
    model,x = create_backbone(arch).train(),torch.rand(2,1,32,64,64)
    twin = create_backbone(**model.config).train(); twin.load_state_dict(model.state_dict()); twin.cuda()
    a,b = model(x),twin(x.cuda())
    assert torch.allclose(a, b.cpu(), rtol=2e-2, atol=2e-2)
    with torch.autocast('cuda', torch.bfloat16): twin(x.cuda()).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in twin.parameters())


MEDICAL = json.loads((Path(__file__).parent/'medicalnet.json').read_text())
LAYERS = dict(medicalnet10=(1,1,1,1), medicalnet18=(2,2,2,2), medicalnet34=(3,4,6,3), medicalnet50=(3,4,6,3))


def norm(name, n):
    return {**{f'{name}.{k}': (n,) for k in ('weight','bias','running_mean','running_var')},
        f'{name}.num_batches_tracked': ()}


def medicalnet_shapes(arch):
    "Names and shapes in a file of MedicalNet's, written down from its layers"
    wide = arch=='medicalnet50'
    res,ni = {'conv1.weight': (64,1,7,7,7), **norm('bn1', 64)},64
    for i,n in enumerate(LAYERS[arch]):
        nf = 64*2**i
        out = 4*nf if wide else nf
        for j in range(n):
            at,into = f'layer{i+1}.{j}',ni if j==0 else out
            convs = ((nf,into,1),(nf,nf,3),(out,nf,1)) if wide else ((nf,into,3),(nf,nf,3))
            for c,(o,k,size) in enumerate(convs, 1):
                res |= {f'{at}.conv{c}.weight': (o,k,*[size]*3), **norm(f'{at}.bn{c}', o)}
            if j==0 and into!=out and arch not in ('medicalnet18','medicalnet34'):
                res |= {f'{at}.downsample.0.weight': (out,into,1,1,1), **norm(f'{at}.downsample.1', out)}
        ni = out
    return res


def medicalnet_file(path, arch, **more):
    "A file as MedicalNet publishes it, of numbers that depend on their names"
    state = {}
    for k,s in {**medicalnet_shapes(arch), **more}.items():
        r = rng_for(0, 'medicalnet', k)
        whole = k.endswith('num_batches_tracked')
        state[f'module.{k}'] = torch.tensor(7) if whole else torch.tensor(monai_weight(k, s, r), dtype=torch.float32)
    torch.save(dict(state_dict=state), path)
    return {k.removeprefix('module.'): v for k,v in state.items()}


@pytest.mark.parametrize('arch', LAYERS)
def test_medicalnet_by_name_and_offline(arch, tmp_path):
    "Names and shapes are those of MONAI's ResNets with MedicalNet's shortcuts; every weight arrives"
    shapes = medicalnet_shapes(arch)
    lines = sorted(f'{k} {list(s)}' for k,s in shapes.items())
    known = MEDICAL[arch.removeprefix('medicalnet')]
    assert (len(lines), hashlib.sha256('\n'.join(lines).encode()).hexdigest())==(known['keys'], known['digest'])
    state = medicalnet_file(tmp_path/f'{arch}.pth', arch, **{'conv_seg.0.weight': (2,2,1,1,1)})
    model = create_backbone(arch, pretrained=tmp_path)
    for k,v in model.body.net.state_dict().items(): assert torch.equal(v, state[k]), k
    assert model.report.action.value_counts().to_dict()=={'copied':len(shapes), 'kept':2, 'left out':1}
    assert model.body.depth_stride==32


def test_medicalnet_is_refused_with_the_way_out(tmp_path, monkeypatch):
    state = medicalnet_file(tmp_path/'medicalnet10.pth', 'medicalnet10')
    with pytest.raises(MGMTError, match='another architecture'):
        create_backbone('medicalnet18', pretrained=tmp_path/'medicalnet10.pth')
    with pytest.raises(MGMTError, match='layer4.0.conv2.weight'):
        load_3d(create_backbone('medicalnet10'), {k:v for k,v in state.items() if k!='layer4.0.conv2.weight'})
    with pytest.raises(MGMTError, match='network of MedicalNet'): medicalnet_weights('medicalnet101')
    def nowhere(*args): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', nowhere)
    with pytest.raises(MGMTError, match='mgmt_weights DEST medicalnet10'):
        create_backbone('medicalnet10', pretrained=True)


def test_medicalnet_is_fetched_with_its_licence(tmp_path, monkeypatch, capsys):
    "The hub stands in a folder here: what is asked of it, what is written and what is said"
    asked = []
    def hub(repo, name):
        asked.append((repo, name))
        medicalnet_file(tmp_path/name, 'medicalnet10')
        return str(tmp_path/name)
    monkeypatch.setattr('huggingface_hub.hf_hub_download', hub)
    table = mgmt_weights(tmp_path/'weights', 'medicalnet10')
    assert asked==[('TencentMedicalNet/MedicalNet-Resnet10', 'resnet_10_23dataset.pth')]
    assert 'MIT' in capsys.readouterr().out and 'MIT' in table.license[0]
    a,b = (create_backbone('medicalnet10', pretrained=o) for o in (tmp_path/'weights', True))
    for k,v in a.body.state_dict().items(): assert torch.equal(v, b.body.state_dict()[k])


def test_medicalnet_computes_what_monai_does(tmp_path):
    R = pytest.importorskip('monai.networks.nets.resnet', reason='MONAI is not installed')
    medicalnet_file(tmp_path/'medicalnet18.pth', 'medicalnet18')
    ours,x = create_backbone('medicalnet18', pretrained=tmp_path).eval(),torch.rand(1,1,32,40,48)
    ref = R.ResNet('basic', [2,2,2,2], [64,128,256,512], n_input_channels=1, shortcut_type='A', feed_forward=False,
        conv1_t_stride=2).eval()
    ref.load_state_dict(ours.body.net.state_dict())
    seen = []
    ref.layer4.register_forward_hook(lambda m,i,o: seen.append(o))
    with torch.no_grad():
        ref(x)
        assert torch.allclose(ours.body(x), seen[0], atol=1e-3*seen[0].abs().max().item())


@pytest.mark.parametrize('arch', ['resnet18','efficientnet_b0','densenet121','convnext_tiny','medicalnet10'])
def test_features_of_each_stage(arch):
    "As wide and as small as they are said to be; the depth is spared as often as asked"
    model = create_backbone(arch, anisotropic=3).eval()
    stages,x = StageFeatures(model),torch.rand(1,1,16,64,64)
    with torch.no_grad(): maps = stages(x)
    assert [o.shape[1] for o in maps]==stages.num_features
    assert [64//o.shape[-1] for o in maps]==stages.reductions
    assert [16//o.shape[2] for o in maps]==[max(1, r//8) for r in stages.reductions]


@pytest.mark.parametrize('head', ['plain','published'])
def test_any_number_of_classes(head):
    model = create_backbone('timm/test_resnet', num_classes=4, head=head, anisotropic=3).eval()
    again = create_backbone(**model.config)
    again.load_state_dict(model.state_dict())
    x = torch.rand(2,1,8,32,32)
    with torch.no_grad(): assert model(x).shape==(2,4) and torch.equal(again.eval()(x), model(x))
