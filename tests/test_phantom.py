"The phantom as its files are: layout, bytes, headers, geometry, what depends on the label and what must not."
import hashlib, os, signal, subprocess, sys, time
from pathlib import Path

import numpy as np, pandas as pd, pydicom, pytest
from scipy.stats import spearmanr

from mgmt_fast.core import SEQUENCES, MGMTError
from mgmt_fast.phantom import (_gadolinium, _unevenness, draw_patients, draw_series, make_phantom, measure_traits,
    phantom_bound, read_side_table, render_patient)
from mgmt_fast.series import read_volume

SMALL = dict(slices=6, size=32, progress=False)


def digest(root):
    return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(root).rglob('*')) if p.is_file()}


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    "A phantom with all that real folders have"
    dest = tmp_path_factory.mktemp('mixed')/'cohort'
    kw = dict(n=6, auc=.8, seed=3, slices=(9,14), size=(40,56), fov=(200,230), planes=('axial','coronal','sagittal'),
        tilt=6, shift=3, shuffle=True, missing={'00001':['FLAIR'],'00003':['T1w','T2w']}, blank={'00002':['FLAIR']},
        progress=False)
    make_phantom(dest, **kw)
    return dest,kw


def test_same_bytes_whatever_the_workers(mixed, tmp_path):
    dest,kw = mixed
    make_phantom(tmp_path/'b', n_workers=0, **kw)
    assert digest(dest)==digest(tmp_path/'b')
    make_phantom(tmp_path/'c', n_workers=0, **{**kw,'seed':4})
    a,c = digest(dest),digest(tmp_path/'c')
    assert not {v for k,v in a.items() if k.endswith('.dcm')} & {v for k,v in c.items() if k.endswith('.dcm')}


def test_layout_is_the_competitions(mixed):
    dest,kw = mixed
    labels,sub = (pd.read_csv(dest/f'{o}.csv', dtype=str) for o in ('train_labels','sample_submission'))
    table = read_side_table(dest)
    assert list(labels)==list(sub)==['BraTS21ID','MGMT_value']
    assert table.patient.tolist()==[f'{i:05d}' for i in range(6)]
    for split,ids in (('train',labels.BraTS21ID),('test',sub.BraTS21ID)):
        assert sorted(ids)==sorted(o.name for o in (dest/split).iterdir())==sorted(table.patient[table.split==split])
    for p in table.itertuples():
        have = {o.name for o in (dest/p.split/p.patient).iterdir()}
        assert have==set(SEQUENCES)-set(kw['missing'].get(p.patient,()))
        for o in (dest/p.split/p.patient).iterdir():
            assert {f.name for f in o.iterdir()}=={f'Image-{i+1}.dcm' for i in range(len(list(o.iterdir())))}
    assert {o.name for o in dest.iterdir()}=={'train','test','train_labels.csv','sample_submission.csv','phantom.csv',
        'phantom.json'}
    assert not any(k in (dest/'sample_submission.csv').read_text() for k in (',0\n',',1\n'))


def test_files_hold_what_was_rendered(mixed):
    "Through the reader: the same value at the same millimetre, in every plane, obliquity and numbering"
    dest,kw = mixed
    table = draw_patients(kw['n'], kw['auc'], kw['seed'])
    geometry = {k:kw[k] for k in ('slices','size','fov','planes','tilt','shift')}
    planes = set()
    for _,p in table.iterrows():
        images = render_patient(p, kw['seed'], [s for s in SEQUENCES if s not in kw['missing'].get(p.patient,())],
            **geometry)
        for seq,(v,_) in images.items():
            if seq in kw['blank'].get(p.patient,()): continue
            r = read_volume(dest/p.split/p.patient/seq)
            planes.add(r.plane)
            idx = np.argwhere(np.asarray(v)>0)[::97]
            at = np.c_[v.world(idx), np.ones(len(idx))]@np.linalg.inv(r.affine).T
            assert np.abs(at-at.round()).max()<1e-3
            d,h,w = at[:,:3].round().astype(int).T
            assert (np.asarray(r)[d,h,w]==np.asarray(v)[tuple(idx.T)]).all()
    assert planes=={'axial','coronal','sagittal'}


def test_headers_are_consistent(mixed):
    dest,_ = mixed
    uids,frames = set(),{}
    for folder in sorted(dest.glob('t*/*/*')):
        ds = [pydicom.dcmread(o, stop_before_pixels=True) for o in folder.iterdir()]
        assert {(d.Modality,d.SOPClassUID.name,d.SeriesDescription,d.PatientID,d.BitsAllocated,
            d.PhotometricInterpretation) for d in ds}=={('MR','MR Image Storage',folder.name,folder.parent.name,16,
            'MONOCHROME2')}
        assert len({d.SeriesInstanceUID for d in ds})==1 and sorted(int(d.InstanceNumber)
            for d in ds)==list(range(1,len(ds)+1))
        assert not {d.SOPInstanceUID for d in ds}&uids
        uids |= {d.SOPInstanceUID for d in ds}
        frames.setdefault(folder.parent.name, set()).add((ds[0].StudyInstanceUID,ds[0].FrameOfReferenceUID))
        assert all(len(str(o))<=16 for d in ds for o in [*d.ImagePositionPatient,*d.ImageOrientationPatient,
            *d.PixelSpacing])
        assert ('InversionTime' in ds[0])==(folder.name=='FLAIR')
        assert ('ContrastBolusAgent' in ds[0])==(folder.name=='T1wCE')
        order = np.argsort([d.InstanceNumber for d in ds])
        if len(ds)>4:
            assert (np.diff([np.dot(ds[i].ImagePositionPatient,
                np.cross(ds[i].ImageOrientationPatient[:3],ds[i].ImageOrientationPatient[3:])) for i in order])<0).any()
    assert all(len(o)==1 for o in frames.values()) and len(set.union(*frames.values()))==len(frames)


def test_blank_series_are_black(mixed):
    dest,_ = mixed
    assert all(not pydicom.dcmread(o).pixel_array.any() for o in (dest/'train/00002/FLAIR').iterdir())
    table = read_side_table(dest).set_index('patient')
    assert np.isnan(table.measured_unevenness[['00001','00002']]).all() and table.oracle.notna().all()


def test_only_the_latents_traits_know_the_label():
    "Two auc give the same patients in all that is not planted, to the bit: geometry, and sequences that carry nothing"
    a,b = draw_patients(12, .5, 7),draw_patients(12, .95, 7)
    planted = ['latent','gadolinium','unevenness']
    pd.testing.assert_frame_equal(a.drop(columns=planted), b.drop(columns=planted))
    i = int((a.latent-b.latent).abs().argmax())
    for seq in SEQUENCES:
        (x,m),(y,n) = (render_patient(t.iloc[i], 7, seq, slices=12, size=48)[seq] for t in (a,b))
        x,y,m = (np.asarray(o) for o in (x,y,m))
        assert (m==np.asarray(n)).all()
        same = (x==y)
        if seq in ('T1w','T2w'): assert same.all()
        else:
            near = render_patient(a.iloc[i], 7, seq, slices=12, size=48)[seq][1]
            assert same[~_grown(np.asarray(near)>0, 4)].mean()>.97 and not same[m==(3 if seq=='T1wCE' else 2)].all()
    big = draw_patients(4000, .95, 1)
    rest = big.drop(columns=[*planted,'label','patient','split'])
    assert rest.corrwith(big.label).abs().max()<.06
    assert draw_patients(4000, .5, 1)[planted].corrwith(big.label).abs().max()<.06


def _grown(x, n):
    from scipy import ndimage
    return ndimage.binary_dilation(x, iterations=n)


def test_traits_rise_with_the_latent_without_saturation():
    "Everything else held still, brightness and unevenness in the images rise strictly from -4.5 to 4.5"
    p = draw_patients(4, .9, 2).iloc[1].copy()
    seen = []
    for z in np.linspace(-4.5, 4.5, 6):
        p['latent'],p['gadolinium'],p['unevenness'] = z,_gadolinium(z),_unevenness(z)
        seen.append(measure_traits(render_patient(p, 2, 'FLAIR,T1wCE', slices=20, size=80)))
    seen = pd.DataFrame(seen)
    assert (seen.diff()[1:]>0).all().all()
    assert (seen.oracle.diff()[1:]>.5).all()


def test_oracle_comes_close_to_the_bound(tmp_path):
    t = make_phantom(tmp_path/'p', n=40, auc=.9, seed=11, test=0, slices=20, size=72, sequences='FLAIR,T1wCE',
        progress=False)
    b = phantom_bound(t)
    assert b.n==40 and abs(b.bound-b.oracle)<.04
    assert spearmanr(t.latent, t.oracle)[0]>.95
    assert phantom_bound(tmp_path/'p').equals(b)


def test_shift_moves_the_head_but_not_the_header():
    p = draw_patients(3, .9, 5).iloc[0]
    still,moved = (render_patient(p, 5, 'T1w,T2w', slices=16, size=64, shift=o) for o in (0,8))
    assert all((still[s][0].affine==moved[s][0].affine).all() for s in still)
    centre = lambda o: o[1].world(np.argwhere(np.asarray(o[1])>0).mean(0))
    for s in still:
        true = draw_series(p, s, 5, slices=16, size=64, shift=8).moved
        assert np.abs(true).max()>1 and np.abs(centre(moved[s])-centre(still[s])-true).max()<3


def test_interrupted_work_is_made_anew(tmp_path):
    call = f"make_phantom({str(tmp_path/'a')!r}, n=10, slices=6, size=32, n_workers=0, progress=False)"
    code = f"from mgmt_fast.phantom import make_phantom; {call}"
    job = subprocess.Popen([sys.executable,'-c',code])
    while not list((tmp_path/'a').glob('train/0000[1-9]')) and job.poll() is None: time.sleep(.02)
    job.send_signal(signal.SIGKILL); job.wait()
    assert not (tmp_path/'a/phantom.csv').exists() and not (tmp_path/'a/train_labels.csv').exists()
    for n in ('a','b'): make_phantom(tmp_path/n, n=10, **SMALL)
    assert digest(tmp_path/'a')==digest(tmp_path/'b')


@pytest.mark.parametrize('kw,contains', [(dict(auc=1), 'auc must lie'), (dict(auc=.4), 'auc must lie'),
    (dict(n=0), 'n=0'), (dict(test=1), 'test=1'), (dict(prevalence=2), 'prevalence=2'),
    (dict(planes='axail'), "'axial'"),
    (dict(slices=1), 'slices=1'), (dict(size=4), 'size=4'), (dict(fov=0), 'fov=0'), (dict(missing=2), 'missing'),
    (dict(missing={'7':'FLAIR'}), "'7'"), (dict(missing={'00001':'T1'}), "'T1w'"),
    (dict(missing={'00001':SEQUENCES}), 'no sequence'), (dict(blank={'00001':'Flair'}), 'Flair'),
    (dict(sequences=''), 'sequence')])
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, kw, contains):
    with pytest.raises(MGMTError) as e: make_phantom(tmp_path/'x', **{**dict(n=4), **SMALL, **kw})
    assert contains in str(e.value) and not (tmp_path/'x').exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path/'x').mkdir(); (tmp_path/'x/notes.txt').write_text('mine'); (tmp_path/'f').write_text('mine')
    for o in ('x','f'):
        with pytest.raises(MGMTError, match='nothing is overwritten'): make_phantom(tmp_path/o, n=4, **SMALL)
    make_phantom(tmp_path/'y', n=4, **SMALL)
    before = digest(tmp_path/'y')
    with pytest.raises(MGMTError, match='another seed'): make_phantom(tmp_path/'y', n=4, seed=1, **SMALL)
    make_phantom(tmp_path/'y', n=4, **SMALL)
    assert digest(tmp_path/'y')==before


def test_destination_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(MGMTError, match='read-only or full'): make_phantom(tmp_path/'file'/'x', n=4, **SMALL)


@pytest.mark.skipif(os.name!='posix', reason='limits the size of files, which POSIX systems can')
@pytest.mark.parametrize('n_workers', [2])
def test_full_disk_is_one_clear_error(tmp_path, n_workers):
    code = f"""import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1500,1500))
from mgmt_fast.core import MGMTError
from mgmt_fast.phantom import make_phantom
try: make_phantom({str(tmp_path/'x')!r}, n=3, slices=6, size=32, n_workers={n_workers}, progress=False)
except MGMTError as e: print('refused:', e)"""
    out = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
    assert 'refused: writing patient' in out.stdout and 'is the disk full' in out.stdout, out.stderr
    assert not list((tmp_path/'x').glob('t*/*/*')) and not list((tmp_path/'x').glob('.patient-*'))
    assert not (tmp_path/'x/phantom.csv').exists()


def test_a_sample_of_one_class_has_no_bound():
    with pytest.raises(MGMTError, match='both classes'): phantom_bound(draw_patients(4, prevalence=1))
    with pytest.raises(MGMTError, match='finished phantom'): phantom_bound('nowhere')


@pytest.mark.real
def test_written_as_the_real_tables_are(mixed, data):
    dest,_ = mixed
    for real,ours in (('train_labels.csv','train_labels.csv'),
            ('gonzo3832/sample_submission.csv','sample_submission.csv')):
        a,b = (p.read_text().splitlines() for p in (data/'labels/rsna_miccai'/real, dest/ours))
        assert a[0]==b[0] and len(a[1].split(',')[0])==len(b[1].split(',')[0])==5
        assert {o.split(',')[1] for o in b[1:]}<={o.split(',')[1] for o in a[1:]}
