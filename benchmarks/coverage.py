"""Which interval of an AUC covers? Eight methods on made-up studies whose true AUC is known, and the choice among them.
usage: coverage.py [--reps 3000] [--boot-reps 200] [--boot 400] [--workers 2] [--out coverage.csv]

A study has n = 10 to 1000 patients, at least 5 of each class. Scores are normal in both classes, those of the
methylated with 1/2 to 2 times the standard deviation (`scores` 'SD 0.5' to 'SD 2'), or such normal scores of equal
variance cut into five levels ('five levels'). Exchanging the classes inverts that ratio, so shares of methylated
patients up to one half suffice. The table has a row for each kind of study, and for each method the share of
intervals that hold the true AUC and their mean width. The bootstraps, which take longest, are asked up to n = 200.

The rule that chooses the default: at least 93 % on average; at least 90 % at worst where variances are equal (scores
of five levels among them); at most 97 % on average from n = 100; of what passes, the narrowest on average."""
import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from machine import machine
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import norm, rankdata, t as student

from mgmt_fast.consistency import auc_se
from mgmt_fast.core import rng_for
from mgmt_fast.metrics import _spread, _wilson

SIZES,SHARES,AUCS = (10,16,25,40,65,100,200,500,1000),(.5,.25,.1,.05),(.5,.6,.7,.8,.9,.95,.99)
SCORES = {'SD 0.5':.5, 'SD 0.71':.5**.5, 'SD 1':1., 'SD 1.41':2**.5, 'SD 2':2., 'five levels':1.}
METHODS = {'mee':"Mee, shrunk", 'mee_plain':'Mee', 'newcombe':'Newcombe', 'delong':'DeLong', 'logit':'DeLong, logit',
    'logit_t':'Brunner-Munzel t, logit', 'bootstrap':'bootstrap, percentile', 'bca':'bootstrap, BCa'}
Z = norm.ppf(.975)


def cells():
    "Every kind of study that has five patients of each class"
    return [o for o in product(SIZES, SHARES, AUCS, SCORES) if round(o[0]*o[1])>=5]


def cuts(mean, sd):
    "Four levels that divide both classes together, in equal numbers, into fifths"
    def below(x): return (norm.cdf(x)+norm.cdf((x-mean)/sd))/2
    return np.array([brentq(lambda x: below(x)-q, -50, 50) for q in (.2,.4,.6,.8)])


def draw(auc, m, n, scores, reps, rng):
    "The true AUC; scores of methylated (reps,m) and unmethylated patients (reps,n)"
    sd = SCORES[scores]
    mean = norm.ppf(auc)*np.sqrt(1+sd**2)
    pos,neg = rng.normal(mean, sd, (reps,m)),rng.normal(size=(reps,n))
    if scores!='five levels': return auc,pos,neg
    at = cuts(mean, sd)
    a,b = (np.diff(np.r_[0,norm.cdf(o),1]) for o in ((at-mean)/sd, at))
    return a@(b.cumsum()-b/2), np.searchsorted(at, pos), np.searchsorted(at, neg)


def placements(pos, neg):
    "Share of the other class that each patient is on the right side of: (reps,m), (reps,n)"
    m,n = pos.shape[1],neg.shape[1]
    ranks = rankdata(np.c_[pos,neg], axis=1)
    return (ranks[:,:m]-rankdata(pos, axis=1))/n, 1-(ranks[:,m:]-rankdata(neg, axis=1))/m


def bisect(far, lo, hi):
    "Where `far` changes sign between `lo`, where it is above 0, and `hi`"
    for _ in range(50):
        mid = (lo+hi)/2
        out = far(mid)>0
        lo,hi = np.where(out, mid, lo),np.where(out, hi, mid)
    return (lo+hi)/2


def newcombe(auc, m, n):
    def far(t): return abs(auc-t)-Z*auc_se(t, m, n)
    return bisect(far, 0*auc, auc),bisect(far, 0*auc+1, auc)


def on_logit(auc, se, z, perfect):
    "An interval of the AUC's logit; that of `perfect` where the AUC is 0 or 1 and has none"
    inside = (auc>1e-9)&(auc<1-1e-9)
    a = np.where(inside, auc, .5)
    half = z*se/(a*(1-a))
    return [np.where(inside, expit(logit(a)+s*half), o) for s,o in zip((-1,1), perfect)]


def informed(v): return np.minimum((v<1).sum(1), (v>0).sum(1))


def closed_forms(v10, v01):
    "Intervals (lo, hi), each (reps,), of the methods that need no resampling"
    m,n,auc = v10.shape[1],v01.shape[1],v10.mean(1)
    parts = v10.var(1, ddof=1)/m,v01.var(1, ddof=1)/n
    se,perfect = np.sqrt(sum(parts)),newcombe(auc, m, n)
    df = sum(parts)**2/np.maximum(parts[0]**2/(m-1)+parts[1]**2/(n-1), 1e-300)
    at,count = np.maximum(auc*(1-auc), 1e-12),(informed(v10),informed(v01))
    plain = np.where(sum(parts)>0, sum(parts)/at, _spread(auc, parts, (m,n), count))
    return dict(mee=_wilson(auc, _spread(auc, parts, (m,n), count), .95), mee_plain=_wilson(auc, plain, .95),
        newcombe=perfect, delong=(np.maximum(0,auc-Z*se),np.minimum(1,auc+Z*se)), logit=on_logit(auc, se, Z, perfect),
        logit_t=on_logit(auc, se, student.ppf(.975, np.maximum(df, 1)), perfect))


def resampled(pos, neg, v10, v01, boot, rng):
    "AUCs (boot,) of one study, its patients drawn anew within each class; and BCa's acceleration"
    m,n = len(pos),len(neg)
    right = (pos[:,None]>neg)+.5*(pos[:,None]==neg)
    a,b = (rng.multinomial(k, np.full(k,1/k), boot).astype(np.float32) for k in (m,n))
    moved = np.r_[(v10-v10.mean())/m,(v01-v01.mean())/n]
    skew = (moved**3).sum()/max(6*(moved**2).sum()**1.5, 1e-300)
    return np.einsum('bn,bn->b', a@right.astype(np.float32), b)/(m*n), skew


def bootstraps(pos, neg, v10, v01, boot, rng):
    "Percentile and BCa intervals (lo, hi) of each study"
    pairs = []
    for o in zip(pos, neg, v10, v01):
        aucs,skew = resampled(*o, boot, rng)
        below = (np.sum(aucs<o[2].mean()-1e-6)+np.sum(abs(aucs-o[2].mean())<=1e-6)/2)/boot
        bias = norm.ppf(np.clip(below, .5/boot, 1-.5/boot))
        z = bias+np.array([-Z,Z])
        pairs.append([np.quantile(aucs, q) for q in ([.025,.975], norm.cdf(bias+z/(1-skew*z)))])
    p,b = np.array(pairs).transpose(1,2,0)
    return dict(bootstrap=tuple(p), bca=tuple(b))


def judge(cell, reps, boot_reps, boot):
    "One row of the map"
    n,share,auc,scores = cell
    m,rng = round(n*share),rng_for(0, 'coverage', *cell)
    true,pos,neg = draw(auc, m, n-m, scores, reps, rng)
    v = placements(pos, neg)
    found = closed_forms(*v)
    if n<=200 and boot_reps: found.update(bootstraps(*(o[:boot_reps] for o in (pos,neg,*v)), boot, rng))
    row = dict(n=n, methylated=m, auc=auc, true=true, scores=scores)
    for k,(lo,hi) in found.items(): row[k] = np.mean((lo<=true+1e-9)&(true<=hi+1e-9))
    for k,(lo,hi) in found.items(): row[f'{k}_width'] = np.mean(hi-lo)
    return row


def summary(t):
    "One row per method: what the rule asks, and whether it passes"
    equal,large = t.scores.isin(['SD 1','five levels']),t.n>=100
    rows = {}
    for k in METHODS:
        if k not in t: continue
        c = t[k]
        r = dict(mean=c.mean(), worst_equal=c[equal].min(), worst_unequal=c[~equal].min(),
            mean_from_100=c[large].mean(), most_from_100=c[large].max(), width=t[f'{k}_width'][t.n<=200].mean())
        rows[k] = dict(**r, passes=r['mean']>=.93 and r['worst_equal']>=.9 and r['mean_from_100']<=.97)
    return pd.DataFrame(rows).T.astype(dict(passes=bool)).sort_values('width')


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(reps=3000, boot_reps=200, boot=400, workers=2).items():
        ap.add_argument(f"--{k.replace('_','-')}", type=int, default=v)
    ap.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a,start = ap.parse_args(),time.perf_counter()
    print(machine(), flush=True)
    one = partial(judge, reps=a.reps, boot_reps=a.boot_reps, boot=a.boot)
    with ProcessPoolExecutor(a.workers) as pool: t = pd.DataFrame(pool.map(one, cells())).round(4)
    t.to_csv(a.out, index=False)
    s = summary(t)
    print(s.round(4).to_string())
    error = [100*np.sqrt(.9*.1/o) for o in (a.reps, max(a.boot_reps,1))]
    print(f'{len(t)} kinds of study, {a.reps} of each ({a.boot_reps} for the bootstraps, of {a.boot} resamples)')
    print(f'standard error of a share of 90 %: {error[0]:.1f} points ({error[1]:.1f})')
    print(f'{time.perf_counter()-start:.0f} s')
    print(f'the narrowest that passes: {METHODS[s.index[s.passes][0]]}')


if __name__=='__main__': main()
