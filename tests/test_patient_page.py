"The page of one patient: what it says, what it keeps to itself, and what it answers to bad input."
import importlib.util
import json
import os
import re
import shutil
import sys
import warnings

import pytest

from bundles import pair_bundle
from identifiers import found_in, plant_slice
from mgmt_fast import cli
from mgmt_fast.app_work import PatientPages
from mgmt_fast.audit import audit_cohort
from mgmt_fast.cohort import find_cohort
from mgmt_fast.core import SEQUENCES, MGMTError
from mgmt_fast.learner import predict
from mgmt_fast.patient_page import Paper, _families, patient_report, patient_result, patient_row, write_captures
from mgmt_fast.phantom import make_phantom


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A phantom, a model of two of its sequences, and a bundle of it"
    return pair_bundle(tmp_path_factory.mktemp('work'), dict(n=36, slices=16, size=48), dict(epochs=1), temperatures=2.)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    "Run `mgmt_report` as it is typed: exit code, and what was printed"
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['mgmt_report', *map(str, args)])
        code = cli.mgmt_report()
        said = capsys.readouterr()
        return code,said.out+said.err
    monkeypatch.chdir(tmp_path)
    return run


def one(work, tmp_path, name='00003'):
    "A folder with one patient's series, and nobody else's"
    return shutil.copytree(work/'scans/train'/name, tmp_path/name)


def test_the_command_writes_page_and_pdf(work, tmp_path, command):
    code,said = command(work/'bundle', one(work, tmp_path), '--dest', 'out')
    prob = predict(work/'bundle', find_cohort(tmp_path/'00003'), progress=False).prob.item()
    assert code==0 and f'patient 00003, probability of methylation {prob:.2f}; research use only' in said
    html = (tmp_path/'out/report.html').read_text()
    assert f'Probability of a methylated MGMT promoter: {prob:.2f}.' in html
    assert (tmp_path/'out/report.pdf').read_bytes().startswith(b'%PDF')
    assert all(o.stat().st_size<10e6 for o in (tmp_path/'out').iterdir())
    heads = re.findall(r'<h2>(.*?)</h2>', html)
    assert heads==['What was found','What was read','The scans','The probability','Where the answer comes from',
        'What the number cannot say','The model']


def test_one_of_several_is_named(work, command):
    code,said = command(work/'bundle', work/'scans')
    assert code==2 and 'there are 36 patients here: name one' in said and '--patient' in said
    code,said = command(work/'bundle', work/'scans', '--patient', '00099')
    assert code==2 and "no patient is called '00099'" in said
    code,said = command(work/'model', work/'scans', '--patient', '4')
    assert code==0 and 'patient 00004' in said


def test_a_model_alone_says_that_its_auc_is_not_known(work, tmp_path):
    res = patient_report(work/'model', one(work, tmp_path), tmp_path/'out')
    html = (tmp_path/'out/report.html').read_text()
    assert res.map is None and 'AUC is not known' in html and 'There is no map' in html and '95 %' not in html


def test_a_bundle_says_its_auc_and_calibration(work, tmp_path):
    res = patient_report(work/'bundle', one(work, tmp_path), tmp_path/'out')
    html,v = (tmp_path/'out/report.html').read_text(),res.model.validation
    assert f"AUC: {v['auc']:.2f}, 95 % interval {v['lo']:.2f} to {v['hi']:.2f}" in html
    assert sum(o[4] for o in v['groups'])==v['n'] and 'Calibration on the validation patients' in html
    assert (res.map is None)==('There is no map' in html)==(v['lo']<=.5)


def test_a_bundle_of_an_earlier_version_has_no_calibration(work, tmp_path):
    res = patient_result(work/'bundle', one(work, tmp_path))
    for k in ('calibration','groups'): res.model.validation.pop(k)
    patient_report(None, res, tmp_path/'out')
    assert 'Calibration was not written down' in (tmp_path/'out/report.html').read_text()


def test_findings_come_first(work, tmp_path, command):
    root = one(work, tmp_path)
    slices = sorted((root/'T2w').iterdir())
    slices[5].write_bytes(slices[5].read_bytes()[:-100])
    code,said = command(work/'bundle', root, '--dest', 'out')
    html = (tmp_path/'out/report.html').read_text()
    found = audit_cohort(find_cohort(root), 0, progress=False).set_index('sequence').findings['T2w']
    assert code==0 and 'error T2w' in said and 'looked at before the number: 1.' in html
    assert html.index('error: T2w')<html.index('<h2>The probability') and 'T2w, through' not in html
    assert found.split(' | ')[0][:30] in html


def test_without_a_sequence_there_is_a_page_and_no_number(work, tmp_path, command):
    root = one(work, tmp_path)
    shutil.rmtree(root/'T1wCE')
    code,said = command(work/'bundle', root, '--dest', 'out', '--strict')
    html = (tmp_path/'out/report.html').read_text()
    assert code==3 and 'no probability' in said and 'lacks T1wCE' in said
    assert 'No probability' in html and 'There is no map' in html and 'FLAIR, through' in html


def test_a_head_is_shown_from_inside(work, tmp_path):
    make_phantom(tmp_path/'heads', n=2, test=0., seed=3, slices=24, size=64, skull=True, progress=False, n_workers=0)
    patient_report(work/'bundle', tmp_path/'heads', tmp_path/'out', '00000')
    html = (tmp_path/'out/report.html').read_text()
    assert 'only 25 to 75 mm below the top of the head is shown' in html and 'with skull' in html


def test_no_number_stands_beside_a_head_whoever_is_asked(work, tmp_path, command):
    "`predict`, the page of a bundle and of a model alone, and the app's rows say the same"
    make_phantom(tmp_path/'heads', n=2, test=0., seed=3, slices=24, size=64, skull=True, progress=False, n_workers=0)
    heads = find_cohort(tmp_path/'heads', labels=False)
    for m in (work/'bundle', work/'model'):
        said = predict(m, heads, progress=False)
        assert said.prob.isna().all() and said.note.str.contains('FLAIR, T1wCE with skull').all()
        code,text = command(m, tmp_path/'heads', '--patient', '00000', '--dest', 'out', '--strict')
        html = (tmp_path/'out/report.html').read_text()
        assert code==3 and said.note[0] in text and 'number is given' in html and 'There is no map' in html
        rows = dict(PatientPages(m, tmp_path/'pages', n_workers=0).run(heads))
        assert [(o.prob,o.note) for o in rows.values()]==[(None,o) for o in said.note]


def changed(work, tmp_path, **changes):
    "A model whose JSON was changed"
    shutil.copytree(work, tmp_path/'w', ignore=shutil.ignore_patterns('scans','store','log','bundle'))
    path = tmp_path/'w/model.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return tmp_path/'w/model'


@pytest.mark.parametrize('make,say', [
    (lambda w, d: (d/'nothing', w/'scans'), 'no model at'),
    (lambda w, d: (changed(w, d, kind='oracle'), w/'scans'), "no kind of model is called 'oracle'"),
    (lambda w, d: (changed(w, d, later=1), w/'scans'), 'later'),
    (lambda w, d: (w/'model', w/'scans/train_labels.csv'), 'patients'),
    (lambda w, d: (w/'model', next((w/'scans/train/00003/FLAIR').iterdir())), 'is a file: give the folder'),
    (lambda w, d: (w/'model', w/'log'), 'no scans'),
    (lambda w, d: (w/'model', d/'absent'), 'absent'),
], ids=['no model','another kind','later version','table','file','no sequences','no folder'])
def test_bad_input_is_one_sentence(work, tmp_path, command, make, say):
    code,said = command(*make(work, tmp_path), '--dest', 'out')
    assert code==2 and 'error:' in said and say in said and 'Traceback' not in said and len(said.splitlines())<=2
    assert not (tmp_path/'out').exists()


def test_a_model_of_another_version_says_so(work, tmp_path):
    res = patient_report(changed(work, tmp_path, version='0.1.0', preparation=7), one(work, tmp_path), tmp_path/'out')
    html = (tmp_path/'out/report.html').read_text()
    assert res.prob==res.prob and 'mgmt_fast 0.1.0, which prepared scans otherwise' in html


def test_nothing_of_a_header_is_repeated(work, tmp_path):
    root = one(work, tmp_path)
    for o in root.rglob('*.dcm'): plant_slice(o)
    patient_report(work/'bundle', root, tmp_path/'out')
    html = (tmp_path/'out/report.html').read_text()
    assert not found_in(tmp_path/'out') and 'identifiers in the header' in html and str(tmp_path) not in html


def test_a_name_is_shown_and_not_executed(work, tmp_path):
    root = one(work, tmp_path).rename(tmp_path/'<b>한글')
    row = patient_row(root)
    patient_report(work/'model', row, tmp_path/'out')
    html = (tmp_path/'out/report.html').read_text()
    assert row.patient=='<b>한글' and '&lt;b&gt;한글' in html and '<b>' not in html


@pytest.mark.skipif(importlib.util.find_spec('highdicom') is None, reason='highdicom, of the extra `dicom`, is absent')
def test_pages_become_secondary_captures(work, tmp_path):
    import pydicom
    patient_report(work/'bundle', one(work, tmp_path), tmp_path/'out', dicom=True)
    pages = [pydicom.dcmread(o) for o in sorted((tmp_path/'out/dicom').iterdir())]
    assert len(pages)>1 and {o.PatientID for o in pages}=={'00003'}=={o.PatientName.family_name for o in pages}
    assert {o.SOPClassUID.name for o in pages}=={'Secondary Capture Image Storage'}
    assert len({o.SOPInstanceUID for o in pages})==len(pages) and len({o.SeriesInstanceUID for o in pages})==1
    assert pages[0].pixel_array.shape[2]==3 and 0<pages[0].pixel_array.mean()<255
    assert not pages[0].get('PatientBirthDate') and not pages[0].get('StudyDate')


def test_without_highdicom_nothing_is_begun(work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    with pytest.raises(MGMTError, match=r'pip install mgmt_fast\[dicom\]'):
        patient_report(work/'bundle', work/'scans', tmp_path/'out', '00003', dicom=True)
    assert not (tmp_path/'out').exists()


def test_a_korean_name_is_no_row_of_boxes(tmp_path):
    if len(_families())==1: pytest.skip('no font with Korean letters')
    paper = Paper('foot')
    paper.text('환자 가나다')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert paper.write(tmp_path/'p.pdf').stat().st_size>2000
