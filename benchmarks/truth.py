"""Does the protocol tell the truth? Cross-validation of phantoms whose best attainable AUC is known, from none to
nearly all, three seeds each; and a planted shortcut.

usage: truth.py FOLDER [--patients 120] [--epochs 8] [--folds 2] [--arch timm/test_resnet] [--aucs .5 .65 .8 .95]
       [--seeds 3]
Prints, for each cohort, the out-of-fold AUC with its interval, the best that its very sample allows, the gap, and the
AUC of the traits as measured in the images; then which baselines beat chance,
in these cohorts and in one whose methylated patients have more slices. A stopped run goes on where it stopped."""
import argparse, time
from pathlib import Path

import pandas as pd

from mgmt_fast.baselines import baselines
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import get_recipe
from mgmt_fast.evaluate import cross_validate, results_table
from mgmt_fast.phantom import make_phantom, phantom_bound
from mgmt_fast.prepare import prepare

SEQUENCES,SIZE = ('T1wCE',),(16,32,32)


def cohort(dest, **kwargs):
    make_phantom(dest, test=0., size=48, sequences=SEQUENCES, n_workers=0, progress=False, **kwargs)
    return kaggle_cohort(dest)


def shortcut(root, n):
    "No signal in the tumour, three slices more in those who are methylated"
    parts = [(cohort(root/str(label), n=n, auc=.5, seed=9, slices=slices),label) for label,slices in ((0,16),(1,19))]
    return prepare(pd.concat([c[c.label==label] for c,label in parts]), root/'store', SEQUENCES, size=SIZE, n_workers=1,
        progress=False)


def beating(store): return ', '.join(baselines(store, progress=False).query('p_holm<.05').baseline) or 'none'


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', type=Path)
    p.add_argument('--patients', type=int, default=120)
    p.add_argument('--epochs', type=int, default=8)
    p.add_argument('--folds', type=int, default=2)
    p.add_argument('--arch', default='timm/test_resnet', help='a ResNet of a million weights by default, for a CPU')
    p.add_argument('--aucs', type=float, nargs='+', default=[.5,.95,.65,.8])
    p.add_argument('--seeds', type=int, default=3)
    o = p.parse_args()
    recipe = get_recipe('default', arch=o.arch, lr=2e-3, epochs=o.epochs)
    rows = []
    for seed in range(o.seeds):
        for auc in o.aucs:
            d,start = o.folder/f'auc{auc:g}-seed{seed}',time.process_time()
            store = prepare(cohort(d/'scans', n=o.patients, auc=auc, seed=seed, slices=16), d/'store', SEQUENCES,
                size=SIZE, n_workers=1, progress=False)
            r = results_table(cross_validate(store, d/'cv', recipe=recipe, n_folds=o.folds,
                augment=get_recipe('none', flip='w'), seed=seed, progress=False)).iloc[0]
            b = phantom_bound(d/'scans')
            rows.append(dict(best=auc, seed=seed, auc=r.auc, lo=r.auc_lo, hi=r.auc_hi, sample_bound=b.bound,
                gap=b.bound-r.auc, oracle=b.oracle, holds_half=bool(r.auc_lo<=.5<=r.auc_hi), baselines=beating(store),
                cpu_s=time.process_time()-start))
            print(rows[-1], flush=True)
    print(pd.DataFrame(rows).sort_values(['best','seed']).round(3).to_string(index=False))
    print(f"planted shortcut, baselines that beat chance: {beating(shortcut(o.folder/'shortcut', 40))}")


if __name__=='__main__': main()
