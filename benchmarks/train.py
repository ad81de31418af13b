"""What training costs: (1) `--accumulation`: the overhead of gathering gradients, per batch; (2) `--split`: the share
of an epoch that is spent in the model;
(3) otherwise: seconds to the same validation AUC on synthetic cohorts, ours and its peers, each in a process of its own
as its tutorials set it up.

usage: train.py [FOLDER=temporary] [--accumulation | --split] [--patients 160] [--seeds 3] [--size 32x64x64] [--limit
       120] [--who ours,bf16,monai,fastmonai]

Same patients, split, series (T1wCE) and size. Seconds count from the scans on disk, preparation or caching included,
validation not.
Ours: ResNet18, all kernels split, one cycle of 4 epochs at 5e-3, which were chosen on cohorts of other seeds (3 to 7)
than the three that are reported (0 to 2);
in float32, as its peers are, and with `precision='bf16'`, which pays where the processor has instructions for it.
The AUC to reach is the lower of the two best ones. 32 patients validate, so that one cohort says little: hence several,
and the median of their ratios.
MONAI: its 3D classification tutorial (LoadImage, ScaleIntensity, Resize, RandRotate90, DenseNet121 of two outputs,
cross-entropy, Adam 1e-4, batches of 2) over a CacheDataset.
fastMONAI: its classification tutorial (MedDataBlock, TorchIO's ZNormalization and affine augmentation, batches of 4,
ranger, one cycle) with the same DenseNet121.
On a card all run there, MONAI in float32 as its tutorial does.
Peers read NIfTI, written beforehand and not timed; ours reads the DICOM series. Peers that are not installed are left
out with a line that says so."""
import argparse, importlib.util, json, subprocess, sys, tempfile, time, warnings
from pathlib import Path

import numpy as np, pandas as pd, torch
from machine import machine
from rounds import rounds, spans

BEST = .95


def wait():
    if torch.cuda.is_available(): torch.cuda.synchronize()


class Curve:
    "Validation AUC against seconds, the time of validating not counted"
    def __init__(self): self.rows,self.t0 = [],time.perf_counter()
    def pause(self): self.at = time.perf_counter()
    def add(self, y, p):
        from mgmt_fast.metrics import auc_ci
        self.rows.append((self.at-self.t0, float(auc_ci(np.asarray(y).ravel(), np.asarray(p).ravel()).auc)))
        self.t0 += time.perf_counter()-self.at
        print('CURVE'+json.dumps(self.rows[-1]), flush=True)


def cohort(root, patients, seed):
    "Scans and a table with NIfTI copies and the split"
    import nibabel as nib
    from mgmt_fast.cohort import kaggle_cohort
    from mgmt_fast.folds import assign_folds
    from mgmt_fast.phantom import make_phantom
    from mgmt_fast.series import read_volume
    if not (root/'table.csv').exists():
        make_phantom(root/'cohort', n=patients, test=0., auc=BEST, seed=seed, slices=24, size=80, sequences=('T1wCE',),
            progress=False)
        table = assign_folds(kaggle_cohort(root/'cohort'), seed=0)
        (root/'nifti').mkdir(exist_ok=True)
        for r in table.itertuples():
            v = read_volume(r.T1wCE)
            nib.save(nib.Nifti1Image(np.asarray(v.as_subclass(torch.Tensor), dtype=np.float32).transpose(2,1,0),
                v.affine[:,[2,1,0,3]]), root/f'nifti/{r.patient}.nii.gz')
        table.assign(nifti=[str(root/f'nifti/{p}.nii.gz') for p in table.patient])[[
            'patient','label','fold','nifti']].to_csv(root/'table.csv', index=False)
    return pd.read_csv(root/'table.csv', dtype={'patient':str})


def ours(root, size, limit, precision='float32'):
    from fastai.callback.core import Callback
    from mgmt_fast.augment import mgmt_augs
    from mgmt_fast.cohort import kaggle_cohort
    from mgmt_fast.core import get_recipe
    from mgmt_fast.operators import keep_freed_memory
    from mgmt_fast.learner import mgmt_learner
    from mgmt_fast.loader import mgmt_dls
    from mgmt_fast.prepare import prepare
    keep_freed_memory() # as the commands do
    curve = Curve()
    class Watch(Callback):
        def before_validate(self): wait(); curve.pause(); self.p,self.y = [],[]
        def after_pred(self):
            if not self.training:
                self.p.append(self.pred.detach().float().flatten())
                self.y.append(self.learn.y.flatten())
        def after_validate(self): curve.add(torch.cat(self.y).cpu(), torch.cat(self.p).cpu())
    with tempfile.TemporaryDirectory() as d:
        recipe = get_recipe('default', size=tuple(size), arch='resnet18', schedule='one_cycle', lr=5e-3, epochs=4,
            precision=precision)
        store = prepare(kaggle_cohort(root/'cohort'), Path(d)/'store', 'T1wCE', recipe=recipe, progress=False)
        learn = mgmt_learner(mgmt_dls(store, bs=8, augs=mgmt_augs(get_recipe('none', flip='w'), seed=0)), recipe=recipe,
            path=d, cbs=Watch(), model_kwargs=dict(depth='separable_all'))
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()


def bf16(root, size, limit): ours(root, size, limit, 'bf16')


def monai(root, size, limit):
    from monai.data import CacheDataset, DataLoader
    from monai.networks.nets import DenseNet121
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandRotate90d, Resized, ScaleIntensityd
    t,curve = pd.read_csv(root/'table.csv', dtype={'patient':str}),Curve()
    D,H,W = size
    base = [LoadImaged('x'), EnsureChannelFirstd('x'), ScaleIntensityd('x'), Resized('x', (W,H,D))]
    def _data(part, tfms):
        return CacheDataset([dict(x=r.nifti, y=r.label) for r in part.itertuples()], Compose(tfms), progress=False,
            num_workers=2)
    torch.manual_seed(0)
    dev = 'cuda' if torch.cuda.is_available() else 'cpu'
    train = DataLoader(_data(t[t.fold!=0], [*base, RandRotate90d('x', prob=.5)]), batch_size=2, shuffle=True,
        num_workers=0)
    valid = DataLoader(_data(t[t.fold==0], base), batch_size=2)
    net = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2).to(dev)
    opt,loss = torch.optim.Adam(net.parameters(), 1e-4),torch.nn.CrossEntropyLoss()
    start = time.perf_counter()
    while time.perf_counter()-start<limit:
        net.train()
        for b in train:
            opt.zero_grad()
            loss(net(b['x'].as_tensor().to(dev)), b['y'].to(dev)).backward()
            opt.step()
        wait(); curve.pause(); net.eval()
        with torch.no_grad(): out = [(b['y'],net(b['x'].as_tensor().to(dev)).softmax(1)[:,1].cpu()) for b in valid]
        curve.add(*(torch.cat(o) for o in zip(*out)))


def fastmonai(root, size, limit):
    from fastai.callback.core import Callback, CancelFitException
    from fastMONAI.vision_all import CategoryBlock, ColReader, ColSplitter, CrossEntropyLossFlat, ImageBlock, Learner
    from fastMONAI.vision_all import MedDataBlock, MedImage, PadOrCrop, RandomAffine, ZNormalization, ranger
    from monai.networks.nets import DenseNet121
    t,curve = pd.read_csv(root/'table.csv', dtype={'patient':str}),Curve()
    t['is_valid'] = t.fold==0
    D,H,W = size
    block = MedDataBlock(blocks=(ImageBlock(cls=MedImage), CategoryBlock), splitter=ColSplitter('is_valid'),
        get_x=ColReader('nifti'), get_y=ColReader('label'),
        item_tfms=[ZNormalization(), PadOrCrop([W,H,D]), RandomAffine(scales=0, degrees=5, translation=0)])
    dls = block.dataloaders(t, bs=4, num_workers=0)
    start = time.perf_counter()
    class Watch(Callback):
        def before_validate(self): curve.pause(); self.p,self.y = [],[]
        def after_pred(self):
            if not self.training: self.p.append(self.pred.detach().softmax(1)[:,1]); self.y.append(self.learn.y)
        def after_validate(self):
            curve.add(torch.cat(self.y).cpu(), torch.cat(self.p).cpu())
            if time.perf_counter()-start>limit: raise CancelFitException
    learn = Learner(dls, DenseNet121(spatial_dims=3, in_channels=1, out_channels=2), loss_func=CrossEntropyLossFlat(),
        opt_func=ranger, cbs=Watch())
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(10, 1e-3)


def accumulation():
    """Seconds a batch with and without the callback, steps counted apart: what it does itself, beside a batch of the
    smallest network here"""
    from mgmt_fast.backbones import create_backbone
    from mgmt_fast.callbacks import GradientAccumulation
    from types import SimpleNamespace as NS
    net = create_backbone('resnet10')
    x,y = torch.rand(1,1,24,64,64),torch.ones(1,1)
    def batch(): torch.nn.functional.binary_cross_entropy_with_logits(net(x), y).backward()
    batch()
    step = spans(rounds(dict(step=batch), 9, warm=False))['step'][1]
    from fastai.learner import CancelBatchException
    cb,loss = GradientAccumulation(n_batches=8),torch.ones((), requires_grad=True)*1
    cb.learn = learn = NS(dl=NS(bs=1), iter=0, n_iter=1000, epoch=0, n_epoch=1, pct_train=0., model=net, yb=(y,),
        loss_grad=loss)
    cb.steps,cb.batches,cb.seen,cb.n_steps = 0,0,0,125
    def events():
        for i in range(7):
            learn.loss_grad = loss
            cb.before_batch(); cb.after_loss()
            try: cb.before_step()
            except CancelBatchException: pass
        cb.batches = cb.seen = 0
    own = spans(rounds(dict(own=events), 50, warm=False))['own'][1]/7
    print(f"accumulation: {own*1e6:.0f} us of its own in a batch of {step*1e3:.0f} ms (ResNet10, 1x24x64x64): "
        f"{own/step:.3%}")


def split(root, size):
    "Where an epoch's time goes: reading, transforms on the batch, and the model with its optimiser"
    from fastai.callback.core import Callback
    from mgmt_fast.augment import mgmt_augs
    from mgmt_fast.cohort import kaggle_cohort
    from mgmt_fast.core import get_recipe
    from mgmt_fast.learner import mgmt_learner
    from mgmt_fast.loader import mgmt_dls
    from mgmt_fast.prepare import prepare
    store = prepare(kaggle_cohort(root/'cohort'), root/f"store{'x'.join(map(str,size))}", 'T1wCE', size=size,
        progress=False)
    class Clock(Callback):
        order,run_valid = -100,False
        def before_train(self): self.begin = self.last = time.perf_counter(); self.data = 0.
        def before_batch(self): self.data += time.perf_counter()-self.last
        def after_train(self): self.total = time.perf_counter()-self.begin
    class Last(Callback):
        order,run_valid = 1000,False
        def after_batch(self): self.learn.clock.last = time.perf_counter()
    for arch in ('resnet10','resnet18','efficientnet_b1'):
        with tempfile.TemporaryDirectory() as d:
            learn = mgmt_learner(mgmt_dls(store, bs=8, augs=mgmt_augs('default', seed=0, spacing=store.spacing)), arch,
                path=d, cbs=[Clock(), Last()])
            with learn.no_bar(), learn.no_logging(): learn.fit(1)
            c = learn.clock
            print(f"split: {arch:16} {c.total:6.1f} s a training epoch of {len(learn.dls.train.dataset)} patients at "
                f"{'x'.join(map(str,size))}, full augmentation: {1-c.data/c.total:.1%} in the model, "
                f"{c.data/c.total:.1%} reading and augmenting", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?')
    p.add_argument('--patients', type=int, default=160)
    p.add_argument('--size', default='32x64x64')
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--limit', type=int, default=120)
    p.add_argument('--who', default='ours,bf16,monai,fastmonai')
    p.add_argument('--accumulation', action='store_true')
    p.add_argument('--split', action='store_true')
    p.add_argument('--one', help=argparse.SUPPRESS)
    o = p.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(2)
    root,size = Path(o.folder or tempfile.mkdtemp()),[int(i) for i in o.size.split('x')]
    if o.one: return globals()[o.one](root, size, o.limit)
    print(machine(), flush=True)
    if o.accumulation: return accumulation()
    if o.split:
        cohort(root, o.patients, 0)
        return split(root, size)
    runs = [race(root/f'seed{i}', o, i) for i in range(o.seeds)]
    for mine in ('ours','bf16'):
        for who in ('monai','fastmonai'):
            ratios = [ratio(c[mine], c[who]) for c in runs if {mine,who}<=c.keys()]
            if ratios:
                print(f"{who} takes {np.median(ratios):.1f} times as long as {mine} to the same AUC, median of "
                    f"{', '.join(f'{r:.1f}' for r in sorted(ratios))}")


def race(root, o, seed):
    "All on one cohort: curves by name"
    cohort(root, o.patients, seed)
    curves = {}
    for who in o.who.split(','):
        if importlib.util.find_spec(dict(monai='monai',fastmonai='fastMONAI').get(who, 'mgmt_fast')) is None:
            print(f'{who} is not installed: left out')
            continue
        r = subprocess.run([sys.executable, __file__, str(root), '--one', who, '--size', o.size, '--limit',
            str(o.limit)], capture_output=True, text=True)
        curve = [json.loads(l[5:]) for l in r.stdout.splitlines() if l.startswith('CURVE')]
        if not curve: print(f"{who} failed: {(r.stderr.strip().splitlines() or ['no message'])[-1][:200]}"); continue
        curves[who] = curve
        print(f"seed {seed} {who:10} {len(curve)} epochs, {curve[-1][0]:.1f} s, best AUC "
            f"{max(a for _,a in curve):.3f}: "+', '.join(f'{a:.2f}@{t:.0f}s' for t,a in curve), flush=True)
    return curves


def ratio(mine, theirs):
    "How many times as long as ours theirs takes to the lower of the best AUCs"
    goal = min(max(a for _,a in c) for c in (mine,theirs))
    ours,their = (next(t for t,a in c if a>=goal) for c in (mine,theirs))
    return their/ours


if __name__=='__main__': main()
