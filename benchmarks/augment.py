"""Seconds to augment, beside what users would pick instead, in one run.
usage: python benchmarks/augment.py [--reps 9] [--threads 2]
Peers that are not installed are left out and named. Times are medians over rounds in which every contender takes
its turn; ratios are of those medians."""
import argparse, os, subprocess, sys, warnings

warnings.simplefilter('ignore')
import numpy as np, torch, torch.nn.functional as F
from machine import machine
from rounds import rounds, spans
from mgmt_fast.augment import *
from mgmt_fast.core import get_recipe

D,H,W = 64,256,256
SPACING = [2.2,.7,.55]


def brain(b=1, c=1, device='cpu'):
    "An egg with texture, air exactly 0, (b,c,D,H,W)"
    z,y,x = (torch.linspace(-1.05,1.05,n) for n in (D,H,W))
    z,y,x = z[:,None,None],y[:,None],x
    egg = (z**2+y**2+x**2<1)*(.5+.2*torch.cos(9*y)*torch.cos(7*x+3*z)+.1*torch.cos(41*x+37*y))
    return egg.expand(b,c,-1,-1,-1).contiguous().to(device)


def augmenter(recipe, x, **changes):
    (t,) = mgmt_augs(get_recipe(recipe, **changes), spacing=SPACING)
    return lambda: t(x, split_idx=0)


def torchio(x):
    import torchio as tio
    t = tio.Compose([tio.RandomFlip(axes=(0,1)), tio.RandomAffine(scales=(.97,1.03), degrees=3.6, translation=20),
        tio.RandomGamma(.3)])
    v = x[0].permute(0,2,3,1).contiguous()
    return lambda: t(tio.ScalarImage(tensor=v))


def monai(x):
    from monai.transforms import Compose, RandFlip, RandAffine, RandAdjustContrast
    t = Compose([RandFlip(.5,0), RandFlip(.5,1), RandAffine(1., rotate_range=.06, translate_range=20, scale_range=.03,
        padding_mode='zeros'), RandAdjustContrast(1.,(.7,1.4))])
    v = x[0].permute(0,2,3,1).contiguous()
    return lambda: t(v)


def kornia(x):
    import kornia.augmentation as K
    t = K.AugmentationSequential(K.RandomHorizontalFlip3D(p=.5), K.RandomVerticalFlip3D(p=.5),
        K.RandomAffine3D((3,3,3), translate=(.1,.1,.1), scale=(.97,1.03), p=1.), data_keys=['input'])
    return lambda: t(x)


def grid_sample_3d(x):
    grid = F.affine_grid(torch.eye(3,4)[None]+.03*torch.randn(1,3,4), x.shape, align_corners=False)
    return lambda: F.grid_sample(x, grid, align_corners=False)


def affine_3d(x):
    t = RandAffine(in_plane=False, flip='', rotation=5, spacing=SPACING)
    return lambda: t.apply(x, t.draw(len(x)))


def table(rows, of=None):
    for k,(m,lo,hi) in rows.items():
        print(f"{k:44s} {m:8.4f} s  ({lo:.4f} to {hi:.4f})" + (f"  x{m/rows[of][0]:.1f}" if of else ''))


def on_cpu(reps):
    x = brain()
    work = {'published, no equalisation drawn': augmenter('published', x, equalize_p=0.),
        'published, equalisation drawn': augmenter('published', x, equalize_p=1.),
        'default': augmenter('default', x), 'copy of the volume': x.clone}
    for f in (torchio,monai,kornia):
        try: work[f'{f.__name__}: flip, affine'+('' if f is kornia else ', contrast')] = f(x)
        except ImportError: print(f'{f.__name__} is not installed: left out')
    print(f'\nOne volume 1x{D}x{H}x{W} float32; the factor is against the first row')
    rows = spans(rounds(work, reps))
    table(rows, next(iter(rows)))
    print('\n3D affine; the factor is against grid_sample alone, its grid made beforehand')
    pair = {'grid_sample alone': grid_sample_3d(x), 'RandAffine(in_plane=False), grid and all': affine_3d(x)}
    rows = spans(rounds(pair, max(3,reps//2)))
    table(rows, 'grid_sample alone')


def resident(key):
    "VmRSS (now) or VmHWM (greatest) of this process, bytes"
    return next(int(o.split()[1])*1024 for o in open('/proc/self/status') if o.startswith(key))


def peak(recipe, b):
    "Greatest resident size while a batch is augmented, beyond that before, in copies of the batch"
    x = torch.rand(b,1,D,H,W)
    (t,) = mgmt_augs(get_recipe(recipe, **({} if recipe=='default' else dict(equalize_p=1.))), spacing=SPACING)
    for _ in range(12): t(x[:1], split_idx=0)
    open('/proc/self/clear_refs','w').write('5') # the kernel forgets the greatest size so far
    before = resident('VmRSS')
    for _ in range(12): t(x, split_idx=0)
    print(f"{(resident('VmHWM')-before)/(x.numel()*4):.2f}")


def memory():
    if sys.platform!='linux': return print('peak memory is read from /proc: left out here')
    print('\nPeak extra memory, in copies of the batch (12 draws; the result is one of them)')
    for recipe in ('published','default'):
        for b in (1,4): # freed memory goes back at once (the threshold), so that what is resident is what is in use
            out = subprocess.run([sys.executable, __file__, '--peak', recipe, str(b)],
                env={**os.environ,'MALLOC_MMAP_THRESHOLD_':'1048576'}, capture_output=True, text=True,
                check=True).stdout.split()[-1]
            print(f'{recipe:12s} batch of {b}: {out}')


def on_gpu(reps):
    x = brain(8, device='cuda')
    work = {f'{k}, batch of 8': augmenter(k, x) for k in ('published','default')}
    work['published, equalisation drawn, batch of 8'] = augmenter('published', x, equalize_p=1.)
    work['default in 3D, batch of 8'] = augmenter('default', x, in_plane=False)
    work['RandAffine(in_plane=False), batch of 8'] = affine_3d(x)
    work['copy of the batch'] = x.clone
    try: work['kornia: flip, affine, batch of 8'] = kornia(x)
    except ImportError: print('kornia is not installed: left out')
    print(f'\nOn the GPU, batch 8x1x{D}x{H}x{W} float32, draws and launches included')
    table(spans(rounds(work, reps, sync=torch.cuda.synchronize)))
    for k in ('published','default'):
        f = augmenter(k, x)
        base = torch.cuda.memory_allocated(); torch.cuda.reset_peak_memory_stats()
        for _ in range(reps): f()
        extra = (torch.cuda.max_memory_allocated()-base)/(x.numel()*4)
        print(f'{k:12s} peak extra memory {extra:.2f} copies of the batch')


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--reps', type=int, default=9)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--peak', nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    torch.set_num_threads(a.threads); torch.manual_seed(0)
    if a.peak: peak(a.peak[0], int(a.peak[1])); sys.exit()
    print(machine())
    on_cpu(a.reps); memory()
    if torch.cuda.is_available(): on_gpu(4*a.reps)
    else: print('\nno GPU here: its table is left out')
