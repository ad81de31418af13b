"What Kaggle is given and what is found there: metadata, wheels, and every way in which an input can lack."
import inspect
import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from fastcore.test import test_fail as fails
from safetensors.torch import save_file

from commands import run_command
from mgmt_fast import kaggle, kaggle_build
from mgmt_fast.backbones import create_backbone, mgmt_weights
from mgmt_fast.cohort import kaggle_cohort, tcga_cohort
from mgmt_fast.core import MGMTError, SEQUENCES
from mgmt_fast.kaggle import *
from mgmt_fast.kaggle_build import build_kaggle, check_kernel, fill_kernel
from mgmt_fast.thesis import say_results, thesis_results

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT/'kaggle').glob('*/kernel-metadata.json'))


@pytest.fixture
def sim(tmp_path, monkeypatch):
    "An empty /kaggle"
    for o in ('input','working'): (tmp_path/o).mkdir()
    monkeypatch.setenv('MGMT_KAGGLE_ROOT', str(tmp_path))
    return tmp_path


def run(tmp, *args, code=0, cwd=None):
    "The command, as its installed script calls it"
    r = run_command('mgmt_kaggle', *args, cwd=cwd)
    assert r.returncode==code and 'Traceback' not in r.stderr, r.stdout+r.stderr
    return r.stdout+r.stderr


@pytest.fixture
def clone(tmp_path):
    "What a wheel is built from, and the kernels"
    src = tmp_path/'clone'
    src.mkdir()
    for o in ('settings.ini','setup.py','README.md','LICENSE'): shutil.copy(ROOT/o, src)
    for o in ('mgmt_fast','kaggle'): shutil.copytree(ROOT/o, src/o, ignore=shutil.ignore_patterns('__pycache__'))
    return src


def test_the_four_kernels_are_what_kaggle_accepts():
    assert {p.parent.name for p in KERNELS}=={'eda','train','tcga-eval','submit'}
    for p in KERNELS: assert check_kernel(p.parent).field.tolist()==['id'], 'only the user name is missing'


@pytest.mark.parametrize('change,field', [
    (dict(id='me/other-slug'), 'title'), (dict(id='noslash'), 'id'), (dict(title='abc', id='me/abc'), 'title'),
    (dict(title='x'*51, id='me/'+'x'*51), 'title'),
    (dict(kernel_type='script'), 'kernel_type'), (dict(language='r'), 'language'),
    (dict(code_file='absent.ipynb'), 'code_file'), (dict(enable_internet=True), 'enable_internet'),
    (dict(enable_internet='false'), 'enable_internet'), (dict(enable_gpu=False), 'enable_gpu'),
    (dict(is_private=False), 'is_private'), (dict(competition_sources=[]), 'competition_sources'),
    (dict(dataset_sources=['wheels']), 'dataset_sources'), (dict(kernel_sources=['me/a_b']), 'kernel_sources'),
    (dict(gpu=True), 'gpu'), (dict(machine_shape='NvidiaTeslaP100'), 'machine_shape'),
    (dict(machine_shape=None), 'machine_shape')], ids=str)
def test_metadata_that_kaggle_would_refuse(tmp_path, change, field):
    shutil.copytree(ROOT/'kaggle/train', tmp_path/'train')
    path = tmp_path/'train/kernel-metadata.json'
    good = json.loads(path.read_text().replace('INSERT_USERNAME','some-body'))
    path.write_text(json.dumps(good))
    assert check_kernel(tmp_path/'train').empty
    path.write_text(json.dumps({**good, **change}))
    found = check_kernel(tmp_path/'train')
    assert field in found.field.tolist() and found.what_to_do.str.len().min()>3


class Request:
    "Stands in for Kaggle: takes what its own tool would send"
    def __enter__(self): self.kernels = self.kernels_api_client = self; return self
    def __exit__(self, *_): pass
    def save_kernel(self, request): self.sent = request


@pytest.fixture
def kaggle_api(monkeypatch, tmp_path):
    "Kaggle's own command-line tool, without credentials"
    monkeypatch.setenv('KAGGLE_CONFIG_DIR', str(tmp_path))
    extended = pytest.importorskip('kaggle.api.kaggle_api_extended')
    return extended.KaggleApi()


@pytest.mark.parametrize('folder', [p.parent for p in KERNELS], ids=lambda p: p.name)
def test_kaggles_own_tool_takes_the_metadata(kaggle_api, folder, tmp_path, monkeypatch, capsys):
    filled,request = tmp_path/'kernel',Request()
    fill_kernel(folder, filled, 'some-body', list(DATASETS.values()))
    monkeypatch.setattr(kaggle_api, 'build_kaggle_client', lambda: request)
    kaggle_api.kernels_push(str(filled))
    sent,meta = request.sent,json.loads((filled/'kernel-metadata.json').read_text())
    assert capsys.readouterr().out=='', 'no warning of a title, or of an accelerator that is no more'
    assert (sent.slug, sent.machine_shape, sent.enable_gpu, sent.enable_internet, sent.is_private)==(
        meta['id'], 'NvidiaTeslaT4', True, False, True)
    assert sent.dataset_data_sources==meta['dataset_sources'] and sent.competition_data_sources==[COMPETITION]


def test_fields_are_those_that_kaggles_own_tool_reads(kaggle_api):
    source = inspect.getsource(type(kaggle_api).kernels_push)
    read = set(re.findall(r"""meta_data(?:\.get\(|,) *['"](\w+)""", source))
    assert len(read)>12 and read<=set(kaggle_build._fields), read-set(kaggle_build._fields)


def test_metadata_that_cannot_be_read(tmp_path):
    assert 'cannot be read' in check_kernel(tmp_path).problem[0]
    (tmp_path/'kernel-metadata.json').write_text('{"id": ')
    assert 'cannot be read' in check_kernel(tmp_path).problem[0]


def test_the_command_builds_checks_and_says_what_to_type(clone, tmp_path):
    (tmp_path/'w').mkdir(); (tmp_path/'w/resnet18.safetensors').write_bytes(b'x')
    out = run(tmp_path, 'some-body', '--dest', tmp_path/'up', '--weights', tmp_path/'w', '--lacking', 'none', cwd=clone)
    commands = [o.strip() for o in out.splitlines() if o.strip().startswith('kaggle ')]
    assert [o.split()[1:3] for o in commands]==[['datasets','create']]*2+[['kernels','push']]*4+[[
        'competitions','submit']]
    assert [o.rsplit('/',1)[1] for o in commands[2:6]]==['eda','train','tcga-eval','submit']
    assert len(list((tmp_path/'up/wheels').glob('mgmt_fast-*.whl')))==1
    for d,slug in ((tmp_path/'up/wheels','mgmt-fast-wheels'),(tmp_path/'w','mgmt-fast-weights')):
        meta = json.loads((d/'dataset-metadata.json').read_text())
        assert meta['id']==f'some-body/{slug}' and 6<=len(meta['title'])<=50 and len(meta['licenses'])==1
    for k in ('eda','train','tcga-eval','submit'):
        assert check_kernel(tmp_path/'up'/k).empty
        sources = json.loads((tmp_path/'up'/k/'kernel-metadata.json').read_text())['dataset_sources']
        assert set(sources)<={'some-body/mgmt-fast-wheels','some-body/mgmt-fast-weights'}, 'only what there is'


def test_the_command_refuses_in_one_line(clone, tmp_path):
    out = run(tmp_path, 'no body', '--dest', tmp_path/'up', '--lacking', 'none', code=2, cwd=clone)
    assert out.startswith('error: ') and "your profile's address" in out


@pytest.mark.parametrize('kw,say', [
    (dict(source='nowhere'), 'no clone of the library'), (dict(kernels='nowhere'), 'no kernels found'),
    (dict(source='absent.whl'), 'no wheel at'),
    (dict(tcga='nowhere'), 'holds nothing that could become'), (dict(wights='w'), "did you mean 'weights'")], ids=str)
def test_what_cannot_be_built(tmp_path, kw, say):
    (tmp_path/'mgmt_fast-0-py3-none-any.whl').touch()
    fails(lambda: build_kaggle(tmp_path/'up', 'some-body',
        **{**dict(kernels=ROOT/'kaggle', source=tmp_path/'mgmt_fast-0-py3-none-any.whl', lacking=()), **kw}),
        contains=say)


def test_sources_are_found_in_every_layout(sim):
    fails(lambda: kaggle.find_input('x') if os.environ.update(MGMT_KAGGLE_ROOT=str(sim/'nowhere')) is None else 0,
        contains='no Kaggle kernel')
    os.environ['MGMT_KAGGLE_ROOT'] = str(sim)
    assert find_input('slug') is None
    for i,at in enumerate(('a','datasets/b','datasets/owner/c')):
        (sim/'input'/at).mkdir(parents=True)
        assert find_input('abc'[i])==sim/'input'/at


def test_a_competition_without_patients_is_said(sim):
    root = sim/'input'/COMPETITION
    root.mkdir(); (root/'train_labels.csv').touch()
    fails(lambda: kaggle_data('train', phantom={}), contains='accept the competition')
    (root/'train').mkdir()
    fails(lambda: kaggle_data('train', phantom={}), contains='no patients in train/')
    assert not any((sim/'working').iterdir()), 'no phantom beside a damaged competition'


def test_without_the_competition_a_phantom_says_so(sim, capsys):
    d = kaggle_data('train', phantom=dict(n=2, test=0., slices=4, size=16, n_workers=0))
    assert not d.real and len(kaggle_cohort(d.root))==2
    assert 'PHANTOM' in (out := capsys.readouterr().out) and COMPETITION in out


def test_a_full_working_folder(sim, monkeypatch):
    (sim/'working/store').mkdir(); (sim/'working/store/big').write_bytes(b'0'*2_000_000)
    assert working_folder(1)==sim/'working'
    fails(lambda: working_folder(19.999), contains='store (0.002 GB)')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: namedtuple('usage','total used free')(1,1,int(1e6)))
    fails(lambda: working_folder(1), contains='attach the prepared store')


def test_weights_of_another_architecture(sim):
    d = sim/'input/mgmt-fast-weights'
    assert find_weights('resnet18') is False
    d.mkdir()
    fails(lambda: find_weights('resnet18'), contains='has weights of nothing')
    (d/'densenet121.safetensors').touch()
    fails(lambda: find_weights('resnet18'), contains="weights of densenet121, not of 'resnet18'")
    save_file({k:v.contiguous() for k,v in timm.create_model('resnet34').state_dict().items()},
        d/'resnet18.safetensors')
    assert find_weights('resnet18')==d
    fails(lambda: create_backbone('resnet18', pretrained=d), exc=MGMTError)


@pytest.mark.parametrize('name', ['resnet18.safetensors','resnet18-5c106cde.pth','resnet18.bin','timm_resnet18.pt'])
def test_weights_by_any_usual_file_name(tmp_path, name):
    save_as(tmp_path/name, timm.create_model('resnet18').state_dict())
    m = create_backbone('timm/resnet18' if 'timm' in name else 'resnet18', pretrained=tmp_path)
    assert set(m.report.action)<={'copied','inflated','adapted','set','left out'}


def test_a_download_from_the_hub_is_what_its_config_says(tmp_path):
    save_as(tmp_path/'model.safetensors', timm.create_model('resnet18').state_dict())
    (tmp_path/'config.json').write_text('{"architecture": "resnet18"}')
    assert create_backbone('resnet18', pretrained=tmp_path).report is not None
    fails(lambda: create_backbone('resnet34', pretrained=tmp_path), contains="no weights of 'resnet34'")
    (tmp_path/'config.json').unlink()
    fails(lambda: create_backbone('resnet18', pretrained=tmp_path), contains='give the path of the file itself')


def save_as(path, state):
    state = {k:v.contiguous() for k,v in state.items()}
    if path.suffix=='.safetensors': save_file(state, path)
    else: torch.save(state, path)


def grey(state):
    "A stem of one channel"
    return {k: v.sum(1, keepdim=True) if k=='conv1.weight' else v for k,v in state.items()}


CHANGES = dict(
    module=lambda s: {'module.'+k:v for k,v in s.items()},
    compiled=lambda s: {'_orig_mod.module.'+k:v for k,v in s.items()},
    half=lambda s: {k: v.half() if v.is_floating_point() else v for k,v in s.items()},
    averaged=lambda s: dict(state_dict={k:v*0 for k,v in s.items()}, state_dict_ema=s, epoch=3),
    wrapped=lambda s: dict(state_dict=s, epoch=3),
    classes=lambda s: {**s, 'fc.weight':torch.zeros(7,512), 'fc.bias':torch.zeros(7)},
    uncounted=lambda s: {k:v for k,v in s.items() if 'num_batches' not in k},
    grey=grey)


@pytest.mark.parametrize('change', CHANGES)
def test_weights_in_any_usual_wrapping(tmp_path, change):
    "Every key is accounted for, and the network answers as from the plain file"
    torch.manual_seed(0)
    state = timm.create_model('resnet18').state_dict()
    torch.save(state, tmp_path/'plain.pth')
    torch.save(CHANGES[change](state), tmp_path/'changed.pth')
    x = torch.rand(1, 1, 32, 32, 32)
    torch.manual_seed(1)
    a = create_backbone('resnet18', pretrained=tmp_path/'plain.pth').eval()
    torch.manual_seed(1)
    b = create_backbone('resnet18', pretrained=tmp_path/'changed.pth').eval()
    assert set(b.report.action)<={'copied','inflated','adapted','set','left out'}
    assert (b.report[b.report.action=='left out'].reason=='classifier of the 2D network').all()
    assert torch.allclose(a(x), b(x), atol=2e-2 if change=='half' else 1e-5)


def test_torchvisions_older_densenet(tmp_path):
    state = timm.create_model('densenet121').state_dict()
    old = {re.sub(r'(denselayer\d+\.(?:norm|conv))(\d)', r'\1.\2', k):v for k,v in state.items()}
    assert old.keys()!=state.keys()
    torch.save(old, tmp_path/'densenet121-a639ec97.pth')
    report = create_backbone('densenet121', pretrained=tmp_path).report
    assert set(report.action)<={'copied','inflated','adapted','left out'}


def test_names_of_another_library_are_refused(tmp_path):
    state = {f'encoder.{i}.w':torch.zeros(3) for i in range(5)}
    torch.save(state, tmp_path/'resnet18.pth')
    fails(lambda: create_backbone('resnet18', pretrained=tmp_path), contains='Weights of another architecture?')


def test_a_stopped_session_goes_on(sim):
    old = sim/'input/notebooks/me/mgmt-fast-train/train/cv'
    old.mkdir(parents=True); (old/'a').write_text('1')
    os.chmod(old/'a', 0o444); os.chmod(old, 0o555)
    (sim/'working/.train.part').mkdir(); (sim/'working/.train.part/half').touch()
    assert carry_on('mgmt-fast-train', 'train', 'absent')==['train']
    assert sorted(p.name for p in (sim/'working/train').rglob('*'))==['a','cv']
    assert os.stat(sim/'working/train/cv/a').st_mode & 0o200
    (sim/'working/train/cv/a').write_text('2')
    assert carry_on('mgmt-fast-train', 'train')==[] and (
        sim/'working/train/cv/a').read_text()=='2', 'what is newer stays'
    os.chmod(old, 0o755)


def test_models_that_are_needed(sim):
    fails(lambda: find_bundles(sim/'working/b', needed=True), contains='attach its output')


def test_tcga_input_is_the_thesis_layout_or_refused(tmp_path, sim):
    d = make_tcga_phantom(tmp_path/'tcga', n=6, slices=10, size=40, skulls=1)
    def move(p, s, f):
        path = d/p/s/'scan.nii'
        img = nib.load(path)
        data,affine = f(np.array(img.dataobj), img.affine.copy())
        nib.save(nib.Nifti1Image(data, affine), path)
    move('TCGA-00-0000', 'T2w', lambda x,a: (x[:-2], a))
    for s in SEQUENCES: move('TCGA-00-0001', s, lambda x,a: (x[:,:-4], a))
    shutil.rmtree(d/'TCGA-00-0002/FLAIR')
    (d/'TCGA-00-0003/T1w/scan.nii').write_bytes(b'no image')
    fit,refused = refuse_unprepared(tcga_cohort(d, d/'labels.csv'), progress=False)
    assert fit.patient.tolist()==['TCGA-00-0004']
    why = refused.groupby('patient').why.agg(' '.join)
    for p,say in (('0000','different grids'),('0001','another space'),('0002','missing'),('0003','T1w'),
        ('0005','has its skull')):
        assert say in f"{why['TCGA-00-'+p]} {' '.join(refused.sequence[refused.patient=='TCGA-00-'+p])}"
    assert not refused.why.str.contains(str(tmp_path)).any()


def test_the_volume_that_a_cohort_means_is_looked_at(tmp_path):
    d = make_tcga_phantom(tmp_path/'tcga', n=1, slices=10, size=40, skulls=0)
    cohort = tcga_cohort(d, d/'labels.csv')
    path = next((d/cohort.patient[0]/'T2w').iterdir())
    img = nib.load(path)
    x = np.array(img.dataobj)
    nib.save(nib.Nifti1Image(np.stack([x,x], -1), img.affine), path)
    assert len(refuse_unprepared(cohort.assign(T2w_index=1), progress=False)[0])==1
    refused = refuse_unprepared(cohort, progress=False)[1]
    assert refused.sequence.tolist()==['T2w'] and 'choose one with index=' in refused.why[0]


def test_tcga_without_labels(sim):
    (sim/'input/mgmt-fast-tcga/TCGA-00-0000').mkdir(parents=True)
    (sim/'input/mgmt-fast-tcga/notes.csv').write_text('a,b\n1,2\n')
    fails(lambda: find_tcga({}), contains='no table of labels')


def test_the_thesis_figures_are_those_it_printed():
    v,t = thesis_results('validation').set_index(['arch','sequences']),thesis_results('test').set_index('arch')
    assert v.auc['EfficientNet-B1','T2w']==.6104 and v.accuracy['DenseNet121','T1wCE']==.405684 and len(v)==16
    assert t.loc['Xception'].tolist()[1:]==[.5797,.9991,.6757]
    fails(lambda: thesis_results('train'), contains='validation')


def test_the_paragraph_follows_the_figures():
    def table(*rows):
        return pd.DataFrame(rows, columns=['sequences','auc','auc_lo','auc_hi']).assign(arch='x', n=262, minority=.45)
    chance,good,odd = ('FLAIR',.52,.45,.59),('T1wCE',.66,.59,.73),('T2w',.35,.28,.42)
    said = say_results(table(chance, good, odd), [.6,.0001,.0001], [], aside=['p1'], overridden=['space'])
    assert '1 of them can be told from chance' in said and 'T1wCE' in said
    assert '1 ranked patients worse than chance' in said
    assert '1 patients were suspected' in said and '(space)' in said and 'is the best of 3 and flatters' in said
    said = say_results(table(chance), [.6], [1,2])
    assert 'None of them' in said and 'No leakage audit' in said and 'flatters' not in said and '2 figures' in said
    assert 'nothing about patients' in say_results(table(chance), [.6], [], real=False)


def test_predictions_from_fewer_models_are_in_the_log(tmp_path):
    (tmp_path/'s.csv').write_text('BraTS21ID,MGMT_value\n00001,.5\n00002,.5\n00003,.5\n')
    preds = pd.DataFrame(dict(patient=['1','2','3'], prob=[.9,.8,np.nan],
        note=['','3 of 5 models could predict; T2w: missing','T1w: cut off']))
    sub,log = make_submission(preds, tmp_path/'s.csv', .5)
    assert sub.MGMT_value.tolist()==[.9,.8,.5]
    assert log.values.tolist()==[['00002','prediction','3 of 5 models could predict; T2w: missing'],
        ['00003','prevalence','T1w: cut off']]


@pytest.mark.real
def test_a_submission_has_the_real_ids(data, tmp_path):
    "87 patients, of whom one has no folder, and none can be read but for two"
    sample = data/'labels/rsna_miccai/gonzo3832/sample_submission.csv'
    ids = pd.read_csv(sample, dtype=str).BraTS21ID.tolist()
    preds = pd.DataFrame(dict(patient=ids[:0:-1], prob=[.9]+[np.nan]*84+[.1], note=['']+['FLAIR: cut off']*84+['']))
    sub,log = make_submission(preds, sample, 307/585)
    sub.to_csv(tmp_path/'submission.csv', index=False)
    got = pd.read_csv(tmp_path/'submission.csv', dtype={'BraTS21ID':str})
    assert len(got)==87 and got.BraTS21ID.tolist()==ids and list(got)==['BraTS21ID','MGMT_value']
    assert got.MGMT_value.iloc[-1]==.9 and got.MGMT_value.iloc[1]==.1 and np.isclose(got.MGMT_value, 307/585).sum()==85
    assert len(log)==85 and log.why[0]=='no scans in the test folder'


def test_a_sample_of_another_shape(tmp_path):
    (tmp_path/'s.csv').write_text('id\n1\n')
    preds = pd.DataFrame(dict(patient=['1'], prob=[.5], note=['']))
    fails(lambda: make_submission(preds, tmp_path/'s.csv', .5), contains='two columns')
    (tmp_path/'s.csv').write_text('id,p\n1,.5\n')
    fails(lambda: make_submission(preds, tmp_path/'s.csv', np.nan), contains='share between 0 and 1')
