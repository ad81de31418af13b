"""What runs on a card gives what torch's own operators give."""
import copy
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mgmt_fast import kernels, passes
from mgmt_fast.backbones import create_backbone
from mgmt_fast.compiled import on_card
from mgmt_fast.operators import one_pass, plain_operators, route


def test_kernels_give_what_torch_gives():
    run = subprocess.run([sys.executable, Path(__file__).parent/'interpreted.py'], capture_output=True, text=True,
        env={**os.environ, 'TRITON_INTERPRET':'1'})
    assert not run.returncode, run.stderr
    layers = 'BatchNormAct3d','InflatedConv3d','InflatedPool3d','SeparableConv3d','in one pass'
    assert all(o in run.stdout for o in layers), run.stdout


HALF,FULL = '*fp16','*fp32'
TILE,WINDOW = dict(BN=64, BC=32),dict(KD=1, KH=3, KW=3, SD=1, SH=2, SW=2, DD=1, DH=1, DW=1, PD=0, PH=1, PW=1,
    REPLICATE=True, BN=32, BC=32)
DEEP = {**WINDOW, **dict(KD=7, KH=2, KW=7, SD=2, PD=3, PW=3)} # as deep and as wide as they get
KERNELS = dict( # name: types of what are no integers, and constants
    moments_of_shares=(dict(x=HALF, means=FULL), TILE),
    join_moments=({**dict.fromkeys(('mean','table','w','b','running','running_var'), FULL),
        **dict.fromkeys(('momentum','eps','sample'), 'fp32')}, dict(BP=32, BC=32)),
    norm_forward=(dict(x=HALF, r=HALF, y=HALF, table=FULL), dict(ACT=2, ADD=True, **TILE)),
    norm_sums=(dict(x=HALF, r=HALF, g=HALF, table=FULL, sums=FULL), dict(ACT=2, ADD=True, **TILE)),
    norm_backward=(dict(x=HALF, r=HALF, g=HALF, gx=HALF, gr=HALF, table=FULL, grads=FULL),
        dict(ACT=2, ADD=True, OWN=True, **TILE)),
    depthwise_forward=(dict(x=HALF, w=FULL, y=HALF), WINDOW),
    depthwise_input_grad=(dict(g=HALF, w=FULL, y=HALF), WINDOW),
    depthwise_weight_grad=(dict(x=HALF, g=HALF, part=FULL), WINDOW),
    separable_forward=(dict(x=HALF, w=FULL, y=HALF), DEEP), separable_input_grad=(dict(g=HALF, w=FULL, y=HALF), DEEP),
    separable_weight_grad=(dict(x=HALF, g=HALF, w=FULL, part=FULL), DEEP),
    pool_forward=(dict(x=HALF, y=HALF, best='*u8'), WINDOW), pool_backward=(dict(g=HALF, best='*u8', y=HALF), WINDOW),
    scale_backward=(dict(x=HALF, s=HALF, g=HALF, gx=HALF, part=FULL), TILE),
    scale_forward=(dict(x=HALF, s=HALF, y=HALF), TILE), volume_sums=(dict(x=HALF, part=FULL), TILE),
    join_sums=(dict(sums=FULL, table=FULL, grads=FULL), dict(BP=32, BC=32, OWN=True)),
    known_moments=({**dict.fromkeys(('table','w','b','running','running_var'), FULL), 'eps':'fp32'}, dict(BC=32)),
    pad_forward=(dict(x=HALF, y=HALF), dict(BC=2048)), pad_backward=(dict(g=HALF, y=HALF), dict(BC=2048)))
PASSES = {**dict.fromkeys('src out rows x sums counts most g a b mix table'.split(), FULL),
    'least':'fp32', 'seeds':'*i32'}
SIZES = dict(MODE=2, BH=8, BW=64, BLOCK=1024, BRAIN=True, BD=64, BN=64, RICIAN=True, BC=128)

def named_kernels():
    "Every kernel of both rooms: the function, types of what are no integers, and constants"
    for room in (kernels, passes):
        for name,f in vars(room).items():
            if not isinstance(f, on_card): continue
            types = {**PASSES, **(dict(counts='*i32') if name=='_count_levels' else {})}
            yield f,*(KERNELS[name[1:]] if room is kernels else (types,SIZES))

@pytest.mark.parametrize('capability', [75,90])
def test_kernels_compile_without_a_card(capability):
    "For a T4, as Kaggle lends it, and for an H100"
    triton = pytest.importorskip('triton')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    for f,types,constants in named_kernels():
        constants = {k: v for k,v in constants.items() if k in f.names}
        signature = {o: 'constexpr' if o in constants else types.get(o, 'i32') for o in f.names}
        fixed = {(f.names.index(o),):v for o,v in constants.items()}
        source = ASTSource(triton.jit(f.f), signature=signature, constexprs=fixed)
        assert triton.compile(source, target=GPUTarget('cuda', capability, 32)).asm['cubin'], f.f.__name__


def test_route():
    x = torch.zeros(1)
    assert route(x)=='cpu'
    with plain_operators(): assert route(x)=='plain'
    assert route(torch.zeros(1, device='meta'))=='plain'


def gradients(model, x, dtype):
    model = copy.deepcopy(model).to(dtype)
    y = model(x.to(dtype))
    F.binary_cross_entropy_with_logits(y, torch.tensor([[0.],[1],[1],[0]], device=x.device, dtype=dtype)).backward()
    grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    return y.detach().double(),torch.cat(grads),torch.cat([b.flatten().double() for b in model.buffers()])


def far(a, b): return ((a-b).norm()/(b.norm()+1e-9)).item()


NETS = [('resnet10',{}),('resnet18',{}),('resnet50',{}),('efficientnet_b0',{}),('efficientnet_b0',dict(depth='full')),
    ('efficientnet_b0',dict(depth_padding='zeros')),('efficientnet_b0',dict(one_pass=True)),
    ('densenet121',{}),('xception',{}),('resnet18',dict(depth='separable_all')),('resnet10',dict(checkpoint=True))]

@pytest.mark.cuda
@pytest.mark.parametrize('train', [True,False])
@pytest.mark.parametrize('arch,how', NETS)
def test_networks_on_a_card(arch, how, train, monkeypatch):
    "float32 on a card is as near to float64 as torch's own operators are, up to a factor"
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)
    torch.manual_seed(0)
    how = dict(how)
    together = one_pass() if how.pop('one_pass', False) else nullcontext()
    model = create_backbone(arch, pretrained=False, **how).cuda().train(train)
    for name,p in model.named_parameters():
        if name.endswith('.depth'): p.data += .1*torch.randn_like(p)
    x = torch.rand(4, 1, 32, 64, 64, device='cuda')
    assert route(x)=='card'
    with together: card = gradients(model, x, torch.float32)
    with plain_operators():
        plain,exact = (gradients(model, x, o) for o in (torch.float32,torch.float64))
    print(arch, how, train, *[f'{far(a, c):.1e} ({far(b, c):.1e})' for a,b,c in zip(card, plain, exact)])
    for a,b,c in zip(card, plain, exact):
        assert far(a, c)<=4*far(b, c)+1e-4 # a rectifier near zero may fall to the other side
