"""Each choice that makes the recipe `published` the thesis', against a formula written from the thesis' code alone.

The formulas use numpy, scipy and Pillow, and none of the code that they judge. What Keras does unasked was read in its
documentation and run in Keras 2.12; where a number below came from such a run, the line says so."""
import math
from functools import cache

import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from scipy import ndimage, signal

import mgmt_fast.all # all rooms, so that all choices are there
from mgmt_fast.augment import RandAffine, RandLighting, RandEqualize, mgmt_augs, tta_views
from mgmt_fast.callbacks import FusedAdam
from mgmt_fast.core import Recipe, get_recipe, rng_for
from mgmt_fast.backbones import freeze_body
from mgmt_fast.learner import mgmt_learner, recipe_dls, settle_precision
from mgmt_fast.leakage import published_similarity
from mgmt_fast.networks import create_network
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare
from mgmt_fast.recipes import faults, thesis_choices
from mgmt_fast.slicewise import read_stack, slicewise, slicewise_patient

P = get_recipe('published')
ARCHS = ('efficientnet_b1','efficientnet_b3','xception','densenet121')
NORMS = dict(efficientnet_b1=3, efficientnet_b3=3, xception=5, densenet121=4) # that move; run in Keras 2.12
LAYERS = dict(efficientnet_b1=8, efficientnet_b3=8, xception=10, densenet121=8) # with weights, of its last 15; likewise
CHECKS = {}


def checks(*choices):
    "The test below is the check of these choices"
    def add(f):
        CHECKS.update(dict.fromkeys(choices, f.__name__))
        return f
    return add


# ---- the loader, slice by slice

def thesis_bytes(data):
    data = data-np.min(data)
    if not data.any(): return np.zeros(data.shape, np.uint8)
    return (data/np.max(data)*255).astype(np.uint8)


def thesis_crop(image):
    rows,cols = np.where(np.max(image, 0)>0)[0],np.where(np.max(image, 1)>0)[0]
    return image[cols[0]:cols[-1]+1, rows[0]:rows[-1]+1] if rows.size else image[:,:1]


def bilinear(image, size):
    "As OpenCV's default: centres of pixels are halves, what lies outside is the edge; not rounded"
    for axis,m in enumerate(size):
        n = image.shape[axis]
        at = np.clip((np.arange(m)+.5)*n/m-.5, 0, n-1)
        lo = np.floor(at).astype(int)
        hi,w = np.minimum(lo+1, n-1),at-lo
        w = w[:,None] if axis==0 else w
        image = np.take(image, lo, axis)*(1-w)+np.take(image, hi, axis)*w
    return image


def thesis_slices(stack, depth, height, width):
    "Those that are neither replaced nor invented, as the network's input holds them, before rounding"
    mid = len(stack)//2
    picked = stack[max(0, mid-depth//2):mid+depth//2]
    done = [bilinear(thesis_crop(thesis_bytes(o)).astype(float), (width,height)) for o in picked]
    return np.array(done).T.transpose(2,0,1)


def stack_of(n, seed=0):
    "A head in noise: faint rims, which become black as bytes"
    rng,(z,y,x) = rng_for(seed, 'stack'),np.mgrid[:n,:40,:50]
    head = ((z-n/2)/(n/2+1))**2+((y-19)/15)**2+((x-23)/18)**2<1
    faint = ((y-19)/18)**2+((x-23)/22)**2<1
    return np.where(head, rng.integers(300, 1000, head.shape), np.where(faint, 2, 0)).astype(np.float32)


@checks('slice_pick','box_of','crop_by','range_by','transpose','size','short_series')
@pytest.mark.parametrize('n', [24, 25, 37])
def test_the_loader(n):
    D,H,W = 24,20,28
    r = get_recipe(P, size=(D,H,W))
    ours,theirs = slicewise(stack_of(n), 'FLAIR', r).astype(float),thesis_slices(stack_of(n), D, H, W)
    assert ours.shape==theirs.shape==(D,H,W) and abs(ours-theirs).max()<=.5+1e-3, 'a rounding'
    raw = slicewise(stack_of(n), 'FLAIR', get_recipe(r, box_of='raw')).astype(float)
    assert abs(raw-theirs).max()>50, 'the rim counts in one box and not in the other'
    assert P.size==(64,256,256), "the text's; the code has 64x128x128"


@checks('wrap_start')
@pytest.mark.parametrize('n', [1, 23, 24, 30, 47, 48, 63])
def test_the_start_that_wraps(n):
    D = 48
    written = stack_of(n)[(n//2)-(D//2):(n//2)+(D//2):1]
    r = get_recipe(P, size=(D,16,16), wrap_start=True, black_slices='keep', short_series='zeros')
    if not len(written): return
    kept = slicewise(stack_of(n), 'FLAIR', r).any((1,2)).sum()
    assert kept==len(written) and not P.wrap_start, 'the recipe does what was intended, the choice what was written'


@checks('black_slices')
def test_black_slices_are_replaced_by_others():
    x = stack_of(30)
    x[[12,15,20]] = 0
    r = get_recipe(P, size=(24,20,20))
    ours,every = slicewise(x, 'T2w', r),thesis_slices(x[x.any((1,2))], 64, 20, 20)
    for i in range(24):
        nearest = abs(every-ours[i]).max((1,2)).min()
        assert ours[i].any() and nearest<=.5+1e-3, 'each slice is one of those that are not black'


@pytest.mark.parametrize('seq,gain', [('FLAIR',1.2),('T1w',1.1),('T1wCE',1.2),('T2w',1.1)])
def test_short_series_are_filled_with_brightened_copies(seq, gain):
    ours = slicewise(stack_of(6), seq, get_recipe(P, size=(10,20,20)))
    for i in range(6, 10): # of any slice before it
        copies = np.clip(np.round(ours[:i].astype(float)*gain), 0, 255)
        assert (copies==ours[i]).all((1,2)).any()


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    d = tmp_path_factory.mktemp('formulas')
    make_phantom(d/'scans', n=14, test=0, auc=.9, seed=2, slices=12, size=32, shuffle=True, sequences=('FLAIR','T1wCE'),
        progress=False)
    return kaggle_cohort(d/'scans')


@checks('slice_order')
def test_slices_in_the_order_of_their_names(cohort):
    from pathlib import Path
    folder = Path(cohort.FLAIR[0])
    paths = sorted(map(str, folder.glob('*')), key=lambda x: int(x[:-4].split('-')[-1]))
    theirs = np.stack([pydicom.dcmread(p).pixel_array for p in paths])
    assert (read_stack(folder, P.slice_order)==theirs).all() and (read_stack(folder, 'position')!=theirs).any()


@checks('prepare_by')
def test_sequences_are_prepared_without_looking_at_each_other(cohort):
    r = get_recipe(P, size=(8,16,16))
    row = cohort.iloc[0]
    both = slicewise_patient(row, ('FLAIR','T1wCE'), r).arrays
    for s in both: assert (both[s]==slicewise_patient(row, (s,), r).arrays[s]).all()


# ---- augmentation

def brain(D=3, H=48, W=40):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, D, H, W, generator=g)
    return (F.avg_pool3d(x, (1,7,7), 1, (0,3,3))*255).round()/255


def affine(r=P):
    part = next(p for p in mgmt_augs(r)[0].parts if isinstance(p, RandAffine))
    return part, lambda **k: part.apply(brain(), pd.DataFrame([k]))[0,0].numpy()


X = brain()[0,0].numpy()


@checks('flip')
def test_flips():
    part,moved = affine()
    assert part.flip=='hw'
    for axis,name in ((1,'flip_h'),(2,'flip_w')): assert (moved(**{name:1})==np.flip(X, axis)).all()
    draws = part.draw(400)
    assert all(.4<draws[c].mean()<.6 for c in ('flip_h','flip_w')) and 'flip_d' not in draws


@checks('shift_fraction','shift','outside','use_spacing')
def test_translation_by_a_tenth_and_a_fifth_with_reflection():
    part,moved = affine()
    draws = part.draw(4000)
    for c,most in (('frac_h',.1),('frac_w',.2)): assert most*.97<draws[c].abs().max()<=most
    for h,w in ((.0625,0.),(0.,.15),(.031,-.19)):
        theirs = np.stack([ndimage.shift(o, (h*48,w*40), order=1, mode='reflect') for o in X])
        np.testing.assert_allclose(moved(frac_h=h, frac_w=w), theirs, atol=1e-5)
    part.spacing = np.array([7.,2.,3.])
    np.testing.assert_allclose(moved(frac_h=.05), affine()[1](frac_h=.05))


@checks('rotation','zoom')
def test_rotation_by_a_hundredth_of_a_turn():
    part,moved = affine()
    draws = part.draw(4000)
    assert 3.5<draws.turn_d.abs().max()<=.01*360 and 'zoom' not in draws
    a,c = math.radians(3.),(np.array(X.shape[1:])-1)/2
    m = np.array([[math.cos(a),-math.sin(a)],[math.sin(a),math.cos(a)]])
    ways = [np.stack([ndimage.affine_transform(o, k, c-k@c, order=1, mode='reflect') for o in X]) for k in (m,m.T)]
    assert min(abs(moved(turn_d=3.)-o).max() for o in ways)<1e-5, 'about the centre, one way or the other'


@checks('contrast','contrast_over','lighting_p','brightness','gamma')
def test_contrast_about_the_mean_of_each_slice():
    part = next(p for p in mgmt_augs(P)[0].parts if isinstance(p, RandLighting))
    draws = part.draw(4000)
    assert .4<=draws.contrast.min()<.41 and 1.59<draws.contrast.max()<=1.6
    assert (draws.brightness==1).all() and (draws.gamma==1).all() and (draws.contrast!=1).all()
    for c in (.4,1.6):
        mean = X.mean((1,2), keepdims=True)
        theirs = np.clip((X-mean)*c+mean, 0, 1)
        ours = part.apply(brain(), pd.DataFrame([dict(contrast=c)]))[0,0].numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@checks('equalize_over','equalize_p')
def test_each_slice_is_equalised_as_an_image():
    part = next(p for p in mgmt_augs(P)[0].parts if isinstance(p, RandEqualize))
    assert .4<part.draw(500).equalize.mean()<.6, 'how often is not given: ours'
    images = (X*255).round().astype(np.uint8)
    theirs = np.stack([np.asarray(ImageOps.equalize(Image.fromarray(o))) for o in images])/255
    ours = part.apply(brain(), pd.DataFrame([dict(equalize=1)]))[0,0].numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


@checks('crop_resize','crop_after_contrast')
def test_the_crop_comes_last_and_is_resized():
    whole = mgmt_augs(P, seed=3)[0]
    names = [type(p).__name__ for p in whole.parts]
    assert names==['RandEqualize','RandAffine','RandLighting','RandCropResize'], 'in the order of the code'
    crop,draws = whole.parts[-1],whole.parts[-1].draw(3000)
    h,w = int(48*.97),int(40*.97)
    seen = set()
    for u,v in draws[['window_h','window_w']].head(60).to_numpy():
        ours = crop.apply(brain(), pd.DataFrame([dict(window=.97, window_h=u, window_w=v)]))[0,0].numpy()
        ways = {(i,j): np.stack([bilinear(o[i:i+h,j:j+w], (48,40)) for o in X])
            for i in range(48-h+1) for j in range(40-w+1)}
        near = [k for k,o in ways.items() if abs(o-ours).max()<1e-5]
        assert len(near)==1
        seen.add(near[0])
    assert len(seen)==(48-h+1)*(40-w+1), 'every place is drawn'
    x,row = brain(),whole.draw(1)
    for p in whole.parts: x = p.apply(x, row[[c for c in row if c in p.neutral]])
    torch.testing.assert_close(whole.apply(brain(), row), x)


@checks('bias_field','bias_field_p','noise','noise_p','blur','blur_p','thick_slices','thick_slices_p')
def test_there_is_nothing_else():
    names = {type(p).__name__ for p in mgmt_augs(P)[0].parts}
    assert names=={'RandEqualize','RandAffine','RandLighting','RandCropResize'}


@checks('tta_flip','tta_shift')
def test_patients_are_predicted_once(): assert len(tta_views(P))==1


# ---- training

@pytest.fixture(scope='module')
def store(cohort, tmp_path_factory):
    r = get_recipe(P, size=(8,32,32))
    return prepare(cohort, tmp_path_factory.mktemp('store')/'s', 'FLAIR,T1wCE', recipe=r, n_workers=1, progress=False)


def learner(store, path, **choices):
    r = get_recipe(P, size=(8,32,32), pretrained=False, sequences=('FLAIR',), bs=4, **choices)
    return mgmt_learner(recipe_dls(store, r, n_folds=3), recipe=r, path=path)


@checks('shuffle','shuffle_2d','drop_last')
def test_order_and_batches(store, tmp_path):
    n = len(learner(store, tmp_path).dls.train.dataset)
    for network,sorted_ in (('3d',True),('2d',False)):
        dl = learner(store, tmp_path, network=network).dls.train
        orders = [list(dl.get_idxs()) for _ in range(3)]
        assert all(o==list(range(n)) for o in orders)==sorted_
        assert len(dl)==n//4, 'drop_remainder'


@checks('lr','schedule','patience','summed_batches')
def test_settings_of_the_table(store, tmp_path):
    learn = learner(store, tmp_path)
    cbs = {type(c).__name__: c for c in learn.cbs}
    assert learn.lr==1e-4 and cbs['EarlyStoppingCallback'].patience==3 and 'SummedGradients' not in cbs
    assert {'ReduceLROnPlateau','SaveBest','HistoryLogger'}<=set(cbs) and P.schedule=='flat'
    assert (P.bs, P.epochs, P.summed_batches)==(8, 10, 1), 'the number of batches that are summed is not given'


def test_gradients_are_summed_and_carried_over():
    "What `SummedGradients` does to a linear model, beside the thesis' counter and buffers"
    from mgmt_fast.recipes import SummedGradients
    from fastai.basics import DataLoader, DataLoaders, Learner, MSELossFlat, SGD
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    y = x.sum(1)
    dls = DataLoaders(DataLoader(list(zip(x,y)), bs=2), DataLoader(list(zip(x,y)), bs=6))
    torch.manual_seed(0)
    learn = Learner(dls, torch.nn.Linear(3,1), MSELossFlat(), opt_func=SGD, lr=.1, wd=0., cbs=SummedGradients(2))
    w,b = (p.detach().clone() for p in learn.model.parameters())
    step,acc = 0,[torch.zeros_like(w),torch.zeros_like(b)]
    for _ in range(3):
        for i in range(0, 6, 2):
            step += 1
            e = x[i:i+2]@w.T+b-y[i:i+2,None]
            for a,g in zip(acc, ((2*e*x[i:i+2]).mean(0)[None],(2*e).mean(0))): a += g
            if step==2:
                w,b = w-.1*acc[0],b-.1*acc[1]
                step,acc = 0,[torch.zeros_like(w),torch.zeros_like(b)]
    with learn.no_bar(), learn.no_logging(): learn.fit(3)
    torch.testing.assert_close(learn.model.weight.detach(), w)
    torch.testing.assert_close(learn.model.bias.detach(), b)


@checks('l2')
def test_the_penalty(store, tmp_path):
    from mgmt_fast.recipes import L2Penalty
    learn = learner(store, tmp_path)
    cb = next(c for c in learn.cbs if isinstance(c, L2Penalty))
    learn.loss_grad = torch.zeros(())
    cb.learn = learn
    cb.after_loss()
    parts = [p.detach().numpy() for p in learn.model.parameters() if p.requires_grad]
    theirs = 1e-5*sum((o.astype(float)**2).sum()/2 for o in parts)
    assert float(learn.loss_grad.detach())==pytest.approx(theirs, rel=1e-5)
    assert sum(o.size for o in parts)==84+43649, 'of adapter and head'


@checks('precision')
def test_keras_computes_in_float32(): assert settle_precision(P, 'cuda').precision=='float32'


@checks('adam')
def test_keras_adam(store, tmp_path):
    make = learner(store, tmp_path).opt_func
    p = torch.nn.Parameter(torch.tensor([1.,-2.,3e-3]))
    opt = make([p], lr=1e-3, wd=0.)
    g = torch.Generator().manual_seed(3)
    w,m,v = p.detach().double().numpy(),0.,0.
    for t in range(1, 8):
        grad = torch.randn(3, generator=g)*torch.tensor([1.,1e-3,1e-8])
        p.grad = grad.clone()
        opt.step()
        d = grad.double().numpy()
        m,v = .9*m+.1*d,.999*v+.001*d*d
        w = w-1e-3*math.sqrt(1-.999**t)/(1-.9**t)*m/(np.sqrt(v)+1e-7)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-5, atol=1e-8)
    fast = FusedAdam([torch.nn.Parameter(torch.ones(1))], lr=1.)
    assert (fast.hypers[0]['sqr_mom'], fast.hypers[0]['eps'], fast.keras)==(.99,1e-5,False), 'the default is as it was'


# ---- the network

@cache
def network(arch, **choices):
    torch.manual_seed(0)
    r = get_recipe(P, pretrained=False, **choices)
    return create_network(arch=arch, in_chans=1, anisotropic=2, **r.room('backbones'))


@checks('freeze')
@pytest.mark.parametrize('arch', ARCHS)
def test_nothing_in_the_backbone_trains_but_statistics_drift(arch):
    "As run in Keras 2.12 on the 2D twins: no weight trains, and the norms of the last 15 layers follow their batches"
    model = network(arch).train()
    trains = {n for n,p in model.named_parameters() if p.requires_grad}
    assert trains=={n for n,_ in model.named_parameters() if n.startswith(('head.','body.adapter.'))}
    before = {k:v.clone() for k,v in model.body.net.state_dict().items()}
    with torch.no_grad(): model(torch.rand(2,1,16,64,64))
    moved = {k for k,v in model.body.net.state_dict().items() if (v!=before[k]).any()}
    assert len({k.rpartition('.')[0] for k in moved})==NORMS[arch]
    assert {k.rpartition('.')[2] for k in moved}=={'running_mean','running_var','num_batches_tracked'}
    variant = freeze_body(model, 'all_but_keras=10,batchnorm,weights')
    assert (variant.weights=='frozen').all() and not (variant.statistics=='trained').any()
    intent = freeze_body(model, 'all_but_keras=15')
    layers = {n.removesuffix('.pointwise').removesuffix('.conv1') for n in intent.layer[intent.weights=='trained']}
    if arch!='xception': layers = set(intent.layer[intent.weights=='trained'])
    assert len(layers)==LAYERS[arch]
    freeze_body(model, P.freeze)


@checks('stem')
def test_the_adapter():
    model,x = network('efficientnet_b1'),torch.rand(1,1,4,6,5)
    w,b = (p.detach().numpy() for p in model.body.adapter.parameters())
    ours = model.body.adapter(x)[0].detach().numpy()
    for o in range(3):
        theirs = signal.correlate(x[0,0].numpy(), w[o,0], 'same')+b[o]
        np.testing.assert_allclose(ours[o], theirs, atol=1e-5)


@checks('standardize','double_rescale')
@pytest.mark.parametrize('arch', ARCHS)
def test_rescaling_behind_the_adapter_in_efficientnets_only(store, tmp_path, arch):
    model = learner(store, tmp_path, arch=arch).model.eval()
    seen = {}
    model.body.inside.register_forward_hook(lambda m, i, o: seen.update(x=o))
    x = torch.rand(1,1,8,32,32)
    with torch.no_grad():
        model(x)
        y = model.body.adapter(x).numpy()
    if arch.startswith('efficientnet'):
        mean,std = (np.array(model.body.net.pretrained_cfg[k]).reshape(1,3,1,1,1) for k in ('mean','std'))
        y = (y/255-mean)/std
    np.testing.assert_allclose(seen['x'].numpy(), y, atol=2e-5)


@checks('depth','depth_padding','pretrained')
def test_kernels_are_repeated_along_the_depth_and_padded_with_zeros(tmp_path):
    import safetensors.torch as st, timm
    torch.manual_seed(1)
    flat = timm.create_model('efficientnet_b0', num_classes=0).state_dict()
    st.save_file(flat, tmp_path/'efficientnet_b0.safetensors')
    r = get_recipe(P, pretrained=tmp_path)
    assert P.pretrained is True
    model = create_network(arch='efficientnet_b0', in_chans=1, anisotropic=2, **r.room('backbones'))
    conv,name = model.body.net.blocks[2][1].conv_dw,'blocks.2.1.conv_dw.weight'
    k = flat[name].shape[-1]
    kernel = np.repeat(flat[name].numpy()[:,:,None], k, 2)/k
    np.testing.assert_allclose(conv.weight.detach().numpy(), kernel, rtol=1e-6)
    x = torch.rand(1, conv.in_channels, 5, 7, 6)
    ours = conv(x)[0].detach().numpy()
    for c in (0,3):
        theirs = signal.correlate(x[0,c].numpy(), kernel[c,0], 'same')
        np.testing.assert_allclose(ours[c], theirs, atol=1e-5)


@checks('head')
def test_the_head():
    head,f = network('efficientnet_b1').head.eval(),torch.randn(3,1280,1,2,2)
    d = {k:v.numpy() for k,v in head.state_dict().items()}
    def norm(x, k):
        z = (x-d[f'{k}.running_mean'])/np.sqrt(d[f'{k}.running_var']+1e-3)
        return z*d[f'{k}.weight']+d[f'{k}.bias']
    x = norm(f.numpy().mean((2,3,4)), 'bn1')
    x = norm(np.maximum(x@d['fc1.weight'].T+d['fc1.bias'], 0), 'bn2')
    with torch.no_grad(): np.testing.assert_allclose(head(f).numpy(), x@d['fc.weight'].T+d['fc.bias'], atol=1e-4)
    drops = [m.p for m in head.modules() if isinstance(m, torch.nn.Dropout)]
    assert drops==[.4,.4] and d['fc1.weight'].shape[0]==32


@checks('init')
def test_glorot():
    model = network('efficientnet_b1')
    for m,fans in ((model.body.adapter,27+81),(model.head.fc1,1280+32),(model.head.fc,32+1)):
        w,most = m.weight.detach().numpy(),math.sqrt(6/fans)
        assert abs(w).max()<=most and not m.bias.detach().any()
        assert w.std()==pytest.approx(most/math.sqrt(3), rel=.25)


@checks('batch_norm')
@pytest.mark.parametrize('arch,eps,kept', [('efficientnet_b1',1e-3,.99), ('efficientnetv2_b3',1e-3,.9),
    ('xception',1e-3,.99), ('densenet121',1.001e-5,.99)])
def test_batch_norm_of_keras(arch, eps, kept):
    "eps and momentum of the 2D twins, as Keras 2.12 has them"
    norms = [m for m in network(arch).body.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert {m.eps for m in norms}=={eps}
    m = norms[-1].train()
    x = torch.randn(4, m.num_features, 1, 2, 2)
    old = m.running_mean.clone()
    m(x)
    torch.testing.assert_close(m.running_mean, kept*old+(1-kept)*x.mean((0,2,3,4)))
    for o in (network(arch).head.bn1,network(arch).head.bn2): assert (o.eps, 1-o.momentum)==(1e-3, .99)


@checks('arch')
def test_the_architecture_of_the_text():
    assert P.arch=='efficientnet_b1' and 'efficientnetv2_b3' in set(faults()['as there'].map(str))


# ---- the similarity check

@pytest.mark.parametrize('shape', [(6,12,10), (6,9,14)])
def test_similarity(shape):
    "Cubic zoom, flattened cross-correlation, and mutual information in which every value is a class"
    rng = rng_for(0, 'similarity')
    a,b = rng.integers(0, 9, (6,12,10)),rng.integers(0, 9, shape)
    x,y = a.astype(float),b.astype(float)
    if x.shape!=y.shape: y = ndimage.zoom(y, [i/j for i,j in zip(x.shape, y.shape)])
    x,y = x.flatten(),y.flatten()
    _,i = np.unique(x, return_inverse=True)
    _,j = np.unique(y, return_inverse=True)
    joint = np.zeros((i.max()+1, j.max()+1))
    np.add.at(joint, (i,j), 1/len(i))
    q = np.outer(joint.sum(1), joint.sum(0))
    mi = (joint[joint>0]*np.log(joint[joint>0]/q[joint>0])).sum()
    x,y = ((o-o.mean())/o.std() for o in (x,y))
    xcorr = signal.correlate(x, y, method='direct').max()/np.sqrt((x**2).sum()*(y**2).sum())
    ours = published_similarity(a, b)
    assert (ours.xcorr, ours.mi)==(pytest.approx(xcorr), pytest.approx(mi))


# ---- what was written before

def test_what_has_no_depth_was_separable():
    "Models and stores that were written before a choice existed are as they were then"
    old = {k:v for k,v in P.to_json()['choices'].items() if k not in ('depth','standardize','adam','box_of')}
    r = Recipe.from_json(dict(name='published', choices=old))
    assert (r.depth, r.standardize, r.adam, r.box_of)==('separable','input','fastai','raw')
    only = {k:v for k,v in old.items() if k in ('size','margin')}
    assert Recipe.from_json(dict(name='published', choices=only)).depth=='full', 'a store says nothing of networks'
    config = {k:v for k,v in network('efficientnet_b1').config.items() if k not in ('depth','standardize','init')}
    model = create_network(**{**config, 'arch':'efficientnet_b0'})
    assert any(n.endswith('.depth') for n,_ in model.named_parameters())


def test_every_choice_of_the_thesis_is_checked(capsys):
    t = thesis_choices()
    assert set(t.choice)==set(CHECKS) and set(faults().choice)<=set(CHECKS)
    shown = t.assign(check=t.choice.map(CHECKS))[['choice','here','default','check']]
    with capsys.disabled(): print('\n'+shown.to_string())
