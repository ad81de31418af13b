"""Phantoms with skull, eyes and neck, tilted, shifted and in thick slices, brought to an atlas by a known motion.

The atlas is the same phantom's brain, so that the true motion is known; the real patient is compared with what others
found."""
import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation

from mgmt_fast import standardize as room
from mgmt_fast.atlas import Atlas, read_atlas
from mgmt_fast.cohort import cohort_report, find_cohort
from mgmt_fast.core import SEQUENCES, MGMTError, Volume, rng_for
from mgmt_fast.engines import distances, engine_table
from mgmt_fast.grids import isotropic, resample
from mgmt_fast.leakage import leakage_audit
from mgmt_fast.phantom import draw_patients, draw_series, render_patient, tissue_shares
from mgmt_fast.series import read_volume
from mgmt_fast.standardize import level, standardize, standardize_patient

engines = pytest.mark.skipif(engine_table().version.isna().any(), reason='needs the extra `tcga`')
SCAN = dict(slices=26, size=144, fov=230, tilt=10, shift=5)


def at_the_edge():
    "A patient whose tumour reaches the brain's surface"
    p = draw_patients(4, seed=3).iloc[1].copy()
    place = np.array([p.x,p.y,p.z])
    p['x'],p['y'],p['z'] = place*.82/np.linalg.norm(place/[66,84,56])
    return p


@pytest.fixture(scope='module')
def patient(): return at_the_edge()


@pytest.fixture(scope='module')
def atlas(patient):
    brain = render_patient(patient, 3, 'T1w', slices=95, size=136, fov=205)['T1w'][0]
    return Atlas(isotropic(brain, 1.5))


@pytest.fixture(scope='module')
def scans(patient): return render_patient(patient, 3, ('T1w','FLAIR'), skull=True, **SCAN)


@pytest.fixture(scope='module')
def raw(scans): return {s: v for s,(v,_) in scans.items()}


@pytest.fixture(scope='module')
def result(raw, atlas): return standardize_patient(dict(raw, patient='a'), atlas)


def true_motion(patient, s):
    "From the atlas to a scan: where the head went meanwhile"
    m = np.eye(4)
    m[:3,3] = draw_series(patient, s, 3, **SCAN).moved
    return m


def inner(atlas): return room._points(atlas.brain, 5)


@engines
def test_the_known_motion_of_a_raw_phantom_is_found(result, patient, atlas):
    assert result.state=='raw' and not result.problems and set(result.volumes)=={'T1w','FLAIR'}
    for s,m in result.matrices.items():
        away = distances(m, true_motion(patient, s), inner(atlas))
        assert away.mean()<.5, (s, away.mean(), away.max())


def inside_of_bone(patient, space):
    "Brain, fluid and dura of the phantom: what a mask that ends at the bone should hold"
    shares,_,brain = tissue_shares(patient, space.affine, tuple(space.shape), 3, skull=True)
    parts,_ = ndimage.label(shares['bone']<.5)
    return parts==parts[tuple(np.argwhere(brain).mean(0).astype(int))]


@engines
def test_the_mask_ends_at_the_bone_and_holds_all_of_a_tumour_at_its_edge(result, scans, patient, atlas):
    mask,truth = np.asarray(result.mask)>0,inside_of_bone(patient, atlas.volume)
    assert 2*(mask&truth).sum()/(mask.sum()+truth.sum())>=.97
    lesion = room._inside((scans['T1w'][1]>0), atlas.volume, true_motion(patient, 'T1w'))
    assert lesion.sum()>1000 and (lesion&~mask).sum()<=.01*lesion.sum()


@engines
def test_what_is_written_lies_on_the_atlas_and_holds_no_skull(result, atlas):
    for v in result.volumes.values():
        assert v.shape==atlas.volume.shape and np.allclose(v.affine, atlas.volume.affine)
        assert not np.asarray(v)[np.asarray(result.mask)==0].any() and (np.asarray(v)>=0).all()


@engines
def test_a_header_that_is_turned_and_shifted_changes_nothing(raw, result, atlas):
    rng = rng_for(0, 'turn')
    m = np.eye(4)
    m[:3,:3] = Rotation.from_rotvec(np.radians(15)*np.array([.6,-.64,.48])).as_matrix()
    m[:3,3] = 20*rng.standard_normal(3)/3**.5
    turned = Volume(raw['T1w'], affine=m@raw['T1w'].affine)
    got = standardize_patient(dict(patient='a', T1w=turned), atlas)
    assert distances(got.matrices['T1w'], m@result.matrices['T1w'], inner(atlas)).max()<.5


@pytest.mark.slow
@engines
def test_a_head_that_is_upside_down_is_refused_and_said_to_be(raw, atlas):
    v = raw['T1w']
    res = standardize_patient(dict(patient='a', T1w=Volume(np.flip(v.numpy(), 0).copy(), affine=v.affine)), atlas)
    (_,what), = res.problems
    assert not res.volumes and what.startswith('refused') and 'top and bottom exchanged' in what
    assert room.draw_check(res, atlas).shape[2]==3


@pytest.mark.slow
@engines
def test_another_head_in_place_of_a_sequence_is_refused_alone(raw, atlas):
    mixed = np.random.default_rng(0).permuted(raw['FLAIR'].numpy(), axis=2)
    noise = Volume(torch.from_numpy(mixed), raw['FLAIR'].affine)
    res = standardize_patient(dict(patient='a', T1w=raw['T1w'], FLAIR=noise), atlas)
    assert list(res.volumes)==['T1w'] and [s for s,_ in res.problems]==['FLAIR']


@engines
def test_another_program_finds_the_brain_in_a_process_of_its_own(raw, patient, atlas, tmp_path, monkeypatch):
    "A stand-in for HD-BET knows the brain; deepbet is never asked"
    monkeypatch.setattr(room, 'brain_mask', lambda vol: pytest.fail('deepbet was asked'))
    leveled,back = level(raw['T1w'])
    head = isotropic(leveled)
    inside = room._inside(atlas.brain, head, np.linalg.inv(np.linalg.inv(back)@true_motion(patient, 'T1w')))
    Volume(torch.from_numpy(inside.astype(np.uint8)), affine=head.affine).save(tmp_path/'brain.nii.gz')
    program = tmp_path/'hd-bet.py'
    program.write_text(f"""import sys, nibabel as nib
assert sys.argv[1:4:2]==['-device','-i'] and sys.argv[5]=='-o'
head,brain = nib.load(sys.argv[4]),nib.load({str(tmp_path/'brain.nii.gz')!r})
nib.save(nib.Nifti1Image(head.get_fdata()*brain.get_fdata(), head.affine), sys.argv[6])""")
    stripper = shlex.join([sys.executable, str(program), '-device', 'cpu'])
    raw['T1w'].float().save(tmp_path/'T1w.nii.gz')
    cohort = pd.DataFrame(dict(patient=['a'], T1w=[str(tmp_path/'T1w.nii.gz')]))
    def run(by): return standardize(cohort, tmp_path/'out', atlas=atlas, n_workers=0, progress=False, stripper=by)
    assert run(stripper).problem.isna().all()
    mask,brain = (np.asarray(o)>0 for o in (read_volume(tmp_path/'out/a/brain_mask.nii.gz'),atlas.brain))
    assert 2*(mask&brain).sum()/(mask.sum()+brain.sum())>.97
    assert 'cannot be started' in run('/no/hd-bet').problem[0] # another program: the earlier result is not taken for it


@engines
def test_the_same_patient_prepared_by_two_pipelines_is_found(result, patient, atlas, tmp_path):
    "Here, and elsewhere: other masks, another pose, cubic interpolation, z-scores; three others are somebody else"
    turn = np.eye(4)
    turn[:3,:3] = Rotation.from_euler('xyz', [3,-4,5], degrees=True).as_matrix()
    def elsewhere(p):
        scan = render_patient(p, 3, 'FLAIR', slices=60, size=110, fov=205)['FLAIR'][0]
        x = room.into_space(scan, isotropic(atlas.volume, 2), turn, 'cubic')
        brain = np.asarray(x)>1
        x = room._stripped(room._z_scores(x, brain), brain)
        return str(x.save(tmp_path/f'{p.patient}.nii.gz'))
    others = [p for _,p in draw_patients(4, seed=3).iterrows() if p.patient!=patient.patient]
    train = pd.DataFrame([dict(patient=f'T{p.patient}', FLAIR=elsewhere(p)) for p in (patient,*others)])
    ours = str(result.volumes['FLAIR'].save(tmp_path/'ours.nii.gz'))
    found = leakage_audit(train, pd.DataFrame(dict(patient=['X'], FLAIR=[ours])), 'FLAIR', n_workers=0, planted=0,
        progress=False)
    assert found.train[found.verdict=='same'].tolist()==[f'T{patient.patient}']


def test_levelling_takes_away_any_header():
    rng = np.random.default_rng(0)
    v = Volume(torch.zeros(6,30,20), affine=np.diag([5.,1,1.5,1]))
    for _ in range(20):
        m = np.eye(4)
        m[:3,:3],m[:3,3] = Rotation.from_rotvec(rng.uniform(-.25,.25,3)).as_matrix(),rng.uniform(-50,50,3)
        there,back = level(Volume(v, affine=m@v.affine))
        assert np.allclose(there.affine, level(v)[0].affine)
        assert np.allclose(back@np.linalg.inv(level(v)[1]), m)


@pytest.fixture
def folder(tmp_path, atlas):
    "Two patients who are on the atlas already, one damaged"
    for p in 'ab': (atlas.volume*(1 if p=='a' else 2)).save(tmp_path/'raw'/p/'T1w'/'x.nii.gz')
    (tmp_path/'raw/c/T1w').mkdir(parents=True)
    (tmp_path/'raw/c/T1w/x.nii.gz').write_bytes(b'secret name')
    atlas.volume.save(tmp_path/'atlas.nii.gz')
    rows = [dict(patient=p, label=1, T1w=str(tmp_path/'raw'/p/'T1w'/'x.nii.gz')) for p in 'abc']
    return pd.DataFrame(rows),tmp_path


def run(cohort, where, **kwargs):
    return standardize(cohort, where/'out', atlas=where/'atlas.nii.gz', progress=False, **kwargs)


def test_a_bad_patient_is_a_row_and_work_is_resumed(folder, monkeypatch):
    cohort,where = folder
    done = run(cohort, where, n_workers=2)
    assert done.problem.isna().tolist()==[True,True,False] and done.label.tolist()==[1,1,1]
    assert done.T1w.notna().tolist()==[True,True,False] and 'secret' not in done.problem[2]
    times = {p: (where/'out'/p/'standardized.json').stat().st_mtime_ns for p in 'ab'}
    again = run(cohort, where, n_workers=0)
    assert again.problem.fillna('').tolist()==done.problem.fillna('').tolist()
    assert times=={p: (where/'out'/p/'standardized.json').stat().st_mtime_ns for p in 'ab'}
    Path(done.T1w[0]).unlink() # half a patient is done again
    (read_volume(cohort.T1w[1])*3).save(cohort.T1w[1]) # as is one whose scan was replaced
    run(cohort, where, n_workers=0)
    now = {p: (where/'out'/p/'standardized.json').stat().st_mtime_ns for p in 'ab'}
    assert Path(done.T1w[0]).is_file() and all(now[p]>times[p] for p in 'ab')
    assert not list((where/'out').glob('.patient-*'))


def test_a_process_that_dies_costs_one_patient(folder, monkeypatch):
    cohort,where = folder
    real = room._do_patient
    def _dies(row, *args):
        if row['patient']=='a': os._exit(9)
        return real(row, *args)
    monkeypatch.setattr(room, '_do_patient', _dies)
    done = run(cohort, where, n_workers=0)
    assert 'died' in done.problem[0] and pd.isna(done.problem[1])
    monkeypatch.undo()
    assert run(cohort, where, n_workers=0).problem.isna().tolist()==[True,True,False]


def test_nothing_that_others_wrote_is_overwritten(folder):
    cohort,where = folder
    (where/'out/a').mkdir(parents=True)
    (where/'out/a/notes.txt').write_text('mine')
    done = run(cohort[:1], where, n_workers=0)
    assert 'not written by this command' in done.problem[0]
    assert [p.name for p in (where/'out/a').iterdir()]==['notes.txt']


def test_ids_that_name_no_folder_and_patients_twice_are_refused(folder):
    cohort,where = folder
    assert 'cannot name a folder' in run(cohort[:1].assign(patient='../a'), where, n_workers=0).problem[0]
    with pytest.raises(MGMTError, match='more than once'): run(cohort[[True]*3].assign(patient='a'), where)
    with pytest.raises(MGMTError, match='no atlas was given'): standardize(cohort, where/'out')


def test_the_page_and_the_record_tell_no_places(folder):
    cohort,where = folder
    run(cohort, where, n_workers=0)
    page,record = (where/'out/qc.html').read_text(),(where/'out/a/standardized.json').read_text()
    assert str(where) not in page+record+(where/'out/scores.csv').read_text()
    d = json.loads(record)
    assert d['state']=='prepared' and d['matrices']['T1w']==np.eye(4).tolist() and len(d['atlas']['digest'])==32
    assert page.index('<b>c</b>')<page.index('<b>a</b>')


def test_a_damaged_picture_stops_no_page(folder):
    cohort,where = folder
    run(cohort, where, n_workers=0)
    picture = where/'out/.qc/a.jpg'
    picture.write_bytes(picture.read_bytes()[:400])
    run(cohort, where, n_workers=0)
    assert 'its picture is damaged' in (where/'out/qc.html').read_text()


def test_who_was_refused_is_told_where_the_result_is_read(folder):
    cohort,where = folder
    run(cohort, where, n_workers=0)
    said = cohort_report(find_cohort(where/'out')).problem
    assert said.str.contains('mgmt_standardize refused it').sum()==1


def test_dicom_holds_the_same_voxels_at_the_same_place(folder):
    cohort,where = folder
    done = run(cohort[:1], where, n_workers=0, dicom=True)
    assert done.problem.isna().all()
    nifti,dicom = (read_volume(p) for p in (done.T1w[0], where/'out/a/dicom/T1w'))
    back = resample(dicom, nifti.affine, nifti.shape)
    assert np.allclose(back, nifti, atol=1) and np.asarray(nifti).any()
    assert find_cohort(where/'out').T1w.notna().all()


@pytest.mark.real
@engines
def test_a_real_patient_against_the_2020_transforms(data, tmp_path):
    "The targets that others' own results allow; figures in `benchmarks/standardize.py`"
    sys.path.insert(0, str(Path(__file__).parent.parent/'benchmarks'))
    from standardize import Reference, atlas_table, mask_table, registration
    ref = Reference(data)
    res = standardize_patient(ref.raw, ref.atlas)
    assert not res.problems
    t = registration(ref, res).set_index('sequence')
    assert t.ncc['T1w']>=.84 and t.mean_mm['T1w']<=3 and t.most_mm['T1w']<=5
    assert (t.onto_t1_mean<=1).all() and (t.onto_t1_most<=2).all()
    nmi = atlas_table(ref, res).set_index('what').nmi
    assert nmi['here']>=nmi['published']
    own = mask_table(ref, res).query("grid=='1 mm'").set_index('against').loc[['HD-BET','published']]
    assert (own.dice>=.955).all() and (own.hd95<=4.5).all() and (own.missed<=.05).all()
