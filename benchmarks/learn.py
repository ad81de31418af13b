"""Does splitting depthwise convolutions hurt learning? EfficientNet-B1, separable and full, on the synthetic cohort
(best AUC .95), three seeds.

usage: learn.py [FOLDER=temporary] [--patients 240] [--epochs 10] [--arch efficientnet_b1]
Prints the validation AUC with its interval, the seconds of training, and the seconds until the AUC of both was first
reached."""
import argparse, tempfile, time
from pathlib import Path

import pandas as pd, torch
from fastai.callback.core import Callback

from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import get_recipe
from mgmt_fast.learner import mgmt_learner
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.metrics import auc_ci
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare


class Curve(Callback):
    "Validation AUC against seconds of training, its own time not counted"
    def before_fit(self): self.rows,self.t0 = [],time.perf_counter()
    def before_validate(self): self.seconds = time.perf_counter()-self.t0; self.ps,self.ys = [],[]
    def after_pred(self):
        if not self.training:
            self.ps.append(self.pred.detach().float().cpu().flatten())
            self.ys.append(self.y.cpu().flatten())
    def after_validate(self):
        now = time.perf_counter()
        self.last = torch.cat(self.ys).numpy(),torch.cat(self.ps).sigmoid().numpy()
        self.rows.append((self.seconds, float(auc_ci(*self.last).auc)))
        self.t0 += now-self.t0-self.seconds


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?')
    p.add_argument('--patients', type=int, default=240)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--arch', default='efficientnet_b1')
    o = p.parse_args()
    root = Path(o.folder or tempfile.mkdtemp())
    make_phantom(root/'cohort', n=o.patients, test=0., auc=.95, seed=0, slices=24, size=80, progress=False)
    store = prepare(kaggle_cohort(root/'cohort'), root/'store', 'FLAIR,T1wCE', size=(24,64,64), progress=False)
    rows = []
    for seed in range(3):
        for depth in ('separable','full'):
            curve = Curve()
            learn = mgmt_learner(mgmt_dls(store, fold=0, bs=8, seed=seed), o.arch,
                get_recipe('default', lr=1e-3, patience=o.epochs), path=root/f'{depth}{seed}', seed=seed, cbs=curve,
                model_kwargs=dict(depth=depth))
            with learn.no_bar(): learn.fit(o.epochs)
            ci = auc_ci(*curve.last)
            rows.append(dict(seed=seed, depth=depth, auc=ci.auc, lo=ci.lo, hi=ci.hi, seconds=curve.rows[-1][0],
                curve=curve.rows))
            print({k:v for k,v in rows[-1].items() if k!='curve'}, flush=True)
        a,b = rows[-2:]
        goal = min(max(auc for _,auc in r['curve']) for r in (a,b))
        for r in (a,b): r['to_goal'] = next(t for t,auc in r['curve'] if auc>=goal)
    table = pd.DataFrame(rows).drop(columns='curve')
    print(table.round(3).to_string(index=False))
    for s,g in table.groupby('seed'):
        a,b = g.iloc[0],g.iloc[1]
        print(f"seed {s}: each AUC within the other's interval: {bool(b.lo<=a.auc<=b.hi and a.lo<=b.auc<=a.hi)}; "
            f"{b.to_goal/a.to_goal:.2f} times sooner at the same AUC when separable")


if __name__=='__main__': main()
