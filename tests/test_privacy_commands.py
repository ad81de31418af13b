"Twenty identifiers are planted wherever a scan or a table may hold one; nothing that a command writes repeats them."
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from commands import run_command
from identifiers import *
from mgmt_fast.engines import engine_table
from mgmt_fast.phantom import make_phantom
from mgmt_fast.trackers import to_tensorboard

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
import soak


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "Patients of whom one has a damaged slice, one two copies of a slice, and one NIfTI files full of text"
    root = tmp_path_factory.mktemp('scans')
    make_phantom(root, n=44, seed=1, test=0., slices=6, size=24, sequences='T1wCE', n_workers=0, progress=False)
    patients = sorted((root/'train').iterdir())
    for p in patients:
        for o in sorted((p/'T1wCE').iterdir()): plant_slice(o)
    cut,twice,nifti = patients[:3]
    bad = sorted((cut/'T1wCE').iterdir())[2]
    bad.write_bytes(bad.read_bytes()[:-300])
    shutil.copy(sorted((twice/'T1wCE').iterdir())[1], twice/'T1wCE'/f'{FILE}.copy.dcm')
    shutil.rmtree(nifti/'T1wCE')
    path = nifti/'T1wCE'/FOLDER/f'{FILE}_t1ce.nii.gz'
    path.parent.mkdir(parents=True)
    brain = np.random.default_rng(0).normal(size=(24,24,6)).astype(np.float32)
    nib.save(nib.Nifti1Image(brain, np.diag([9.,9,20,1])), path)
    plant_nifti(path)
    plant_table(root/'train_labels.csv')
    return root


@pytest.fixture(scope='module')
def held_out(tmp_path_factory):
    "Patients of another hospital, whose numbers no training patient has"
    root = tmp_path_factory.mktemp('held_out')
    make_phantom(root, n=12, seed=2, test=0., slices=6, size=24, sequences='T1wCE', n_workers=0, progress=False)
    for p in sorted((root/'train').iterdir()):
        for o in sorted((p/'T1wCE').iterdir()): plant_slice(o)
        p.rename(p.with_name(f'9{p.name[1:]}'))
    labels = pd.read_csv(root/'train_labels.csv', dtype=str)
    labels.assign(BraTS21ID='9'+labels.BraTS21ID.str[1:]).to_csv(root/'train_labels.csv', index=False)
    plant_table(root/'train_labels.csv')
    return root


@pytest.fixture(scope='module')
def heads(tmp_path_factory):
    "A brain in an atlas' space, one of noise, and a DSC series"
    root = tmp_path_factory.mktemp('heads')
    soak.heads(root)
    for o in (root/'heads').rglob('*.nii.gz'): plant_nifti(o)
    for o in sorted((root/'dsc').iterdir()): plant_slice(o, uids=False)
    return root


@pytest.fixture(scope='module')
def written(scans, held_out, heads, tmp_path_factory):
    "Everything that the commands write and print"
    out = tmp_path_factory.mktemp('written')
    env = {**os.environ, 'MGMT_FAST_HOME':str(out/'home'), 'MGMT_FAST_LOG':str(out/'faults.log')}
    def run(command, *args):
        r = run_command(command, *args, env=env, cwd=out)
        assert r.returncode in (0,1), r.stdout+r.stderr
        (out/f'{command}.out').write_text(r.stdout+r.stderr)
    recipe = out/'recipe.yaml'
    recipe.write_text('recipe: default\narch: timm/test_resnet\nanisotropic: 2\nepochs: 1\nbs: 8\nsize: [8, 16, 16]\n')
    run('mgmt_audit', scans, '--dest', 'audit', '--n_workers', 1)
    run('mgmt_prepare', scans, 'store', '--sequences', 'T1wCE', '--recipe', recipe, '--n_workers', 1, '--show-names')
    run('mgmt_train', 'store', 'run', '--recipe', recipe)
    run('mgmt_predict', 'run', scans, '--n_workers', 1)
    run('mgmt_sweep', 'store', 'sweep', '--recipe', recipe, '--archs', 'timm/test_resnet', '--folds', '0')
    few = tmp_path_factory.mktemp('few')
    for p in sorted((scans/'train').iterdir())[4:9]: shutil.copytree(p, few/p.name)
    run('mgmt_leakage', few, few, '--dest', 'leakage', '--planted', 2, '--n_workers', 0)
    run('mgmt_evaluate', 'store', 'evaluation', '--recipe', recipe, '--folds', 2, '--inner', 2, '--bundle', 'bundle')
    run('mgmt_preregister', 'plan.json', 'bundle', 'phantoms', 'AUC above .6')
    run('mgmt_external', 'bundle', held_out, '--plan', 'plan.json')
    run('mgmt_report', 'bundle', held_out, '--patient', min(p.name for p in (held_out/'train').iterdir()))
    run('mgmt_pack', 'bundle', 'bundle.zip')
    run('mgmt_unpack', 'bundle.zip', 'unpacked')
    if importlib.util.find_spec('onnxruntime'): run('mgmt_export', 'bundle.zip', 'onnx')
    run('mgmt_perfusion', heads/'dsc', 'perfusion')
    if engine_table().version.notna().all():
        run('mgmt_standardize', heads/'heads', 'standardized', '--atlas', heads/'atlas.nii.gz', '--dicom')
    if importlib.util.find_spec('tensorboard'): to_tensorboard(out/'evaluation')
    return out


def test_the_needles_are_there(scans):
    raw = b''.join(p.read_bytes()+str(p).encode() for p in scans.rglob('*') if p.is_file() and '.gz' not in p.name)
    nifti, = scans.rglob('*.nii.gz')
    raw += nib.load(nifti).header.binaryblock+EXTENSION.encode()+b''.join(str(p).encode() for p in scans.rglob('*'))
    assert set(found(raw))==set(NEEDLES) and len(NEEDLES)>=20


def test_no_file_and_no_output_repeats_one(written):
    kinds = {p.suffix for p in written.rglob('*')}
    assert {'.npy','.json','.csv','.html','.png','.safetensors','.out','.yaml','.jsonl'}<=kinds
    if importlib.util.find_spec('tensorboard'): assert [p for p in written.rglob('events.out.tfevents*')]
    page, = written.glob('bundle/external-*-1/report.html')
    assert '12 patients, 6 methylated' in page.read_text()
    leaks = found_in(written)
    assert not leaks, leaks


def test_a_damaged_slice_is_called_by_its_number(written):
    said = (written/'mgmt_prepare.out').read_text()
    assert 'slice 3 of 6' in said, said
    assert 'slice 3 of 6' in (written/'audit'/'audit.html').read_text()
