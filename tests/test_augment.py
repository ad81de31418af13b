"Laws of augmentation over random shapes, draws and settings, in the pipeline as a user runs it."
import json, os, pickle, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.data.core import TfmdDL
from fastcore.foundation import L
from mgmt_fast.augment import *
from mgmt_fast.core import MGMTError, TensorMR, get_recipe

EVERYTHING = dict(bias_field_p=.6, noise_p=.6, blur_p=.6, thick_slices_p=.6, equalize_p=.5, cutout_p=.5, lighting_p=.7,
    crop_resize=.9)
MAKERS = dict(default=lambda: mgmt_augs(get_recipe('default', **EVERYTHING), seed=5)[0],
    published=lambda: mgmt_augs('published', seed=5)[0],
    solid=lambda: mgmt_augs(get_recipe('default', in_plane=False, flip='dhw', **EVERYTHING), seed=5)[0])


def brains(b=3, c=2, d=9, h=37, w=30, dtype=torch.float32, seed=0):
    "Eggs with texture, air exactly 0"
    z,y,x = (torch.linspace(-1.1,1.1,n,dtype=dtype) if n>1 else torch.zeros(1,dtype=dtype) for n in (d,h,w))
    egg = z[:,None,None]**2+y[:,None]**2+x**2<1
    g = torch.Generator().manual_seed(seed)
    return (.2+.7*torch.rand(b,c,d,h,w,generator=g,dtype=dtype))*egg


def one(**params): return pd.DataFrame({k: [v] for k,v in params.items()})


@pytest.mark.parametrize('maker', MAKERS)
@pytest.mark.parametrize('shape', [(1,9,37,30), (2,5,16,16), (4,1,20,31), (1,16,33,65)])
def test_bits_do_not_depend_on_batch_or_threads(maker, shape):
    if maker=='solid' and shape[1]<2: pytest.skip('a single slice cannot be turned across slices')
    t,x = MAKERS[maker](),brains(5,*shape)
    before,p = x.clone(),t.draw(5, start=11)
    y = t.apply(x, p)
    assert torch.equal(x, before) and y.dtype==x.dtype and not torch.equal(y, x)
    assert y.isfinite().all() and 0<=y.min() and y.max()<=1
    for i in range(5): assert torch.equal(y[i:i+1], t.apply(x[i:i+1], p.iloc[[i]]))
    n = torch.get_num_threads()
    try:
        for k in (1,2,3): torch.set_num_threads(k); assert torch.equal(y, t.apply(x, p))
    finally: torch.set_num_threads(n)


@pytest.mark.parametrize('maker', MAKERS)
def test_a_written_draw_is_the_draw(maker):
    t,x = MAKERS[maker](),brains(4)
    p = t.draw(4)
    read = pd.DataFrame(json.loads(json.dumps(p.to_dict('records'))))
    assert torch.equal(t.apply(x, p), t.apply(x, read))
    assert t.draw(4, start=0).equals(p) and pickle.loads(pickle.dumps(t)).draw(4, start=0).equals(p)
    assert t.drawn==4 and not t.draw(4).reset_index(drop=True).equals(p.reset_index(drop=True))


def test_magnitudes_stay_within_what_the_recipe_says():
    r = get_recipe('default', **EVERYTHING, in_plane=False)
    p = mgmt_augs(r)[0].draw(400)
    for k in ('turn_d','turn_h','turn_w'): assert .9*r.rotation<p[k].abs().max()<=r.rotation
    for k in ('shift_d','shift_h','shift_w'): assert .9*r.shift<p[k].abs().max()<=r.shift
    assert .9*r.zoom<(p.zoom-1).abs().max()<=r.zoom
    assert (p.contrast-1).abs().max()<=r.contrast and (p.brightness-1).abs().max()<=r.brightness
    assert np.abs(np.log(p.gamma)).max()<=r.gamma
    for k,v in dict(bias=r.bias_field, noise=r.noise, blur=r.blur, thick=r.thick_slices).items():
        assert .9*v<p[k].max()<=v and abs((p[k]>0).mean()-.6)<.08
    assert abs(p.flip_w.mean()-.5)<.08 and 'flip_h' not in p
    q = mgmt_augs('published')[0].draw(400)
    assert q.frac_h.abs().max()<=.1 and .18<q.frac_w.abs().max()<=.2
    assert q.turn_d.abs().max()<=3.6 and (q.window==.97).all()
    assert q.contrast.min()>=.4 and q.contrast.max()<=1.6 and 'cutout' not in q
    assert abs(q.equalize.mean()-.5)<.08 and abs(q.flip_h.mean()-.5)<.08


@pytest.mark.parametrize('in_plane', [True,False])
def test_turning_back_restores_the_interior_of_an_anisotropic_grid(in_plane):
    mm = np.array([3.,1.,1.4])
    z,y,x = (torch.linspace(-1,1,n) for n in (24,72,52))
    v = (torch.exp(-(z[:,None,None]**2+y[:,None]**2+x**2))*(.6+.3*torch.cos(3*y[:,None]+2*z[:,None,
        None])*torch.sin(3*x)))[None,None]
    t,axis = RandAffine(in_plane=in_plane),'turn_d' if in_plane else 'turn_h'
    back = t.apply(t.apply(v, one(**{axis: 9.}), mm), one(**{axis: -9.}), mm)
    inner = np.s_[...,6:-6,16:-16,12:-12]
    assert (back-v)[inner].abs().max()<.01
    wrong = t.apply(t.apply(v, one(**{axis: 9.}), mm), one(**{axis: -9.}), [1,1,1])
    assert (wrong-v)[inner].abs().max()>.02


def test_3d_and_in_plane_agree_where_both_can_do_it():
    v,mm = brains(1,1,8,40,36),[4.,1.,1.3]
    p = one(turn_d=7., shift_h=2., shift_w=-3.)
    flat = RandAffine().apply(v, p, mm)
    solid = RandAffine(in_plane=False).apply(v, p.assign(shift_d=1e-9), mm)
    assert (flat-solid).abs().max()<1e-4
    assert torch.equal(RandAffine(flip='d').apply(v, p.assign(flip_d=1), mm), flat.flip(2))


def test_all_sequences_move_alike():
    where = torch.arange(9*37*30.).view(1,1,9,37,30).expand(3,4,-1,-1,-1)
    for t in (RandAffine(flip='dhw', crop_resize=.8), RandAffine(in_plane=False, outside='border')):
        y = t.apply(where, t.draw(3))
        assert all(torch.equal(y[:,c], y[:,0]) for c in range(4)) and not torch.equal(y[0], y[1])


def test_zero_magnitude_is_the_identity_to_the_bit():
    x = brains()
    zero = [RandAffine('',0,0,(0,0),0,1), RandLighting(0,0,0,1), RandBiasField(0,1), RandNoise(0,1), RandBlur(0,1),
        RandThickSlices(0,1), RandEqualize(0), RandCutOut(0,1)]
    for t in (*zero, ComposeAugs(zero)): assert torch.equal(t.apply(x, t.draw(x)), x), t
    assert mgmt_augs('none')==[]


@pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
def test_type_attributes_labels_and_dtype_are_kept(dtype):
    x = TensorMR(brains()).to(dtype); x.affine = np.diag([2.,1,1,1])
    y = torch.tensor([0.,1,float('nan')])
    for t in mgmt_augs('default'):
        a,b = t((x,y), split_idx=0)
        assert type(a) is TensorMR and a.dtype==dtype and np.array_equal(a.affine, x.affine) and b is y
        assert t((x,y), split_idx=1)[0] is x


def test_spacing_is_taken_from_the_batch():
    x,p = TensorMR(brains(2)),pd.concat([one(turn_d=9.)]*2)
    x.spacing = torch.tensor([[3.,1,1],[3,1,1.6]])
    y = RandAffine().apply(x, p)
    for i in range(2):
        assert torch.equal(y[i:i+1].as_subclass(torch.Tensor),
            RandAffine().apply(brains(2)[i:i+1], p[:1], x.spacing[i]))


class Items(L): split_idx = 0


@pytest.mark.slow
@pytest.mark.parametrize('workers', [1,2,3])
def test_an_epoch_does_not_depend_on_workers(workers):
    items = Items((TensorMR(o),torch.tensor(float(i))) for i,o in enumerate(brains(7)))
    def epoch(bs, n):
        return [torch.cat(o) for o in zip(*TfmdDL(items, bs=bs, num_workers=n, after_batch=MAKERS['default']()))]
    a,b = epoch(3,0),epoch(2,workers)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


BAD = [
    (lambda x: x[0], 'B,C,D,H,W'), (lambda x: x[None], 'B,C,D,H,W'), (lambda x: x[:0], 'none empty'),
    (lambda x: x.half(), 'float16'), (lambda x: x.bfloat16(), 'bfloat16'),
    (lambda x: (255*x).byte(), 'uint8'), (lambda x: x.long(), 'int64'),
    (lambda x: x.masked_fill(x>.5, torch.nan), 'NaN'), (lambda x: x.masked_fill(x>.5, torch.inf), 'inf'),
    (lambda x: x-.1, '0 to 1'), (lambda x: 255*x, '0 to 1'), (lambda x: x.numpy(), 'ndarray')]


@pytest.mark.parametrize('spoil,said', BAD)
def test_a_bad_batch_is_refused(spoil, said):
    with pytest.raises(MGMTError, match=said): mgmt_augs('default')[0]((spoil(brains()),torch.zeros(3)), split_idx=0)


RANGES = dict(rotation=(-1,181,float('nan'),'3',None,True), shift=(-1,), zoom=(-.1,1), crop_resize=(0,1.1),
    contrast=(-.1,1.1), brightness=(-1,), gamma=(-1,), lighting_p=(-.1,1.1), bias_field=(-1,), bias_field_p=(2,),
    noise=(-.1,2), noise_p=(-1,), blur=(-1,), thick_slices=(-1,), equalize_p=(7,), cutout=(-1,2), cutout_p=(1.01,),
    flip=('x','width',1), outside=('wrap',), contrast_over=('head',), equalize_over=('',), noise_kind=('salt',),
    shift_fraction=((.1,),(.1,2),(.1,.1,.1)))


@pytest.mark.parametrize('name,value', [(k,v) for k,vs in RANGES.items() for v in vs])
def test_a_magnitude_out_of_range_is_refused_with_its_value(name, value):
    with pytest.raises(MGMTError) as e: mgmt_augs(get_recipe('default', **{name: value}))
    shown = value[1] if name=='shift_fraction' and len(value)==2 and value[1]==2 else value
    assert repr(shown) in str(e.value)


def test_flat_empty_and_thin_volumes():
    t = MAKERS['default']()
    for x in (torch.zeros(3,1,5,16,16), brains(3,1,1,20,20), torch.ones(3,2,4,8,8), torch.full((3,1,1,1,1),.5),
            brains(3)*torch.tensor([1.,0])[:,None,None,None]):
        y = t.apply(x, t.draw(3))
        assert y.shape==x.shape and y.isfinite().all()
        assert not y[:,~x.any(4).any(3).any(2).any(0)].any()


def test_air_stays_air_in_default():
    t,x = mgmt_augs(get_recipe('default', flip='', rotation=0., shift=0., zoom=0., bias_field_p=1., noise_p=1.,
        blur_p=1., thick_slices_p=1., lighting_p=1., equalize_p=1.))[0],brains(6)
    assert torch.equal(t.apply(x, t.draw(6))==0, x==0)


def test_test_time_views_average_logits():
    x = brains()
    net = torch.nn.Sequential(torch.nn.Conv3d(2,3,3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool3d(1),
        torch.nn.Flatten(), torch.nn.Linear(3,1)).eval()
    views = tta_views()
    assert len(views)==10 and not views.iloc[0].any()
    t = RandAffine()
    with torch.no_grad(): each = [net(t.apply(x, views.iloc[[i]*3])) for i in range(10)]
    torch.testing.assert_close(tta(net, x), torch.stack(each).mean(0))
    torch.testing.assert_close(tta(net, x, get_recipe('default', tta_shift=0.)),
        tta(net, x.flip(-1), get_recipe('default', tta_shift=0.)))
    assert torch.equal(tta(net, x, 'none'), net(x).detach()) and tta(net, x).requires_grad is False


@pytest.mark.parametrize('t', [RandAffine(shift=4.), RandLighting(p=.8), RandLighting(p=.8, over='slice'),
    RandEqualize(p=.5), RandEqualize(p=.5, over='slice')], ids=repr)
def test_patients_together_as_a_gpu_takes_them_come_out_as_alone(t):
    x = brains(5)
    params = t.draw(5)
    rows = [{**t.neutral, **{k:v for k,v in r.items() if v==v}} for r in params.to_dict('records')]
    out = torch.empty_like(x)
    at = [i for i,r in enumerate(rows) if t.fits(r)]
    src,out = x[at],out[at]
    t.together(src, out, [rows[i] for i in at], t._spacing(src, None))
    alone = t.apply(x, params)[at]
    torch.testing.assert_close(out, alone, atol=0 if isinstance(t, RandEqualize) else 1e-5, rtol=0)
    assert len(at)>1 and not torch.equal(out, src)


KERNELS = """import os, sys
os.environ['TRITON_INTERPRET'] = '1'
import torch, mgmt_fast.augment as augment
from test_augment import MAKERS, brains

def apply(t, x, p, kernels):
    augment.passes_fit = lambda x: kernels
    return t.apply(x, p)

for shape in ((2,7,21,18), (1,5,16,16)):
    t,x = MAKERS[sys.argv[1]](),brains(3,*shape)
    p = t.draw(3, start=11)
    quiet = p.assign(noise=0.) if 'noise' in p else p
    plain,y = apply(t, x, quiet, False),apply(t, x, quiet, True)
    torch.testing.assert_close(y, plain, atol=1e-4, rtol=0)
    assert torch.equal(y==0, plain==0) and not torch.equal(y, x)
    noisy = apply(t, x, p, True)
    for i in range(3): assert torch.equal(noisy[i:i+1], apply(t, x[i:i+1], p.iloc[[i]], True))
"""


@pytest.mark.parametrize('maker', MAKERS)
def test_kernels_of_a_card_do_what_a_cpu_does(maker):
    pytest.importorskip('triton')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, '-c', KERNELS, maker], check=True, env=env)


@pytest.mark.cuda
@pytest.mark.parametrize('maker', MAKERS)
def test_on_a_gpu_bits_do_not_depend_on_the_batch(maker):
    t,x = MAKERS[maker](),brains(5).cuda()
    p = t.draw(5, start=11)
    y = t.apply(x, p)
    assert y.isfinite().all() and 0<=y.min() and y.max()<=1 and not torch.equal(y, x)
    for i in range(5): assert torch.equal(y[i:i+1], t.apply(x[i:i+1], p.iloc[[i]]))


@pytest.mark.cuda
@pytest.mark.parametrize('maker', MAKERS)
def test_without_triton_a_gpu_does_it_in_more_passes(maker, monkeypatch):
    t,x = MAKERS[maker](),brains(5).cuda()
    p = t.draw(5, start=11)
    quiet = p.assign(noise=0.) if 'noise' in p else p
    y = t.apply(x, quiet)
    monkeypatch.setattr('mgmt_fast.augment.passes_fit', lambda x: False)
    torch.testing.assert_close(t.apply(x, quiet), y, atol=.02 if 'equalize' in p else 1e-4, rtol=0)


@pytest.mark.cuda
@pytest.mark.parametrize('kind', ['rician','gaussian'])
def test_noise_of_a_gpu_has_its_size_and_its_seed(kind):
    t,x = RandNoise(kind=kind),torch.full((2,1,16,64,64), .5, device='cuda')
    p = pd.DataFrame(dict(noise=[.04,.02], noise_seed=[3,4]))
    y = t.apply(x, p)
    for i,s in enumerate(p.noise): assert abs(y[i].std()-s)<.03*s and abs(y[i].mean()-.5)<.003
    assert torch.equal(t.apply(x, p), y)
    assert not torch.equal(t.apply(x, p.assign(noise_seed=[3,5]))[1], y[1])

@pytest.mark.cuda
@pytest.mark.parametrize('maker', MAKERS)
def test_on_a_gpu_nothing_waits_and_draws_repeat(maker):
    t,x = MAKERS[maker](),brains(4).cuda()
    p = t.draw(4)
    y = t.apply(x, p)
    torch.cuda.set_sync_debug_mode('error') # any wait raises
    try: again = t.apply(x, p); t((x,torch.zeros(4)), split_idx=0)
    finally: torch.cuda.set_sync_debug_mode('default')
    assert again.device==x.device and torch.equal(y, again)
    quiet = p.assign(**{k: 0. for k in ('noise',) if k in p})
    torch.testing.assert_close(t.apply(x, quiet).cpu(), t.apply(x.cpu(), quiet), atol=.02 if 'equalize' in p else 1e-4,
        rtol=0)


@pytest.mark.real
def test_a_real_brain_keeps_its_mean_and_its_range(data):
    from mgmt_fast.series import read_volume
    v = torch.from_numpy(np.asarray(read_volume(next(data.glob('brats/BraTS-GLI-00001-000/*t2f.nii.gz'))),
        dtype=np.float32))[::2]
    x = (v/np.quantile(v[v>0],.995)).clamp(0,1)[None,None]
    mm = [2.,1.,1.]
    for k in range(4):
        p = RandAffine(shift=2., zoom=.02).draw(1, start=k)
        y,mask = RandAffine().apply(torch.cat([x,(x>0).float()],1), p, mm)[0]
        assert abs((y.sum()/mask.sum())/(x.sum()/(x>0).sum())-1)<.01
