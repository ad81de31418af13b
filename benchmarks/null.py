"""What brains that differ score in the leakage audit: the null that small sets are judged by.
usage: null.py [--brains 24] [--pairs 200] [--workers 1] [--out mgmt_fast/leakage_null.csv]

Phantoms whose anatomies differ: each from a scanner of its own, all with thick slices and large pixels, all with
their skulls, for strangers look the more alike the less their scans show. And public scans of different people, where
MGMT_FAST_DATA points to them. Every score is had by the audit's own steps. The table keeps, for each sequence and kind
of set, the median of the scores' square roots and the root mean square distance from it of those above: only the side
on which strangers look alike says how rare a high score is."""
import argparse
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from machine import machine

from mgmt_fast.confirm import pair_score
from mgmt_fast.core import SEQUENCES, rng_for
from mgmt_fast.phantom import draw_patients, render_patient
from mgmt_fast.register import Structure, low_resolution, register_rigid
from mgmt_fast.series import read_volume

RAW,SPACE,BRATS = 'tcga_lgg_raw/TCGA-FG-6692/','tcga_lgg_brats_space/TCGA-FG-6692/raw_bet/','brats/BraTS-GLI-00001-000/'
HOME = dict(a=[RAW,SPACE], b=[BRATS], c=['dicom/dcm_qa_decubitus/'], d=['dicom/dcm_qa_xa30/'])
# files of each person; two files of one person are never a pair
PUBLIC = {
    'FLAIR': dict(a=['*_fla.nii.gz','*fla_bet*'], b=['*t2f*']),
    'T1w': dict(a=['*_t1.nii.gz','*t1_bet*'], b=['*t1n*'], c=['HFS_t1_fl2d_sag'], d=['ref_5_anat-T1w.nii']),
    'T1wCE': dict(a=['*_t1c.nii.gz','*t1c_bet*'], b=['*t1c.nii*']),
    'T2w': dict(a=['*_t2.nii.gz','*t2_bet*'], b=['*t2w*'])}


def own_scanner(i):
    rng = rng_for(0, 'null', i)
    return dict(slices=int(rng.integers(20, 49)), size=int(rng.integers(64, 97)))


# how the phantoms of a kind are scanned, by their number
KINDS = {'phantoms, each from its own scanner': own_scanner,
    'phantoms, 12 slices of 32 x 32': lambda i: dict(slices=12, size=32),
    'phantoms with skull': lambda i: dict(slices=30, size=84, fov=240, skull=True)}


def phantom(p, scan):
    "Small copies of one phantom by sequence"
    return {s: low_resolution(v).numpy() for s,(v,_) in render_patient(p, 0, SEQUENCES, **scan).items()}


def public(data, seq):
    "Small copies of the public scans of a sequence, and who each is of"
    res = []
    for who,patterns in PUBLIC[seq].items():
        for folder,o in zip(HOME[who], patterns):
            res.append((who, low_resolution(read_volume(next((data/folder).glob(o)))).numpy()))
    return res


def score(a, b): return pair_score(register_rigid(Structure(a), Structure(b)))


def row(seq, kind, brains, scores):
    "How alike strangers are: the median of the scores' square roots, and how far those above it lie from it"
    u = np.sqrt(scores)
    above = u[u>=np.median(u)]-np.median(u)
    figures = dict(median=np.median(u), spread=np.sqrt(np.mean(above**2)), highest=max(scores))
    return dict(sequence=seq, kind=kind, brains=brains, pairs=len(u), **figures)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(brains=24, pairs=200, workers=1).items(): ap.add_argument(f'--{k}', type=int, default=v)
    ap.add_argument('--out', default=Path(__file__).parent.parent/'mgmt_fast'/'leakage_null.csv')
    a = ap.parse_args()
    print(machine(), flush=True)
    pool,data,rows = Parallel(a.workers),os.environ.get('MGMT_FAST_DATA'),[]
    patients,every = draw_patients(a.brains, test=0),list(combinations(range(a.brains), 2))
    for kind,scan in KINDS.items():
        brains = pool(delayed(phantom)(p, scan(i)) for i,(_,p) in enumerate(patients.iterrows()))
        for seq in SEQUENCES:
            at = rng_for(0, 'null pairs', seq).choice(len(every), min(a.pairs, len(every)), replace=False)
            scores = pool(delayed(score)(brains[i][seq], brains[j][seq]) for i,j in (every[k] for k in at))
            rows.append(row(seq, kind, a.brains, scores))
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=False), flush=True)
    for seq in SEQUENCES if data else ():
        scans = public(Path(data), seq)
        scores = [score(x, y) for (p,x),(q,y) in combinations(scans, 2) if p!=q]
        rows.append(row(seq, 'public scans', len({p for p,_ in scans}), scores))
        print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=False), flush=True)
    pd.DataFrame(rows).round(4).to_csv(a.out, index=False)


if __name__=='__main__': main()
