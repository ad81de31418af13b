"""Which schedule should the default recipe have? Held-out AUC of ResNet18 on synthetic cohorts, a row a schedule, over
seeds of cohort, folds and weights.

usage: schedules.py [FOLDER=temporary] [--patients 192] [--epochs 8] [--seeds 2] [--auc .95]
Weights are chosen on the validation fold, as the library does; the AUC is that of patients who are in no fold."""
import argparse, tempfile, time
from pathlib import Path

import pandas as pd

from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import get_recipe
from mgmt_fast.learner import mgmt_learner, predict
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.metrics import auc_ci
from mgmt_fast.phantom import make_phantom, phantom_bound, read_side_table
from mgmt_fast.prepare import prepare

SETTINGS = {
    'flat 1e-4, falls after 1 epoch without gain': dict(lr=1e-4, plateau_patience=1),
    'flat 1e-3, falls after 1 epoch without gain': dict(lr=1e-3, plateau_patience=1),
    'flat 1e-3, falls after 3 epochs without gain': dict(lr=1e-3, plateau_patience=3),
    'one cycle up to 1e-3': dict(schedule='one_cycle', lr=1e-3),
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?')
    p.add_argument('--patients', type=int, default=192)
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--seeds', type=int, default=2)
    p.add_argument('--auc', type=float, default=.95)
    o = p.parse_args()
    root,size,seqs,rows = Path(o.folder or tempfile.mkdtemp()),(12,32,32),('FLAIR','T1wCE'),[]
    for seed in range(o.seeds):
        at = root/f'seed{seed}'
        make_phantom(at/'cohort', n=o.patients, auc=o.auc, seed=seed, test=1/3, slices=20, size=64, sequences=seqs,
            progress=False)
        train,test = (prepare(kaggle_cohort(at/'cohort', k), at/k, seqs, size=size, progress=False)
            for k in ('train','test'))
        truth = read_side_table(at/'cohort').set_index('patient').label
        for name,changes in SETTINGS.items():
            t = time.perf_counter()
            learn = mgmt_learner(mgmt_dls(train, seed=seed),
                recipe=get_recipe('default', arch='resnet18', epochs=o.epochs,
                **{'schedule':'flat', 'patience':99, **changes}), path=at/'run', seed=seed)
            with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
            preds = predict(learn, test, progress=False)
            rows.append(dict(schedule=name, seed=seed, auc=auc_ci(truth.loc[preds.patient], preds.prob).auc,
                kept=learn.save_best.best_epoch, seconds=time.perf_counter()-t))
            print(rows[-1], flush=True)
        print(f"seed {seed}: bound {phantom_bound(at/'cohort', 'test').bound:.3f}", flush=True)
    table = pd.DataFrame(rows)
    print(table.pivot(index='schedule', columns='seed', values='auc').assign(mean=lambda d: d.mean(axis=1)).loc[
        list(SETTINGS)].round(3).to_string())


if __name__=='__main__': main()
