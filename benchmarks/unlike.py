"""How often scans that are unlike training's are flagged, and how often others are.

usage: unlike.py [FOLDER=temporary] [--train 220] [--like 200] [--odd 40] [--csv benchmarks/unlike.csv]
Networks of three seeds are trained on FLAIR and T1wCE of the phantom, half of the patients out of fold; then they meet
new patients scanned like these, with another contrast, by another scanner, with a wrong sequence, without a tumour, an
organ that is no brain, and a CT. Prints and writes, for each kind, the share that is flagged (mean of the seeds) with
the 95 % interval of Clopper and Pearson over the patients, and what was most often named. What FOLDER holds is not
made again."""
import argparse, contextlib, io, tempfile
from collections import Counter
from pathlib import Path

import numpy as np, pandas as pd, torch
from machine import machine
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import Volume, get_recipe, rng_for
from mgmt_fast.learner import load_model, mgmt_learner, predict, recipe_dls, save_model
from mgmt_fast.pages import write_csv
from mgmt_fast.phantom import draw_patients, make_phantom, render_patient
from mgmt_fast.prepare import prepare
from scipy import ndimage
from statsmodels.stats.proportion import proportion_confint

HERE = Path(__file__).resolve().parent
SCANS,SEQUENCES = dict(slices=24, size=64),('FLAIR','T1wCE')
MPRAGE = dict(T1wCE=(2000,3,900)) # TR, TE, TI


def scans(p, seed, sequences=SEQUENCES, **kwargs):
    images = render_patient(p, seed, sequences, **{**SCANS, **kwargs})
    return {s: v for s,(v,_) in images.items()}


def like(p, seed): return scans(p, seed)
def contrast(p, seed): return scans(p, seed, protocol=MPRAGE)
def scanner(p, seed): return scans(p, seed, noise=.07, slices=60, size=96, fov=240)


def t2w_for_t1wce(p, seed):
    found = scans(p, seed, ('FLAIR','T2w'))
    return dict(FLAIR=found['FLAIR'], T1wCE=found['T2w'])


def t1w_for_t1wce(p, seed):
    found = scans(p, seed, ('FLAIR','T1w'))
    return dict(FLAIR=found['FLAIR'], T1wCE=found['T1w'])


def exchanged(p, seed):
    found = scans(p, seed)
    return dict(FLAIR=found['T1wCE'], T1wCE=found['FLAIR'])


def no_tumour(p, seed):
    far = p.copy()
    far['x'] = 400. # mm from the brain's middle
    return scans(far, seed)


def organ(p, seed):
    "A trunk: an ellipse that holds large even organs, in both sequences"
    res = {}
    for s,v in scans(p, seed).items():
        rng = rng_for(seed, 'organ', p.patient, s)
        d,h,w = np.ogrid[-1:1:v.shape[0]*1j, -1:1:v.shape[1]*1j, -1:1:v.shape[2]*1j]
        inside = (h/.62)**2+(w/.8)**2+0*d<1
        blobs = ndimage.gaussian_filter(rng.normal(size=v.shape), (3,6,6))
        levels = np.digitize(blobs, np.quantile(blobs, [.2,.5,.8]))*120+150
        x = np.where(inside, levels+rng.normal(0, 12, v.shape), 0).clip(0)
        res[s] = Volume(x.astype(np.int32), affine=v.affine)
    return res


def ct(p, seed):
    "A CT of the same head in T1wCE's place: Hounsfield units, brain of one density, bone, skin and air"
    found = scans(p, seed)
    v,rng = found['T1wCE'],rng_for(seed, 'ct', p.patient)
    away = ndimage.distance_transform_edt(np.asarray(v)==0, sampling=v.spacing)
    hu = np.select([away==0, away<3, away<9, away<14], [38, 10, 1100, 30], -1000)
    x = hu+rng.normal(0, 6, v.shape)
    return dict(found, T1wCE=Volume(x.astype(np.int32), affine=v.affine))


KINDS = {'like training': like, 'other contrast': contrast, 'other scanner': scanner, 'T2w for T1wCE': t2w_for_t1wce,
    'T1w for T1wCE': t1w_for_t1wce, 'FLAIR and T1wCE exchanged': exchanged, 'no tumour': no_tumour,
    'other organ': organ, 'CT for T1wCE': ct}


def train(store, seed, path):
    if path.with_suffix('.json').exists(): return load_model(path)
    r = get_recipe('default', arch='timm/test_resnet', lr=2e-3, epochs=3, bs=8, anisotropic=2)
    dls = recipe_dls(store, r, fold=0, n_folds=2, seed=seed, augs=[])
    learn = mgmt_learner(dls, recipe=r, path=path.parent/f'{path.name}-log', seed=seed,
        model_kwargs=dict(pretrained=False))
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    save_model(learn, path)
    return load_model(path)


def row_of(kind, preds):
    "Share flagged over seeds and patients; the interval is that of as many patients, not of patients times seeds"
    flags = pd.concat(preds).unlike.astype(float)
    n = len(preds[0])
    lo,hi = proportion_confint(round(flags.mean()*n), n, method='beta')
    said = [o.split('unlike training: ')[1] for p in preds for o in p.note if 'unlike training' in o]
    named = ', '.join(k for k,_ in Counter(said).most_common(2))
    share,lo,hi = (round(float(o), 3) for o in (flags.mean(), lo, hi))
    return dict(kind=kind, patients=n, flagged=share, lo=lo, hi=hi, named=named)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?')
    p.add_argument('--train', type=int, default=220)
    p.add_argument('--like', type=int, default=200)
    p.add_argument('--odd', type=int, default=40)
    p.add_argument('--csv', default=HERE/'unlike.csv')
    o = p.parse_args()
    root,rows = Path(o.folder or tempfile.mkdtemp()),[]
    print(machine(), flush=True)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        make_phantom(root/'scans', n=o.train, test=0., seed=31, sequences=SEQUENCES, progress=False, **SCANS)
        store = prepare(kaggle_cohort(root/'scans'), root/'store', SEQUENCES, size=(16,48,48), progress=False)
        models = [train(store, seed, root/f'model{seed}') for seed in range(3)]
    rates = [m.like.rate for m in models]
    print(f"stated false alarms: {', '.join(f'{r:.3f}' for r in rates)}", flush=True)
    for i,(kind,make) in enumerate(KINDS.items()):
        n = o.like if kind=='like training' else o.odd
        patients = draw_patients(n, seed=47+i, test=0.)
        cohort = pd.DataFrame([dict(patient=q.patient, label=q.label, **make(q, 47+i)) for _,q in patients.iterrows()])
        rows.append(row_of(kind, [predict(m, cohort, n_workers=1, progress=False) for m in models]))
        print(rows[-1], flush=True)
    write_csv(o.csv, pd.DataFrame(rows))


if __name__=='__main__': main()
