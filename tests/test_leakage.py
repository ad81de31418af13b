"The leakage audit: what it must find, what it must not, and what it says where it cannot tell."
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.all import NS
from fastcore.test import test_fail as fails

from mgmt_fast import confirm, fingerprints, leakage
from mgmt_fast.cohort import drop_patients, kaggle_cohort
from mgmt_fast.core import MGMTError, Volume, rng_for
from mgmt_fast.confirm import MeasuredNull, Null, pair_score
from mgmt_fast.fingerprints import average_brain, compare_fingerprints, draw_perturbation, fingerprint, perturb
from mgmt_fast.fingerprints import template_points
from mgmt_fast.leakage import leakage_audit, set_aside
from mgmt_fast.phantom import draw_patients, make_phantom, render_patient
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.register import Structure, low_resolution, normalised_mutual_information, register_rigid
from mgmt_fast.series import read_volume

quick = dict(n_workers=0, progress=False, planted=2)


def save(vol, path):
    "As NIfTI, axes x y z"
    a = np.asarray(vol).transpose(2,1,0).astype(np.float32)
    nib.save(nib.Nifti1Image(a, vol.affine[:,[2,1,0,3]]), path)
    return str(path)


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('leakage')


@pytest.fixture(scope='module')
def cohorts(home):
    "9 unlike phantoms, 6 of them for training"
    make_phantom(home/'scans', n=9, test=1/3, slices=36, size=72, sequences=('FLAIR','T1wCE'), n_workers=0,
        progress=False)
    return kaggle_cohort(home/'scans'),kaggle_cohort(home/'scans','test')


@pytest.fixture(scope='module')
def store(home, cohorts):
    return prepare(cohorts[0], home/'store', ('FLAIR',), size=(32,64,64), n_workers=1, progress=False)


@pytest.fixture(scope='module')
def hidden(home, cohorts):
    "Three training patients under other names, changed in every way at once, among the test set"
    train,test = cohorts
    rows = []
    for i in (1,3,5):
        rng = rng_for(3, 'hidden', i)
        rows.append(dict(patient=f'X{i}', source='test',
            FLAIR=save(perturb(read_volume(train.FLAIR[i]), rng, **draw_perturbation(rng)), home/f'X{i}.nii')))
    return pd.concat([test, pd.DataFrame(rows)], ignore_index=True), {(train.patient[i],f'X{i}') for i in (1,3,5)}


def pairs(df, verdict='same'): return set(zip(df.train[df.verdict==verdict], df.test[df.verdict==verdict]))


def test_hidden_copies_are_found_and_nobody_else(home, store, hidden):
    "A store on one side, files on the other; in a small set every pair is registered"
    test,truth = hidden
    df = leakage_audit(store, test, 'FLAIR', dest=home/'out', **quick)
    assert len(df)==6*6 and df.attrs['recall'][0]['planted']==2
    assert pairs(df)==truth and not pairs(df, 'uncertain')
    assert set_aside(df)==['X1','X3','X5']
    assert set(drop_patients(test, home/'out'/'set_aside.csv').patient)==set(test.patient)-{'X1','X3','X5'}
    page = (home/'out'/'leakage.html').read_text()
    assert page.count('alt="five slices of')==6 and page.count('<figcaption>')==1 and 'src="http' not in page
    for f in (home/'out').rglob('*'):
        if f.is_file(): assert str(home).encode() not in f.read_bytes(), f.name


def test_large_sets_go_through_fingerprints(home, store, hidden):
    test,truth = hidden
    df = leakage_audit(store, test, 'FLAIR', small=0, candidates=4, **quick)
    assert pairs(df)==truth and len(df)<6*6/2
    assert df.fingerprint[df.verdict=='same'].min()>df.fingerprint[df.verdict=='different'].max()
    assert df.attrs['recall'][0]['found']==2


def test_an_audit_goes_on_where_it_was_stopped(home, store, hidden, monkeypatch):
    "Nothing is read twice, and a volume that changed is read again"
    test,_ = hidden
    kw = dict(sequences='FLAIR', dest=home/'again', **{**quick, 'planted':0})
    real,calls = fingerprints.small_copy,[]
    def dies(side, i, seq):
        calls.append((side.name,i))
        if len(calls)==6: raise KeyboardInterrupt
        return real(side, i, seq)
    monkeypatch.setattr(fingerprints, 'small_copy', dies)
    with pytest.raises(KeyboardInterrupt): leakage_audit(cohort_of(store, home, test), test, **kw)
    first = leakage_audit(cohort_of(store, home, test), test, **kw)
    assert len(calls)==len(set(calls))+1
    monkeypatch.setattr(fingerprints, 'small_copy', lambda *_: 1/0)
    pd.testing.assert_frame_equal(leakage_audit(cohort_of(store, home, test), test, **kw), first)


def cohort_of(store, home, test): return kaggle_cohort(home/'scans').iloc[:3]


def test_workers_change_nothing(cohorts):
    train,test = cohorts
    a,b = (leakage_audit(train.iloc[:3], test.iloc[:2], 'FLAIR', **{**quick,'n_workers':n}) for n in (0,2))
    pd.testing.assert_frame_equal(a, b)


def test_identifiers(home, cohorts):
    "A map, a barcode, a shared UID and equal voxels are each enough; equal numbers are not, where the images differ"
    train,test = (o.iloc[:3].reset_index(drop=True) for o in cohorts)
    train = train.assign(patient=['TCGA-02-0001','00001','00002'])
    renamed = test.assign(patient=['TCGA-02-0001-01','00001','Y'])
    df = leakage_audit(train, renamed, 'FLAIR', ids={'00002':'Y'}, **quick).set_index(['train','test'])
    assert df.verdict['TCGA-02-0001','TCGA-02-0001-01']=='same'
    assert df.identifiers['TCGA-02-0001','TCGA-02-0001-01']=='equal patient id'
    assert df.verdict['00002','Y']=='same' and df.identifiers['00002','Y']=='id map'
    assert df.stage['00002','Y']=='identifiers'
    assert df.verdict['00001','00001']=='uncertain'
    shutil.copytree(train.FLAIR[1], home/'copy')
    v = read_volume(train.FLAIR[2])
    twin = test.assign(patient=list('ABC'), FLAIR=[str(home/'copy'), save(v, home/'twin.nii'), test.FLAIR[2]])
    df = leakage_audit(train, twin, 'FLAIR', **quick).set_index(['train','test'])
    assert df.identifiers['00001','A'] in ('equal voxels','a shared series or SOP UID')
    assert df.verdict['00001','A']=='same'
    assert df.verdict['00002','B']=='same'


def test_the_volume_of_a_folder_that_the_cohort_means_is_compared(home, cohorts):
    train,test = (o.iloc[:3].reset_index(drop=True) for o in cohorts)
    (home/'both').mkdir()
    for seq in ('FLAIR','T1wCE'):
        for f in Path(train[seq][1]).iterdir(): shutil.copy(f, home/'both'/f'{seq}-{f.name}')
    flair = read_volume(train.FLAIR[1]).numpy()
    meant = next(k for k in (0,1) if np.array_equal(read_volume(home/'both', k).numpy(), flair))
    for k in (meant,1-meant):
        twin = test.assign(patient=list('ABC'), FLAIR=[str(home/'both'), *test.FLAIR[1:]], FLAIR_index=[k,None,None])
        df = leakage_audit(train, twin, 'FLAIR', **quick)
        assert not len(df.attrs['report'])
        pair = df.set_index(['train','test']).loc[('00001','A')]
        equal = pair.identifiers in ('equal voxels','a shared series or SOP UID')
        assert equal==(k==meant) and (pair.verdict=='same' or k!=meant)


@pytest.mark.parametrize('kind', ['shift','turn','slices','gamma','bias','noise','peel','crop','flip','all'])
def test_every_change_alone_and_together(cohorts, kind):
    "A changed copy is nearer its own brain than any other brain is"
    train,_ = cohorts
    vols = [read_volume(p) for p in train.FLAIR[:3]]
    fixed = [Structure(low_resolution(v)) for v in vols]
    for i in range(3):
        rng = rng_for(0, kind, i)
        copy = Structure(low_resolution(perturb(vols[i], rng,
            **draw_perturbation(rng, strength=1., **({} if kind=='all' else dict(kinds=(kind,)))))))
        scores = [pair_score(register_rigid(f, copy)) for f in (fixed[i],fixed[(i+1)%3])]
        assert scores[0]>.4>.3>scores[1], (kind,i,scores)


def test_with_its_skull_against_without():
    p = draw_patients(2, seed=2)
    brains = [render_patient(p.iloc[i], 2, 'T1wCE', slices=36, size=72)['T1wCE'][0] for i in (0,1)]
    head = render_patient(p.iloc[0], 2, 'T1wCE', skull=True, slices=30, size=84, fov=240)['T1wCE'][0]
    own,other = (pair_score(register_rigid(b, head)) for b in brains)
    assert own>.5 and other<.3


def test_a_pose_is_recovered():
    "The matrix takes each point of the fixed head to the same point of the moved one"
    v = render_patient(draw_patients(1, seed=4).iloc[0], 4, 'T1wCE', slices=40, size=80)['T1wCE'][0]
    a = np.eye(4); a[:3,:3] = np.array([[.98,-.17,0],[.17,.98,0],[0,0,1]])/np.hypot(.98,.17); a[:3,3] = 7,-5,9
    moved = Volume(v, affine=a@v.affine)
    low = [low_resolution(o) for o in (v,moved)]
    found = low[1].affine@register_rigid(v, moved, flips=False).matrix@np.linalg.inv(low[0].affine)
    points = np.random.default_rng(0).uniform(-50, 50, (50,3))
    off = points@found[:3,:3].T+found[:3,3] - (points@a[:3,:3].T+a[:3,3])
    assert np.linalg.norm(off, axis=1).max()<1.5


def test_a_mirrored_scan_has_the_mirrored_fingerprint(cohorts):
    low = [low_resolution(read_volume(p)) for p in cohorts[0].FLAIR[:4]]
    t = average_brain(low)
    mirror = template_points(t)[1]
    x,y = fingerprint(low[0], t),fingerprint(np.asarray(low[0])[:,:,::-1].copy(), t)
    assert np.corrcoef(x[mirror], y)[0,1]>.95
    assert (mirror[mirror]==np.arange(len(mirror))).all()
    zero = np.zeros(len(mirror), np.float32)
    (*_,s), = compare_fingerprints(np.stack([x]), np.stack([x,x[mirror]]), zero, mirror)
    parts = [m for *_,m in compare_fingerprints(np.stack([x,y]), np.stack([x,x[mirror]]), zero, mirror, block=1)]
    assert len(parts)==4 and np.allclose(parts[0], s[0,0])
    assert np.allclose(s, (x!=0).mean()**.5, atol=1e-3)


def test_null_keeps_its_promise_and_ignores_copies_within():
    rng = np.random.default_rng(0)
    scores = rng.normal(.41, .05, 300)**2
    null = Null(scores)
    fresh = rng.normal(.41, .05, 200_000)**2
    assert .3<(fresh>null.threshold(.01)).mean()/.01<3
    dirty = Null(np.r_[scores, np.full(20,.7)])
    assert len(dirty.odd)==20 and abs(dirty.threshold(1e-4)-null.threshold(1e-4))<.01
    assert Null([]).threshold(.01)>.2 and Null(scores[:3]).threshold(1e-3)>null.threshold(1e-3)
    assert abs(null.chance(null.threshold(1e-3))-1e-3)<1e-6


def copy_of(vol, name):
    "A changed copy, at half the strongest of every change"
    rng = rng_for(11, name)
    return perturb(vol, rng, **draw_perturbation(rng, strength=.5))


def test_a_tiny_set_of_copies_is_decided_by_the_null_measured_beforehand(home, cohorts):
    "Two training and three test brains, one of the latter under two names: its own null pairs could decide nothing"
    train = cohorts[0].iloc[:2].reset_index(drop=True)
    rows = [dict(patient=k, FLAIR=save(copy_of(read_volume(train.FLAIR[i]), k), home/f'{k}.nii'))
        for i,k in ((0,'tinyA'),(0,'tinyB'),(1,'tinyC'))]
    df = leakage_audit(train, pd.DataFrame(rows), 'FLAIR', **quick)
    first,second = train.patient
    assert pairs(df)=={(first,'tinyA'),(first,'tinyB'),(second,'tinyC')} and not pairs(df, 'uncertain')
    limits,report = df.attrs['thresholds'][0],pd.DataFrame(df.attrs['report'])
    assert limits['same']<.5 and df.attrs['recall'][0]['found']==2
    assert 'measured beforehand' in limits['null']
    assert 'measured beforehand; of its own this set has 3 pairs' in df.attrs['summary']
    assert report.patient.tolist()==['tinyA, tinyB'] and 'one patient under two names' in report.what[0]


def test_what_one_sequence_finds_leaves_the_null_of_all(home, cohorts):
    "A patient under two names, told by equal voxels of one sequence, is in no sequence's null, and is reported once"
    train,test = (o.iloc[:3].reset_index(drop=True) for o in cohorts)
    copy = save(copy_of(read_volume(test.FLAIR[0]), 'twin'), home/'twin_FLAIR.nii')
    twin = pd.concat([test, test.iloc[:1].assign(patient='twin', FLAIR=copy)], ignore_index=True)
    told = leakage_audit(train, twin, 'FLAIR,T1wCE', **quick)
    assert not pairs(told) and not pairs(told, 'uncertain')
    for r in told.attrs['thresholds']:
        assert r['null_pairs']==3+6-1
        assert r['same']==MeasuredNull(r['sequence']).threshold(.01/12)
    assert [r['patient'] for r in told.attrs['report']]==[f'{test.patient[0]}, twin']


def test_copies_within_do_not_hide_themselves():
    "Nulls of two sequences, by hand: the pair that T1w shows leaves FLAIR's, whose threshold is then that without it"
    side = type('Side', (), dict(name='test', patients=list('abcde')))()
    clean = [.14,.16,.18,.19,.2,.21,.22,.23,.2]
    def facts(label, odd):
        strangers = [(NS(scans=side),i,j) for i in range(5) for j in range(i+1,5)]
        scores = [odd,*clean]
        done = {('null',k): dict(score=o) for k,o in enumerate(scores)}
        return NS(label=label, seqs=(label,), strangers=strangers, done=done, known={}, chosen=[], expected=10,
            parts=(NS(scans=side, facts=[]),NS(scans=side, facts=[])))
    both,opt = [facts('FLAIR', .33),facts('T1w', .8)],NS(alarms=(.01,.1))
    for enough in (5,30):
        confirm.ENOUGH = enough
        try: twins = leakage._settle_nulls(both, dict(test=side), opt)
        finally: confirm.ENOUGH = 30
        assert twins=={('test',0,1):'T1w'}
        assert all(f.same==(Null(clean) if enough<9 else MeasuredNull(f.label)).threshold(.001) for f in both)


def test_none_found_never_without_the_recall(cohorts):
    train,test = (o.iloc[:3] for o in cohorts)
    said = leakage_audit(train, test, 'FLAIR', **quick).attrs['summary']
    assert 'None found; 2 of 2 planted copies were found (recall 100.0%, 95 % interval' in said
    said = leakage_audit(train, test, 'FLAIR', **{**quick, 'planted':0}).attrs['summary']
    assert 'None found' not in said and 'not known' in said


def test_bad_input_is_refused_or_reported(home, cohorts, store):
    train,test = (o.iloc[:3].reset_index(drop=True) for o in cohorts)
    fails(lambda: leakage_audit(train, test[:0], **quick), contains='test has no patients')
    fails(lambda: leakage_audit(train.drop(columns='FLAIR'), test.drop(columns='T1wCE'), **quick),
        contains="name them: sequences=[('T1w','T1wCE')]")
    fails(lambda: leakage_audit(train, test, 'T2w', **quick), contains='no patient of train has T2w')
    fails(lambda: leakage_audit(train, test, 'FLAIRE', **quick), contains='FLAIR')
    fails(lambda: leakage_audit([1], test, **quick), contains='must be a VolumeStore')
    fails(lambda: leakage_audit(pd.concat([train,train]), test, **quick), contains='more than once')
    blank = save(Volume(torch.zeros(8,16,16)), home/'blank.nii')
    lacking = test.assign(FLAIR=[blank, None, test.FLAIR[2]])
    df = leakage_audit(train, lacking, 'FLAIR', **quick)
    report = pd.DataFrame(df.attrs['report']).set_index('patient').what
    assert len(df)==3 and 'empty or blank' in report[test.patient[0]] and report[test.patient[1]]=='sequence missing'
    assert str(home) not in df.attrs['summary']+report.str.cat()
    df = leakage_audit(train, test.assign(FLAIR=[blank,None,None]), 'FLAIR', **quick)
    assert not len(df) and 'not compared: no volume of test could be used' in df.attrs['summary']
    assert 'None found' not in df.attrs['summary']
    df = leakage_audit(train, test.iloc[:1], [('FLAIR','T1wCE')], **quick)
    assert set(df.sequence)=={'FLAIR~T1wCE'}


def test_a_store_of_another_size(home, cohorts, store):
    other = prepare(cohorts[0].iloc[:2].assign(patient=['a','b']), home/'other', ('FLAIR',), size=(24,48,56),
        n_workers=1, progress=False)
    df = leakage_audit(store, other, **quick)
    assert pairs(df)=={(store.table.patient[0],'a'),(store.table.patient[1],'b')}
    assert (home/'other'/'fingerprints'/'small_FLAIR.npy').exists() and len(VolumeStore(home/'other'))==2


def test_published_measure_is_appended(home, store):
    few = prepare(kaggle_cohort(home/'scans','test').iloc[:1], home/'few', ('FLAIR',), size=(32,64,64), n_workers=1,
        progress=False)
    for n,rule,limit,how in ((6,True,.8,'all'),(12,'code',.9,'any')):
        df = leakage_audit(store, few, dest=home/'published', published=rule, **quick)
        assert len(pd.read_csv(home/'published'/'published.csv'))==n
        assert (df.published_alarm==getattr(df[['published_xcorr','published_mi']]>limit, how)(axis=1)).all()
    assert df.published_xcorr.between(-1,1.001).all() and (df.published_mi>0).all() and df.published_alarm.dtype==bool
    fails(lambda: leakage_audit(store, few, published='txt', **quick), contains='text')


def test_mutual_information_does_not_see_the_curve_between():
    x = torch.randn(4800, generator=torch.Generator().manual_seed(0))
    assert abs(normalised_mutual_information(x, x.exp()*3)-1)<1e-9
    assert abs(normalised_mutual_information(x, -x)-1)<1e-9
    assert normalised_mutual_information(x, torch.randn(4800, generator=torch.Generator().manual_seed(1)))<.05
    fails(lambda: low_resolution(Volume(torch.full((9,9,9), 3.))), contains='blank')


def test_the_command(home, store, capsys):
    "A store against a folder of scans: nobody; against a part of itself: somebody; against nothing: one line"
    from mgmt_fast.cli import mgmt_leakage
    few = prepare(kaggle_cohort(home/'scans').iloc[:2].assign(patient=['p','q']), home/'part', ('FLAIR',),
        size=(32,64,64), n_workers=1, progress=False)
    assert mgmt_leakage(home/'part', home/'scans'/'test', home/'cmd', sequences='FLAIR', planted=1, n_workers=0)==0
    assert 'None found; 1 of 1 planted' in capsys.readouterr().out
    assert mgmt_leakage(home/'store', few.path, home/'cmd', planted=0, n_workers=0)==1
    assert 'same: train 00000, test p' in capsys.readouterr().out
    assert mgmt_leakage(home/'store', home/'nowhere', home/'cmd')==2


@pytest.mark.real
def test_the_real_pair_among_phantoms(home, cohorts):
    "A patient as scanned, and after another pipeline, without the skull; and a patient who is somebody else"
    import os
    data = os.environ['MGMT_FAST_DATA']
    raw = next(Path(data, 'tcga_lgg_raw/TCGA-FG-6692').glob('*_fla.nii.gz'))
    brats = f'{data}/brats/BraTS-GLI-00001-000/BraTS-GLI-00001-000-t2f.nii.gz'
    stripped = f'{data}/tcga_lgg_brats_space/TCGA-FG-6692/raw_bet/OtherEXampleFromTCIA_fla_bet.nii.gz'
    real = [dict(patient='BraTS-GLI-00001-000', FLAIR=brats, source='brats'),
        dict(patient='BraTS-9', FLAIR=stripped, source='brats')]
    train = pd.concat([cohorts[0].iloc[:4], pd.DataFrame(real)], ignore_index=True)
    test = pd.concat([cohorts[1].iloc[:2], pd.DataFrame([dict(patient='TCGA-FG-6692', FLAIR=str(raw), source='tcga')])],
        ignore_index=True)
    df = leakage_audit(train, test, 'FLAIR', **quick)
    assert pairs(df)=={('BraTS-9','TCGA-FG-6692')} and not pairs(df, 'uncertain')
