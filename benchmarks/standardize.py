"""Raw series of a real patient brought to SRI24, beside the transforms and volumes that BraTS published.

    python benchmarks/standardize.py DATA [--motions 20]

DATA is a folder with `atlas/sri24`, `tcga_lgg_raw`, `tcga_lgg_brats_space` and `tcga_lgg_2020_transforms`."""
import argparse, tempfile, time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mgmt_fast.atlas import read_atlas, solid_mask
from mgmt_fast.cohort import find_cohort
from mgmt_fast.core import SEQUENCES, Volume, rng_for
from mgmt_fast.engines import brain_mask, distances, greedy_align, itk_align, moved
from mgmt_fast.grids import isotropic, resample
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
    "How the result and the reference lie on the atlas"
    rows = [dict(what='here', **{k: res.scores[k] for k in ('ncc','nmi','overlap','ml')})]
    theirs = ref.published['T1w']
    rows.append(dict(what='published', **atlas_scores(theirs, ref.brain, ref.atlas, np.eye(4))))
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


def known_motions(ref, res, n):
    "The same patient with headers that were turned and shifted: how far the result moves"
    vols,rows = {s: read_sequence(ref.raw, s) for s in SEQUENCES},[]
    for i in range(n):
        rng = rng_for(i, 'known motion')
        middle = vols['T1w'].world(np.array(vols['T1w'].shape)/2)
        whole = random_motion(rng, middle)
        row = {s: Volume(v, affine=whole@v.affine) for s,v in vols.items()}
        got = standardize_patient(dict(row, patient=ref.patient), ref.atlas)
        apart = {s: distances(got.matrices[s], whole@res.matrices[s], ref.points) for s in got.matrices}
        turn = np.linalg.inv(whole@res.matrices['T1w'])@got.matrices['T1w']
        degrees = np.degrees(Rotation.from_matrix(turn[:3,:3]).magnitude())
        rows.append(dict(draw=i, problems=len(got.problems), sequences=len(got.matrices), degrees=degrees,
            **{s: o.max() for s,o in apart.items()}))
        print(pd.DataFrame(rows[-1:]).round(2).to_string(index=False, header=not i), flush=True)
    return pd.DataFrame(rows)


def engines(ref):
    "Engines for the anchor, side by side: distance from the 2020 transform, seconds of processor time"
    t1,back = level(read_sequence(ref.raw, 'T1w'))
    head = isotropic(t1)
    mask = brain_mask(head)
    brain,fixed = Volume(np.asarray(head)*np.asarray(mask), affine=head.affine),ref.atlas.volume
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
    parser.add_argument('--motions', type=int, default=0, help='known motions to draw')
    args = parser.parse_args()
    ref = Reference(args.data)
    res = standardize_patient(ref.raw, ref.atlas)
    for s,what in res.problems: print(f'{s}: {what}')
    tables = dict(registration=registration(ref, res), atlas=atlas_table(ref, res), mask=mask_table(ref, res),
        engines=engines(ref), cost=cost(ref, ref.atlas.path))
    for name,table in tables.items(): print(f'\n{name}\n{table.round(3).to_string(index=False)}', flush=True)
    print({k: v for k,v in res.scores.items() if k!='ml'})
    if args.motions: known_motions(ref, res, args.motions)


if __name__=='__main__': main()
