"""Which explanations may be believed: each method on phantoms whose signal has a known place.

usage: explain.py [FOLDER=temporary] [--patients 320] [--epochs 12] [--methods all] [--csv FILE] [--picture FILE]
Trains, for seeds 0, 1 and 2, networks on true and on shuffled labels of the phantom, and on true ones of the decoy
phantom; with those of random weights they explain the patients whom none of them has seen (a fifth). Prints the AUC of
each network, and the table of `judge`, which the library reads from where it is written; and the median seconds of each
method; and draws six patients. What FOLDER holds is not made again."""
import argparse, contextlib, hashlib, io, json, tempfile, time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np, pandas as pd
from machine import machine
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe, make_folder, rng_for
from mgmt_fast.explain import METHODS, aim, explain, judge
from mgmt_fast.learner import load_model, mgmt_learner, predict, recipe_dls, save_model
from mgmt_fast.metrics import auc_ci
from mgmt_fast.pages import write_csv
from mgmt_fast.phantom import make_phantom, read_side_table, render_patient
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.viewer import View, plane_points, sample

HERE = Path(__file__).resolve().parent
SCANS = dict(slices=24, size=64, sequences='T1wCE', auc=.97, test=.2)
TEXTS = dict(patient=str, labels=str) # 'true' is a word here
SIZE,ARCH = (16,48,48),'timm/test_resnet' # the smallest ResNet that timm has


def make(root, name, patients):
    "A phantom and its two stores: of the patients to train on, and of those to explain"
    make_phantom(root/name, n=patients, decoy=name=='decoy', progress=False, **SCANS)
    stores = []
    for split in ('train','test'):
        dest = root/f'{name}-{split}'
        if not (dest/'local').exists():
            local(prepare(kaggle_cohort(root/name, split), dest, 'T1wCE', size=SIZE, progress=False))
        stores.append(VolumeStore(dest))
    return stores


def local(store):
    """Give the median of every brain the same value, in place.

    A robust range is set by the brightest voxels, so it would carry the rim's brightness into all others, and the
    signal would have no place."""
    path = store.path/'T1wCE.npy'
    d,x = json.loads((store.path/'store.json').read_text()),np.load(path, mmap_mode='r+')
    for m in d['patients'].values():
        v,(lo,hi) = m['volumes']['T1wCE'],m['volumes']['T1wCE']['window']
        old = x[m['row']]
        signal = lo+(old-1.)*(hi-lo)/254
        new = np.clip(signal/np.median(signal[old>0])*64, 1, 255)
        x[m['row']] = np.where(old>0, new, 0).round()
        v['hash'] = hashlib.blake2b(np.ascontiguousarray(x[m['row']]), digest_size=16).hexdigest()
    x.flush()
    (store.path/'store.json').write_text(json.dumps(d))
    (store.path/'local').touch()


def shuffled(store, seed):
    "The store with its labels dealt out anew"
    t = store.table[['patient','label']].copy()
    t['label'] = rng_for(seed, 'explain', 'shuffle').permutation(t.label)
    return VolumeStore(store.path, labels=t)


def train(store, labels, seed, path, epochs):
    "A network of one kind of labels: `'true'`, `'shuffled'`, or `'none'`, which is not trained"
    if path.with_suffix('.json').exists(): return load_model(path)
    if labels=='shuffled': store = shuffled(store, seed)
    r = get_recipe('default', arch=ARCH, lr=2e-3, epochs=epochs, bs=8, anisotropic=2)
    dls = recipe_dls(store, r, fold=0, seed=seed, augs=[])
    learn = mgmt_learner(dls, recipe=r, path=path.parent/f'{path.name}-log', seed=seed,
        model_kwargs=dict(pretrained=False))
    with learn.no_bar(), learn.no_logging():
        if labels!='none': learn.fit_recipe()
    save_model(learn, path)
    return load_model(path)


def truth(name, patient, side):
    "Tumour and decoy of a patient, as the phantom drew them: a mask on the scan's own grid"
    scan = {k:v for k,v in SCANS.items() if k in ('slices','size')}
    return render_patient(side.loc[patient], 0, 'T1wCE', decoy=name=='decoy', **scan)['T1wCE'][1]


def aims(m, store, masks, method, about, path):
    "Where a method points to in each patient, with the seconds; kept in a file"
    if path.exists(): return pd.read_csv(path, dtype=TEXTS)
    rows = []
    for patient,mask in masks.items():
        start = time.perf_counter()
        try: heat = explain(m, patient, store, method, auc=(.6,1), untested=True, progress=False).map
        except MGMTError: heat = None # the answer depends on nothing: it points nowhere
        found = dict(tumour=False, decoy=False) if heat is None else aim(heat, mask)
        rows.append(dict(about, method=method, patient=patient, seconds=time.perf_counter()-start, **found))
    return pd.read_csv(write_csv(path, pd.DataFrame(rows)), dtype=TEXTS)


def draw(root, path, method):
    "Three patients in whom a method points to the tumour, and three in whom it does not, with the decoy"
    t = pd.read_csv(root/f'aims/decoy-true-0-{method}.csv', dtype=TEXTS)
    chosen = pd.concat([t[t.tumour].head(3), t[~t.tumour].head(3)])
    store,side = VolumeStore(root/'decoy-test'),read_side_table(root/'decoy').set_index('patient', drop=False)
    m = load_model(root/'decoy-true-0')
    fig,axs = plt.subplots(2, 3, figsize=(8,6), layout='constrained')
    for ax,r in zip(axs.flat, chosen.itertuples()):
        e,mask = explain(m, r.patient, store, method, auc=(.6,1), untested=True),truth('decoy', r.patient, side)
        shown = e.show() if e.map is not None else View(e.scans, at=mask.world(np.argwhere(mask.numpy()==3).mean(0)))
        points = plane_points('axial', shown.at, shown.field, shown.mm)
        inside = np.nan_to_num(sample(mask.float(), points, order=0))
        ax.imshow(shown.panel('T1wCE', 'axial').clip(0, 1))
        for labels,colour in (((1,3),'cyan'),((4,),'lime')):
            outline = np.isin(inside, labels).astype(float)
            if outline.any(): ax.contour(outline, levels=[.5], colors=colour, linewidths=1)
        col,row = (np.argmin(abs(points[...,a]-shown.at[a]).min(b)) for a,b in ((0,0),(1,1)))
        if e.map is not None: ax.plot(col, row, '+', color='white', ms=10)
        where = 'tumour' if r.tumour else 'decoy' if r.decoy else 'nowhere' if e.map is None else 'elsewhere'
        ax.set_title(f"points to: {where}; {e.prob:.2f} methylated", fontsize=9)
        ax.set_axis_off()
    fig.suptitle(f'{METHODS[method]}: tumour cyan, decoy green, + the highest point', fontsize=10)
    fig.savefig(path, dpi=80, pil_kwargs=dict(quality=80))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?')
    p.add_argument('--patients', type=int, default=320)
    p.add_argument('--epochs', type=int, default=12)
    p.add_argument('--picture')
    p.add_argument('--methods', default=','.join(METHODS))
    p.add_argument('--csv', default=HERE.parent/'mgmt_fast/explain.csv')
    o = p.parse_args()
    root,tables = Path(o.folder or tempfile.mkdtemp()),[]
    print(machine(), flush=True)
    for name in ('plain','decoy'):
        with contextlib.redirect_stdout(io.StringIO()): stores = make(root, name, o.patients)
        side = read_side_table(root/name).set_index('patient', drop=False)
        masks = {q: truth(name, q, side) for q in stores[1].table.patient}
        for seed in range(3):
            for labels in ('true','shuffled','none') if name=='plain' else ('true',):
                with contextlib.redirect_stdout(io.StringIO()):
                    m = train(stores[0], labels, seed, root/f'{name}-{labels}-{seed}', o.epochs)
                t = predict(m, stores[1], progress=False).set_index('patient')
                auc = auc_ci(side.label[t.index].to_numpy(), t.prob.to_numpy())
                interval = f"{auc.auc:.3f} [{auc.lo:.3f}, {auc.hi:.3f}]"
                print(f"{name}, seed {seed}, labels {labels}: AUC {interval}", flush=True)
                about = dict(phantom=name, seed=seed, labels=labels)
                for method in o.methods.split(','):
                    path = make_folder(root/'aims')/f'{name}-{labels}-{seed}-{method}.csv'
                    tables.append(aims(m, stores[1], masks, method, about, path))
    t = pd.concat(tables, ignore_index=True)
    verdicts = judge(t).round(3)
    write_csv(o.csv, verdicts)
    print(verdicts.T.to_string())
    print(t.groupby('method').seconds.median().round(3).to_string())
    if o.picture: draw(root, o.picture, o.methods.split(',')[0])


if __name__=='__main__': main()
