"""How long do the metrics take, and do the tests hold what they promise? What the intervals cover: coverage.py.
usage: python benchmarks/metrics.py [speed] [alarms] [--reps 2000] [--workers 2]
speed: a million predictions, beside scikit-learn's AUC alone, in one run.
alarms: how often p <= .05 where there is nothing to find; and how many studies of the size that `patients_needed` gives
tell their AUC from .5.
Without a choice, both."""
import argparse
from concurrent.futures import ProcessPoolExecutor
from itertools import product
import numpy as np, pandas as pd
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from machine import machine
from rounds import rounds, spans
from mgmt_fast.core import rng_for
from mgmt_fast.metrics import auc_ci, delong_test, patients_needed, permutation_test

SIZES = (80,117,262)
TESTS = {'permutation, against chance': (.5, lambda y,a,b: permutation_test(y,a,n_perm=499)),
         'permutation, two models': (.6, lambda y,a,b: permutation_test(y,a,b,n_perm=199)),
         'DeLong, two models': (.6, delong_test)}


def study(auc, n, share, rng, models=1):
    "Labels, and normal scores of so many models with that AUC, correlated .5; five patients of each class at least"
    while not 5<=(y:=rng.random(n)<share).sum()<=n-5: pass
    common = rng.normal(size=n)
    return y, *(common*.5**.5+rng.normal(size=n)*.5**.5+y*np.sqrt(2)*norm.ppf(auc) for _ in range(models))


def alarm(cell, reps):
    name,n = cell
    (auc,test),rng = TESTS[name],rng_for(1,name,n)
    return dict(test=name, n=f'n={n}', alarms=100*np.mean(
        [test(*study(auc,n,.5,rng,models=2)).p<=.05 for _ in range(reps)]))


def power(auc, reps):
    n,rng = patients_needed(auc),rng_for(2,'power',auc)
    return dict(auc=auc, needed=n, found=100*np.mean([auc_ci(*study(auc,n,.5,rng)).lo>.5 for _ in range(reps)]))


def spread(f, cells, *args, workers):
    with ProcessPoolExecutor(workers) as pool: return [o.result() for o in [pool.submit(f, c, *args) for c in cells]]


def error(reps, p=.05): return f'{100*np.sqrt(p*(1-p)/reps):.2f}'


def alarms(reps, workers):
    t = pd.DataFrame(spread(alarm, list(product(TESTS,SIZES)), 2*reps, workers=workers)).pivot(index='test',
        columns='n', values='alarms')
    print(f'\np <= .05 where there is nothing to find, %; {2*reps} studies a cell (standard error {error(2*reps)})')
    print(t[[f'n={o}' for o in SIZES]].round(1).to_string())
    print(f'\nStudies of the size that gives a power of 80 %, and how many % find an AUC above .5; {reps} each '
        f'(standard error {error(reps,.8)})')
    print(pd.DataFrame(spread(power, (.6,.65,.75), reps, workers=workers)).set_index('auc').round(1).to_string())


def speed(n=10**6, reps=5):
    y,a,b = study(.6, n, .5, rng_for(3,'speed'), models=2)
    work = {"scikit-learn's AUC, no interval": lambda: roc_auc_score(y,a), 'auc_ci': lambda: auc_ci(y,a),
        'auc_ci, ten scans per patient': lambda: auc_ci(y,a,cluster=np.arange(n)//10),
        'delong_test': lambda: delong_test(y,a,b)}
    t = pd.Series({k: m for k,(m,*_) in spans(rounds(work, reps, warm=False)).items()})
    print(f'\n{n} predictions, median of {reps}')
    print(pd.DataFrame({'s': t, "of scikit-learn's": t/t.iloc[0]}).round(2).to_string())


if __name__=='__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('what', nargs='*', choices=['speed','alarms',[]], default=[])
    for k,v in dict(reps=2000, workers=2).items(): ap.add_argument(f'--{k}', type=int, default=v)
    args = ap.parse_args()
    what = args.what or ['speed','alarms']
    print(machine())
    if 'speed' in what: speed()
    if 'alarms' in what: alarms(args.reps, args.workers)
