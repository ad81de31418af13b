"""Raw series of a real patient brought to SRI24, beside the transforms and volumes that BraTS published.

    python benchmarks/standardize.py DATA
    python benchmarks/standardize.py DATA --motions 20 [--out benchmarks/standardize.csv]

DATA is a folder with `atlas/sri24`, `tcga_lgg_raw`, `tcga_lgg_brats_space` and `tcga_lgg_2020_transforms`.

With `--motions` the headers of the patient and of four phantoms are turned by up to 15 degrees and shifted by up to 20
mm instead, and the table says how far the result moves: `turned` and `degrees` in degrees, `mm` at most in the brain,
`mm_from_truth` on average in a phantom's brain, `said` how many problems were reported."""
import argparse, tempfile, time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace as NS

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mgmt_fast.atlas import Atlas, read_atlas, solid_mask
from mgmt_fast.cohort import find_cohort
from mgmt_fast.core import SEQUENCES, Volume, get_recipe, rng_for
from mgmt_fast.engines import brain_mask, correct_bias, distances, greedy_align, itk_align, moved
from mgmt_fast.grids import isotropic, resample
from mgmt_fast.phantom import draw_patients, draw_series, render_patient
from mgmt_fast.register import low_resolution, register_rigid
from mgmt_fast.series import read_sequence, read_volume
from mgmt_fast.standardize import atlas_scores, level, standardize, standardize_patient

LPS = np.diag([-1.,-1,1,1])
NAMES = dict(T1w='t1', T1wCE='t1c', T2w='t2', FLAIR='fla')
ATLAS,BRATS,OF_2020 = 'atlas/sri24', 'tcga_lgg_brats_space', 'tcga_lgg_2020_transforms'


def one(folder, pattern): return next(Path(folder).rglob(pattern))


def itk_matrix(path):
    "An affine transform that ANTs wrote, as (4,4) from mm (RAS) of the fixed to mm of the moving volume"
    from scipy.io import loadmat
    d = loadmat(path)
    numbers = next(v for k,v in d.items() if k.startswith('AffineTransform')).ravel().astype(float)
    centre = d['fixed'].ravel()
    m = np.eye(4)
    m[:3,:3] = numbers[:9].reshape(3,3)
    m[:3,3] = numbers[9:]+centre-m[:3,:3]@centre
    return LPS@m@LPS


def surface(mask): return mask&~ndimage.binary_erosion(mask)


def compare_masks(a, b, spacing):
    "Dice, 95th percentile of the surfaces' distances in mm, share of `b` that `a` misses"
    a,b = np.asarray(a)>.5,np.asarray(b)>.5
    far_a,far_b = (ndimage.distance_transform_edt(~surface(o), sampling=spacing) for o in (a,b))
    apart = np.r_[far_a[surface(b)], far_b[surface(a)]]
    return dict(dice=2*(a&b).sum()/(a.sum()+b.sum()), hd95=np.percentile(apart, 95), missed=(b&~a).sum()/b.sum())


class Reference:
    "What others made of the patient"
    def __init__(self, data):
        self.raw = find_cohort(data/'tcga_lgg_raw').iloc[0]
        self.patient,self.atlas = self.raw.patient,read_atlas(one(data/ATLAS, '*.nii.gz'))
        home = data/OF_2020/self.patient
        self.to_brats = itk_matrix(one(home, 'native_t1*.mat'))
        self.to_t1 = {s: itk_matrix(one(home, f'{NAMES[s]}_to_t1*.mat')) for s in SEQUENCES if s!='T1w'}
        self.to_t1['T1w'] = np.eye(4)
        published = {s: one(data/BRATS/self.patient/'raw_bet', f'*_{k}_bet*') for s,k in NAMES.items()}
        self.published = {s: read_volume(p).float() for s,p in published.items()}
        self.brain = solid_mask(self.published['T1w'])
        self.hdbet = read_volume(one(home, 'hdbet*')).float()
        self.points = self.brain.world(np.argwhere(np.asarray(self.brain)[::5,::5,::5]>0)*5)

    def matrix(self, s): return self.to_t1[s]@self.to_brats


def registration(ref, res):
    "Each sequence: distance from the 2020 transforms, correlation with the published volume"
    rows,brain = [],np.asarray(ref.brain)>0
    for s,m in res.matrices.items():
        own = ref.published[s]
        x,theirs = (resample(moved(read_sequence(ref.raw, s), o), own.affine, own.shape) for o in (m,ref.matrix(s)))
        away = distances(m, ref.matrix(s), ref.points)
        onto_t1 = m@np.linalg.inv(res.matrices['T1w'])
        t1_points = np.c_[ref.points,np.ones(len(ref.points))]@ref.to_brats.T
        rest = distances(onto_t1, ref.to_t1[s], t1_points[:,:3])
        def ncc(o): return np.corrcoef(np.asarray(o)[brain], np.asarray(own)[brain])[0,1]
        rows.append(dict(sequence=s, ncc=ncc(x), ncc_2020=ncc(theirs), mean_mm=away.mean(), most_mm=away.max(),
            onto_t1_mean=rest.mean(), onto_t1_most=rest.max()))
    return pd.DataFrame(rows)


def atlas_table(ref, res):
    "How the result and the reference lie on the atlas; both with the intensities that were scanned"
    both = dict(here=(res.volumes['T1w'],res.mask), published=(ref.published['T1w'],ref.brain))
    rows = [dict(what=k, **atlas_scores(x, mask, ref.atlas, np.eye(4))) for k,(x,mask) in both.items()]
    return pd.DataFrame(rows)


def contrast_alone(ref, res):
    "The T1 after contrast as the only T1: how far from the 2020 transform, and from where its own T1 was brought"
    own,rows = ref.to_t1['T1wCE']@res.matrices['T1w'],[]
    for bias in ('kept','to register'):
        vols = dict(patient=ref.patient, T1wCE=ref.raw.T1wCE)
        got = standardize_patient(vols, ref.atlas, recipe=get_recipe('default', bias=bias))
        if got.problems: rows.append(dict(bias=bias, said=got.problems[0][1]))
        for name,m in dict(of_2020=ref.matrix('T1wCE'), of_its_t1=own).items() if got.matrices else ():
            away = distances(got.matrices['T1wCE'], m, ref.points)
            rows.append(dict(bias=bias, against=name, mean_mm=away.mean(), most_mm=away.max(), ncc=got.scores['ncc']))
    return pd.DataFrame(rows)


def mask_table(ref, res):
    "The mask on the T1's own grid and at 1 mm, against HD-BET's and the published brain"
    t1 = read_sequence(ref.raw, 'T1w').float()
    whole = np.linalg.inv(res.matrices['T1w'])
    theirs = moved(ref.brain.float(), np.linalg.inv(ref.to_brats))
    rows = []
    for grid,space in (('own',t1),('1 mm',isotropic(t1))):
        def on(o): return resample(o, space.affine, space.shape)
        own = on(moved(res.mask.float(), whole))
        for name,other in (('HD-BET',ref.hdbet),('published',theirs)):
            rows.append(dict(grid=grid, against=name, **compare_masks(own, on(other), space.spacing)))
        between = compare_masks(on(ref.hdbet), on(theirs), space.spacing)
        rows.append(dict(grid=grid, against='HD-BET to published', **between))
    return pd.DataFrame(rows)


def random_motion(rng, middle, degrees=15, mm=20):
    "A turn about `middle` and a shift, each up to a limit"
    axis,way = rng.standard_normal((2,3))
    m = np.eye(4)
    angle = np.radians(rng.uniform(0, degrees))
    m[:3,:3] = Rotation.from_rotvec(angle*axis/np.linalg.norm(axis)).as_matrix()
    m[:3,3] = middle-m[:3,:3]@middle+rng.uniform(0, mm)*way/np.linalg.norm(way)
    return m


def real_case(ref):
    "The real patient, whose true place nobody knows"
    vols = dict(T1w=read_sequence(ref.raw, 'T1w'))
    return NS(what='patient', vols=vols, atlas=ref.atlas, points=ref.points, true={})


def phantom_case(i):
    "A raw phantom in thick tilted slices; its own brain is the atlas, so its true place is known"
    p = draw_patients(4, seed=3).iloc[i]
    brain = render_patient(p, 3, 'T1w', slices=95, size=136, fov=205)['T1w'][0]
    atlas = Atlas(isotropic(brain, 1.5))
    scan = dict(slices=26, size=144, fov=230, tilt=10, shift=5)
    vols = {s: v for s,(v,_) in render_patient(p, 3, 'T1w', skull=True, **scan).items()}
    true = {s: np.eye(4) for s in vols}
    for s in vols: true[s][:3,3] = draw_series(p, s, 3, **scan).moved
    points = atlas.brain.world(np.argwhere(np.asarray(atlas.brain)[::5,::5,::5]>0)*5)
    return NS(what=f'phantom {i}', vols=vols, atlas=atlas, points=points, true=true)


def degrees(m): return np.degrees(Rotation.from_matrix(m[:3,:3]).magnitude())


def one_motion(case, base, i):
    "The case with headers that were turned and shifted: how far the result moves, and how far it is from the truth"
    middle = case.vols['T1w'].world(np.array(case.vols['T1w'].shape)/2)
    whole = random_motion(rng_for(i, 'known motion'), middle)
    turned = {s: Volume(v, affine=whole@v.affine) for s,v in case.vols.items()}
    got = standardize_patient(dict(turned, patient='a'), case.atlas)
    row = dict(what=case.what, draw=i, turned=degrees(whole), said=len(got.problems), sequences=len(got.matrices))
    apart = {s: distances(m, whole@base.matrices[s], case.points).max() for s,m in got.matrices.items()}
    off = [distances(got.matrices[s], whole@m, case.points).mean() for s,m in case.true.items() if s in got.matrices]
    if 'T1w' in apart: row['degrees'] = degrees(np.linalg.inv(whole@base.matrices['T1w'])@got.matrices['T1w'])
    return dict(row, mm=max(apart.values(), default=np.nan), mm_from_truth=max(off, default=np.nan))


def known_motions(ref, n, out):
    "Motions of the real patient and of phantoms; the table is written after each, so that a stop leaves what was found"
    rows,cases,bases = [],[real_case(ref),*map(phantom_case, range(4))],{}
    for i in range(n):
        for case in (cases[0],cases[1+i%4]):
            if case.what not in bases:
                bases[case.what] = standardize_patient(dict(case.vols, patient='a'), case.atlas)
            rows.append(one_motion(case, bases[case.what], i))
            print(pd.DataFrame(rows[-1:]).round(3).to_string(index=False, header=len(rows)==1), flush=True)
            pd.DataFrame(rows).round(3).to_csv(out, index=False)


def engines(ref):
    "Engines for the anchor, side by side: distance from the 2020 transform, seconds of processor time"
    t1,back = level(read_sequence(ref.raw, 'T1w'))
    head = isotropic(t1)
    mask = brain_mask(head)
    even,fixed = correct_bias(head, mask),ref.atlas.volume
    brain = Volume(np.asarray(even)*np.asarray(mask), affine=head.affine)
    a,b = low_resolution(fixed),low_resolution(brain)
    def own(): return b.affine@register_rigid(a, b, flips=False).matrix@np.linalg.inv(a.affine)
    start = own()
    tried = dict(register_rigid=own, greedy=lambda: greedy_align(fixed, brain, start),
        SimpleITK=lambda: itk_align(fixed, brain, start))
    rows = []
    for name,f in tried.items():
        began = time.process_time()
        m = f()
        spent,away = time.process_time()-began,distances(back@m, ref.to_brats, ref.points)
        scores = atlas_scores(brain, mask, ref.atlas, m)
        rows.append(dict(engine=name, mean_mm=away.mean(), most_mm=away.max(), ncc=scores['ncc'], nmi=scores['nmi'],
            seconds=spent))
    return pd.DataFrame(rows)


def cost(ref, atlas_path):
    "Processor time and memory of one patient in a process of its own, with reading and writing"
    parent,child = get_context('fork').Pipe()
    def _work():
        import resource
        with tempfile.TemporaryDirectory() as td:
            standardize(pd.DataFrame([ref.raw]), td, atlas=atlas_path, n_workers=0, progress=False)
        of = [resource.getrusage(o) for o in (resource.RUSAGE_SELF,resource.RUSAGE_CHILDREN)]
        child.send((sum(o.ru_utime+o.ru_stime for o in of), max(o.ru_maxrss for o in of)/2**20))
    p = get_context('fork').Process(target=_work)
    p.start()
    res = parent.recv()
    p.join()
    return pd.DataFrame([dict(zip(('seconds','GB'), res))])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('data', type=Path)
    parser.add_argument('--motions', type=int, default=0, help='known motions to draw instead')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    args = parser.parse_args()
    ref = Reference(args.data)
    if args.motions: return known_motions(ref, args.motions, args.out)
    res = standardize_patient(ref.raw, ref.atlas)
    for s,what in res.problems: print(f'{s}: {what}')
    tables = dict(registration=registration(ref, res), atlas=atlas_table(ref, res), mask=mask_table(ref, res),
        contrast_alone=contrast_alone(ref, res), engines=engines(ref), cost=cost(ref, ref.atlas.path))
    for name,table in tables.items(): print(f'\n{name}\n{table.round(3).to_string(index=False)}', flush=True)
    print({k: v for k,v in res.scores.items() if k!='ml'})


if __name__=='__main__': main()
