"Twenty identifiers are planted wherever a scan or a table may hold one; nothing that a command writes repeats them."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest

from mgmt_fast.phantom import make_phantom

BIN = Path(sys.executable).parent
PLANTED = dict(PatientName='Quillfeather^Zebedee', PatientID='PID5551212', PatientBirthDate='19530219',
    PatientAddress='Larkspur Mews', OtherPatientIDs='OPID777001', InstitutionName='Saint Wombat Hospital',
    ReferringPhysicianName='Draxington^Hugobert', OperatorsName='Ponsonby^Kaythorpe', AccessionNumber='ACC909090',
    StudyDescription='head of Thistlewood', PatientComments='wears a monocle', StudyDate='20191127',
    DeviceSerialNumber='DSN4711', StationName='WOMBATMR3')
UID,PRIVATE,FILE,FOLDER,DESCRIP,AUX,EXTENSION,COLUMN = ('1.2.826.0.1.8675309','Zebbie','MARCHBANKS','Featherstonehaugh',
    'Cholmondeley','Mainwaring','Beauchamp','Wriothesley')
NEEDLES = [o for v in PLANTED.values() for o in v.split('^')]+[UID,PRIVATE,FILE,FOLDER,DESCRIP,AUX,EXTENSION,COLUMN]


def plant(path):
    "Identifiers in the header of a slice, in its private elements and in its name"
    ds = pydicom.dcmread(path)
    for k,v in PLANTED.items(): setattr(ds, k, v)
    ds.StudyInstanceUID,ds.FrameOfReferenceUID = UID+'.1',UID+'.2'
    ds.SeriesInstanceUID = UID+'.3'
    ds.private_block(0x11, 'WOMBAT', create=True).add_new(1, 'LO', PRIVATE)
    n = path.stem.partition('-')[2]
    ds.save_as(path.with_name(f'{FILE}.MR.{n}.dcm'))
    path.unlink()


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Patients of whom one has a damaged slice, one two copies of a slice, and one NIfTI files full of text"
    root = tmp_path_factory.mktemp('scans')
    make_phantom(root, n=24, seed=1, test=0., slices=6, size=24, sequences='T1wCE', n_workers=0, progress=False)
    patients = sorted((root/'train').iterdir())
    for p in patients:
        for o in sorted((p/'T1wCE').iterdir()): plant(o)
    cut,twice,nifti = patients[:3]
    bad = sorted((cut/'T1wCE').iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:-300])
    shutil.copy(sorted((twice/'T1wCE').iterdir())[1], twice/'T1wCE'/f'{FILE}.copy.dcm')
    shutil.rmtree(nifti/'T1wCE')
    img = nib.Nifti1Image(np.random.default_rng(0).normal(size=(24,24,6)).astype(np.float32), np.diag([9.,9,20,1]))
    img.header['descrip'],img.header['aux_file'] = DESCRIP,AUX
    img.header.extensions.append(nib.nifti1.Nifti1Extension('comment', EXTENSION.encode()))
    (nifti/'T1wCE'/FOLDER).mkdir(parents=True)
    nib.save(img, nifti/'T1wCE'/f'{FILE}_t1ce.nii.gz')
    labels = pd.read_csv(root/'train_labels.csv', dtype=str)
    labels.assign(Surname=COLUMN, Note=COLUMN).to_csv(root/'train_labels.csv', index=False)
    return root


@pytest.fixture(scope='module')
def written(scans, tmp_path_factory):
    "Everything that the commands write and print"
    out = tmp_path_factory.mktemp('written')
    env = {**os.environ, 'MGMT_FAST_HOME':str(out/'home'), 'MGMT_FAST_LOG':str(out/'faults.log')}
    def run(command, *args):
        r = subprocess.run([BIN/command, *map(str, args)], capture_output=True, text=True, env=env, cwd=out)
        assert r.returncode in (0,1), r.stdout+r.stderr
        (out/f'{command}.out').write_text(r.stdout+r.stderr)
    recipe = out/'recipe.yaml'
    recipe.write_text('recipe: default\narch: timm/test_resnet\nanisotropic: 2\nepochs: 1\nbs: 8\nsize: [8, 16, 16]\n')
    run('mgmt_audit', scans, '--dest', 'audit', '--n_workers', 1)
    run('mgmt_prepare', scans, 'store', '--sequences', 'T1wCE', '--recipe', recipe, '--n_workers', 1, '--show-names')
    run('mgmt_train', 'store', 'run', '--recipe', recipe)
    run('mgmt_predict', 'run', scans, '--n_workers', 1)
    run('mgmt_sweep', 'store', 'sweep', '--recipe', recipe, '--archs', 'timm/test_resnet', '--folds', '0')
    run('mgmt_leakage', 'store', 'store', '--dest', 'leakage', '--planted', 2, '--n_workers', 0)
    return out


def found(raw):
    text = raw.decode('latin-1').lower()
    return [o for o in NEEDLES if o.lower() in text]


def test_the_needles_are_there(scans):
    raw = b''.join(p.read_bytes()+str(p).encode() for p in scans.rglob('*') if p.is_file() and '.gz' not in p.name)
    nifti, = scans.rglob('*.nii.gz')
    raw += nib.load(nifti).header.binaryblock+EXTENSION.encode()+b''.join(str(p).encode() for p in scans.rglob('*'))
    assert set(found(raw))==set(NEEDLES) and len(NEEDLES)>=20


def test_no_file_and_no_output_repeats_one(written):
    files = [p for p in written.rglob('*') if p.is_file()]
    assert {'.npy','.json','.csv','.html','.png','.safetensors','.out','.yaml'}<={p.suffix for p in files}
    leaks = {p.name: o for p in files if (o := found(p.read_bytes()+p.name.encode()))}
    assert not leaks, leaks


def test_a_damaged_slice_is_called_by_its_number(written):
    said = (written/'mgmt_prepare.out').read_text()
    assert 'slice 3 of 6' in said, said
    assert 'slice 3 of 6' in (written/'audit'/'audit.html').read_text()
