"""The four kernels run to their end in a simulated /kaggle: sources that nobody may change, an empty working folder,
no internet."""
import json
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbclient import NotebookClient

from identifiers import *
from mgmt_fast.bundle import cv_models, freeze_bundle
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import SEQUENCES, Volume, get_recipe
from mgmt_fast.engines import engine_table
from mgmt_fast.evaluate import cross_validate
from mgmt_fast.learner import load_model
from mgmt_fast.external import read_result
from mgmt_fast.kaggle import COMPETITION, make_tcga_phantom
from mgmt_fast.phantom import draw_patients, make_phantom, render_patient, write_series
from mgmt_fast.prepare import prepare
from mgmt_fast.series import read_volume

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = """import socket
_connect = socket.socket.connect
def connect(self, address):
    here = self.family==socket.AF_UNIX or address[0] in ('127.0.0.1','::1','localhost')
    if not here: raise OSError(101, 'Network is unreachable')
    return _connect(self, address)
socket.socket.connect = connect
"""
COUNTING = """class Counting:
    "There is time until it has been asked for n times"
    def __init__(self, n): self.n = n
    @property
    def left(self): self.n -= 1; return float(self.n>0)
"""
SMALL = """import os, shutil
from collections import namedtuple
def disk_usage(path):
    used = sum(os.path.getsize(os.path.join(d, f)) for d,_,files in os.walk(path) for f in files)
    return namedtuple('usage', 'total used free')({size}, used, {size}-used)
shutil.disk_usage = disk_usage
"""
# getrusage would count the memory of the process that started this one too
PEAK = """from pathlib import Path
print(next(o.split()[1] for o in Path('/proc/self/status').read_text().splitlines() if o.startswith('VmHWM')))
"""


def execute(kernel, cwd, kaggle, monkeypatch, clock=None, size=None):
    "What a kernel printed; its process may take 4 GB, and its working folder `size` bytes"
    (cwd/'offline').mkdir(parents=True, exist_ok=True)
    (cwd/'offline/sitecustomize.py').write_text(OFFLINE+(SMALL.format(size=size) if size else ''))
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join(map(str, (cwd/'offline', ROOT))))
    monkeypatch.setenv('MGMT_KAGGLE_ROOT', str(kaggle))
    nb = nbformat.read(ROOT/'kaggle'/kernel/f'{kernel}.ipynb', as_version=4)
    if clock: nb.cells[3].source = COUNTING+nb.cells[3].source.replace('Clock(hours=11)', clock)
    nb.cells.append(nbformat.v4.new_code_cell(PEAK))
    NotebookClient(nb, timeout=900, kernel_name='python3', resources={'metadata': {'path': str(cwd)}}).execute()
    said = [''.join(o.get('text','') for o in c.get('outputs', [])) for c in nb.cells]
    assert int(said[-1])<4*2**20, 'kilobytes'
    return ''.join(said)


def state(root):
    return {str(p.relative_to(root)): (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob('*') if p.is_file()
        and 'fingerprints' not in p.parts}


@pytest.fixture(scope='module')
def kaggle(tmp_path_factory):
    "A phantom as the competition and another as TCGA, attached"
    root = tmp_path_factory.mktemp('kaggle')
    make_phantom(root/'input/competitions'/COMPETITION, n=44, auc=.95, test=1/11, slices=16, size=48,
        missing={'00003':'FLAIR'}, progress=False)
    for series in sorted((root/'input').rglob('T1wCE')):
        for o in sorted(series.glob('*.dcm')): plant_slice(o)
    bad = root/'input/competitions'/COMPETITION/'test/00041'
    for f in bad.glob('*/*.dcm'): f.write_bytes(b'\0'*100)
    tcga = root/'input/datasets/somebody/mgmt-fast-tcga'
    make_tcga_phantom(tcga, n=17, seed=2, slices=16, size=48, skulls=1)
    for o in tcga.rglob('*.nii'): plant_nifti(o)
    return root


def session(kernel, kaggle, tmp, monkeypatch, **limits):
    "Run a kernel in a new session: an empty working folder, and sources that stay as they are"
    shutil.rmtree(kaggle/'working', ignore_errors=True)
    (kaggle/'working').mkdir()
    before = state(kaggle/'input')
    said = execute(kernel, tmp, kaggle, monkeypatch, **limits)
    assert state(kaggle/'input')==before
    assert not found(said.encode()) and not found_in(kaggle/'working'), 'identifiers that were planted'
    return said


def test_eda(kaggle, tmp_path, monkeypatch):
    said = session('eda', kaggle, tmp_path, monkeypatch)
    assert 'PHANTOM, attached in its place' in said


@pytest.fixture(scope='module')
def trained(kaggle, tmp_path_factory):
    "The train kernel's output, attached for the next ones"
    with pytest.MonkeyPatch.context() as m: said = session('train', kaggle, tmp_path_factory.mktemp('train'), m)
    shutil.move(kaggle/'working', kaggle/'input/mgmt-fast-train')
    return said


def test_train(trained, kaggle):
    out = kaggle/'input/mgmt-fast-train'
    assert {p.name for p in (out/'train/bundles').iterdir()}=={'FLAIR','T1w','T1wCE','T2w','FLAIR+T1w+T1wCE+T2w'}
    t = pd.read_csv(out/'results.csv')
    assert t.auc.between(t.auc_lo, t.auc_hi).all() and len(t)==5
    assert t.set_index('sequences').n.to_dict()=={'FLAIR':39,'T1w':40,'T1wCE':40,'T2w':40,'FLAIR+T1w+T1wCE+T2w':39}
    for p in (out/'train/cv/runs').iterdir(): # what the kernel asked for is what its models say
        r = load_model(p).recipe
        assert (r.size, r.arch, r.bs, r.epochs, r.lr, r.rotation, r.shuffle)==((16,32,32), 'efficientnet_b0', 5, 3,
            1e-3, 10., True)


@pytest.mark.slow
def test_a_train_kernel_that_is_stopped_twice_goes_on(trained, kaggle, tmp_path, monkeypatch):
    "Before its first training, then within one; each time its output is attached to the next session"
    root = tmp_path/'kaggle'
    shutil.copytree(kaggle/'input/competitions', root/'input/competitions')
    def run(clock=None):
        said = session('train', root, tmp_path, monkeypatch, clock=clock, size=200_000_000)
        shutil.rmtree(root/'input/mgmt-fast-train', ignore_errors=True)
        shutil.move(root/'working', root/'input/mgmt-fast-train')
        return said
    said = run('Clock(hours=0)')
    assert 'stopped before the training' in said and 'no model is done yet' in said
    said = run('Counting(7)')
    assert 'goes on from what' in said and 'stopped after 2 of 3 epochs' in said
    said = run()
    assert 'goes on from what' in said and 'stopped' not in said
    a,b = (pd.read_csv(o/'input/mgmt-fast-train/results.csv') for o in (kaggle,root))
    pd.testing.assert_frame_equal(a, b)


def test_tcga_eval(trained, kaggle, tmp_path, monkeypatch):
    said = session('tcga-eval', kaggle, tmp_path, monkeypatch)
    assert '16 patients are tested, 1 are refused' in said and 'These are phantoms' in said
    assert '4 of 4 planted copies were found' in said
    results = [read_result(p) for p in (kaggle/'working/external').glob('*/external-*.json')]
    assert len(results)==5 and {r['pass'] for r in results}=={1} and {r['all']['n'] for r in results}=={16}
    assert '5 bundles have met this cohort' in said
    t = pd.read_csv(kaggle/'working/external.csv').set_index('sequences')
    single = t.loc[['FLAIR','T1w','T1wCE','T2w']]
    assert t.auc['mean of single sequences']==pytest.approx(single.auc.mean())
    assert t.loss['mean of single sequences']==pytest.approx(single.loss.mean())
    for r in results: assert r['all']['auc'][0]==pytest.approx(t.auc[r['model']['sequences']], abs=1e-5)


def test_submit(trained, kaggle, tmp_path, monkeypatch):
    said = session('submit', kaggle, tmp_path, monkeypatch)
    sub,want = (pd.read_csv(p, dtype={'BraTS21ID':str})
        for p in (kaggle/'working/submission.csv', kaggle/'input/competitions'/COMPETITION/'sample_submission.csv'))
    assert list(sub)==list(want) and sub.BraTS21ID.tolist()==want.BraTS21ID.tolist()
    assert sub.MGMT_value.between(0,1).all()
    log = pd.read_csv(kaggle/'working/submission_log.csv', dtype=str)
    assert log.patient.tolist()==['00041'] and sub.MGMT_value[sub.BraTS21ID=='00041'].item()==.5
    assert '1 with the prevalence' in said


@pytest.mark.real
def test_submit_for_the_competitions_own_list(trained, kaggle, data, tmp_path, monkeypatch):
    "87 phantoms under the real patients' names, in the order of the real sample"
    root,sample = tmp_path/'kaggle',data/'labels/rsna_miccai/gonzo3832/sample_submission.csv'
    comp,ids = root/'input/competitions'/COMPETITION,pd.read_csv(sample, dtype=str).BraTS21ID
    make_phantom(comp, n=97, auc=.95, test=87/97, slices=16, size=48, progress=False)
    scans = sorted((comp/'test').rename(comp/'scans').iterdir())
    (comp/'test').mkdir()
    for i,p in zip(ids, scans, strict=True): p.rename(comp/'test'/i)
    shutil.copy(sample, comp)
    shutil.copytree(kaggle/'input/mgmt-fast-train', root/'input/mgmt-fast-train')
    session('submit', root, tmp_path, monkeypatch)
    sub = pd.read_csv(root/'working/submission.csv', dtype={'BraTS21ID':str})
    assert list(sub)==['BraTS21ID','MGMT_value'] and sub.BraTS21ID.tolist()==ids.tolist()
    assert len(sub)==87 and sub.MGMT_value.nunique()>80


@pytest.mark.slow
def test_submit_elsewhere(tmp_path, monkeypatch):
    "No Kaggle at all: the same cells, on a phantom of their own"
    said = execute('submit', tmp_path, tmp_path/'nowhere', monkeypatch)
    assert 'PHANTOM: no Kaggle kernel' in said and len(pd.read_csv(tmp_path/'working/submission.csv'))==4


@pytest.mark.parametrize('meta', sorted((ROOT/'kaggle').glob('*/kernel-metadata.json')), ids=lambda p: p.parent.name)
def test_sources_are_those_that_the_notebook_looks_for(meta):
    d,text = json.loads(meta.read_text()),(meta.parent/json.loads(meta.read_text())['code_file']).read_text()
    assert any('mgmt-fast-wheels' in o for o in d['dataset_sources'])
    assert ('find_tcga' in text)==any('tcga' in o for o in d['dataset_sources'])
    assert ('find_bundles(work/\'bundles\'' in text)==bool(d['kernel_sources'])


@pytest.mark.parametrize('name', ['winner', pytest.param('published', marks=pytest.mark.slow)])
def test_kernels_take_models_of_stores_of_slices(kaggle, tmp_path, monkeypatch, name):
    "The external test with its audit, and a submission, by bundles whose store has no millimetres"
    root = tmp_path/'kaggle'
    for o in ('competitions','datasets'): shutil.copytree(kaggle/'input'/o, root/'input'/o)
    tiny_bundle(root, tmp_path, name, size=(8,16,16), anisotropic=2)
    said = session('tcga-eval', root, tmp_path, monkeypatch)
    result, = [read_result(p) for p in (root/'working/external').glob('*/external-*.json')]
    assert result['all']['n']==16 and not result['overridden'] and 'planted copies' in said
    said = session('submit', root, tmp_path, monkeypatch)
    assert 'submission.csv: 4 patients' in said


def tiny_bundle(root, tmp, recipe, **choices):
    "A bundle of tiny models of the attached competition, as the train kernel's output"
    cohort,out = kaggle_cohort(root/'input/competitions'/COMPETITION),root/'input/mgmt-fast-train'
    tiny = dict(arch='timm/test_resnet', pretrained=False, epochs=1, bs=4, **choices)
    r = get_recipe(recipe, **tiny, sequences=('T1wCE',))
    store = prepare(cohort, out/'store', recipe=r, n_workers=1, progress=False)
    cross_validate(store, tmp/'cv', recipe=r, n_folds=2, inner=2, progress=False)
    freeze_bundle(**cv_models(tmp/'cv'), store=store, dest=out/'train/bundles/T1wCE')


ON_ATLAS = dict(slices=65, size=94, fov=94*142/65) # voxels of 2.2 mm each way
SCANNED = dict(skull=True, slices=40, size=120, fov=230, tilt=10, shift=5)
AS_TCIA = dict(FLAIR='7.000000-AX FLAIR-10001', T1w='3.000000-AX T1-10002', T1wCE='9.000000-AX T1 POST-10003',
    T2w='4.000000-AX T2 FSE-10004')


def write_as_tcia(root, patient, volumes):
    "COLLECTION/PATIENT/STUDY/SERIES/*.dcm"
    for s,v in volumes.items():
        write_series(v, root/'TCGA-GBM'/patient/'06-08-1997-NA-MRI BRAIN-12345'/AS_TCIA[s], s, patient)


def noise_of(v): return Volume(torch.from_numpy(np.random.default_rng(0).integers(0, 900, v.shape)), affine=v.affine)


def mean_brain(table):
    "An atlas of some phantoms"
    brains = [render_patient(p, 5, 'T1w', **ON_ATLAS)['T1w'][0].float() for _,p in table.iterrows()]
    mean = sum(v/v[v>0].median() for v in brains)/len(brains)
    return Volume(1000*mean, affine=brains[0].affine)


def raw_tcga(root, n=11, raw=1, noise=1):
    "DICOM as TCIA ships it: `raw` patients as scanned, then others on the attached atlas, last `noise` of noise"
    table,tcga = draw_patients(n, .95, 5, 0.),root/'input/datasets/somebody/mgmt-fast-tcga'
    names = [f'TCGA-00-{i:04d}' for i in range(n)]
    for i,(_,p) in enumerate(table.iterrows()):
        kind = SCANNED if i<raw else ON_ATLAS
        volumes = {s: v for s,(v,_) in render_patient(p, 5, **kind).items()}
        if i>=n-noise: volumes = {s: noise_of(v) for s,v in volumes.items()}
        write_as_tcia(tcga, names[i], volumes)
    mean_brain(table).save(root/'input/mgmt-fast-atlas/T1.nii.gz')
    pd.DataFrame(dict(TCGAID=names, MGMT_value=table.label)).to_csv(tcga/'labels.csv', index=False)
    (tcga/'phantom.json').write_text('{}')
    for name in names[:raw]:
        for o in sorted((tcga/'TCGA-GBM'/name).rglob('*.dcm')): plant_slice(o, uids=False)
    return names


@pytest.mark.slow
@pytest.mark.skipif(engine_table().version.isna().any(), reason='needs the extra `tcga`')
def test_tcga_eval_brings_raw_dicom_into_the_atlas_space_first(kaggle, tmp_path, monkeypatch):
    root = tmp_path/'kaggle'
    shutil.copytree(kaggle/'input/competitions', root/'input/competitions')
    tiny_bundle(root, tmp_path, 'default', size=(16,32,32))
    names = raw_tcga(root)
    said = session('tcga-eval', root, tmp_path, monkeypatch)
    assert '10 of 11 patients are in the space of the atlas without a problem' in said
    assert '10 patients are tested, 1 are refused' in said and 'planted copies were found' in said
    result, = [read_result(p) for p in (root/'working/external').glob('*/external-*.json')]
    assert result['all']['n']==10
    atlas = read_volume(root/'input/mgmt-fast-atlas/T1.nii.gz')
    for name,state in zip(names, ['raw',*['prepared']*9]):
        folder = root/'working/atlas-space'/name
        assert json.loads((folder/'standardized.json').read_text())['state']==state
        written = [read_volume(folder/s/f'{s}.nii.gz') for s in SEQUENCES]
        assert all(v.shape==atlas.shape and np.allclose(v.affine, atlas.affine) for v in written)
