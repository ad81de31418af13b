"What a notebook cannot show of the store: kills, bad disks, many readers."
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import SEQUENCES, MGMTError, rng_for
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare

SIZE = (16, 48, 48)
RUN = '''import sys
import pandas as pd
from mgmt_fast.prepare import prepare
table,dest,n_workers = sys.argv[1:]
prepare(pd.read_pickle(table), dest, size=(16,48,48), n_workers=int(n_workers), progress=False)'''


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    root = tmp_path_factory.mktemp('phantom')/'cohort'
    make_phantom(root, n=10, test=0, slices=12, size=48, progress=False)
    return kaggle_cohort(root)


@pytest.fixture(scope='module')
def whole(cohort, tmp_path_factory):
    "The store of an undisturbed run."
    return prepare(cohort, tmp_path_factory.mktemp('whole')/'store', size=SIZE, progress=False)


def files(path): return {f.name: f.read_bytes() for f in sorted(path.iterdir())}


@pytest.mark.parametrize('workers', [1, 2])
def test_a_killed_run_is_finished_with_the_same_hashes(cohort, whole, tmp_path, workers):
    "kill -9 at random moments, until a run gets through; then every file is that of an undisturbed run."
    dest,table,rng = tmp_path/'store',tmp_path/'cohort.pkl',rng_for(0,'kill',workers)
    pd.DataFrame(cohort).to_pickle(table)
    kills = 0
    while not (dest/'store.json').exists():
        p = subprocess.Popen([sys.executable,'-c',RUN,table,dest,str(workers)], start_new_session=True,
            stdout=subprocess.DEVNULL)
        lines = len((dest/'journal.jsonl').read_text().splitlines()) if (dest/'journal.jsonl').exists() else 0
        while p.poll() is None and kills<4:
            now = (dest/'journal.jsonl').read_text().count('\n') if (dest/'journal.jsonl').exists() else 0
            if now>max(lines,1): time.sleep(rng.random()*.02); os.killpg(p.pid, signal.SIGKILL); kills += 1
        p.wait()
        if not (dest/'store.json').exists():
            with pytest.raises(MGMTError, match='run it again to finish'): VolumeStore(dest)
    assert kills>0
    assert files(dest)==files(whole.path)
    assert not len(VolumeStore(dest).verify())


def test_damage_during_the_stop_is_seen_and_mended(cohort, whole, tmp_path):
    dest = tmp_path/'store'
    prepare(cohort, dest, size=SIZE, n_workers=1, progress=False)
    d = json.loads((dest/'store.json').read_text())
    key = {k: d[k] for k in ('preparation','recipe','sequences')}
    lines = [key, *(dict(m, patient=p) for p,m in d['patients'].items())]
    (dest/'journal.jsonl').write_text('\n'.join(map(json.dumps, lines))+'\n{"patient": "000')
    (dest/'store.json').unlink()
    np.load(dest/'FLAIR.npy', mmap_mode='r+')[3] = 7
    prepare(cohort, dest, size=SIZE, n_workers=1, progress=False)
    assert files(dest)==files(whole.path)


def test_verify_names_a_damaged_volume(cohort, tmp_path):
    store = prepare(cohort.iloc[:2], tmp_path/'store', size=SIZE, n_workers=1, progress=False)
    np.load(store.path/'T2w.npy', mmap_mode='r+')[1,3,5] ^= 1
    assert VolumeStore(store.path).verify().values.tolist()==[[cohort.patient.iloc[1],'T2w']]


def _means(store): return [int(store.read(p).sum()) for p in store.table.patient]


def test_many_readers_see_the_same(whole):
    with get_context('spawn').Pool(2) as pool: seen = pool.map(_means, [whole]*4)
    assert all(s==_means(whole) for s in seen)


def test_a_destination_that_cannot_hold_it(cohort, tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(MGMTError, match='cannot'): prepare(cohort, tmp_path/'file'/'store', size=SIZE, progress=False)
    with pytest.raises(MGMTError, match='cannot reserve .* MiB'):
        prepare(cohort, tmp_path/'huge', size=(10**5,10**4,10**4), progress=False)


@pytest.mark.skipif(os.name!='posix' or not os.path.exists('/dev/shm'), reason='needs a small file system to fill')
def test_a_full_disk_is_an_error_that_can_be_resumed_from(cohort, whole, tmp_path):
    "A file-size limit stands in for the full disk: writing past it fails the same way."
    table = tmp_path/'cohort.pkl'
    pd.DataFrame(cohort).to_pickle(table)
    limited = '''import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000,200_000))
'''
    r = subprocess.run([sys.executable,'-c',limited+RUN,table,tmp_path/'store','1'], capture_output=True, text=True)
    assert 'PrepareError' in r.stderr and 'cannot reserve' in r.stderr
    prepare(cohort, tmp_path/'store', size=SIZE, n_workers=1, progress=False)
    assert files(tmp_path/'store')==files(whole.path)


def test_one_bad_patient_stops_nothing(cohort, tmp_path):
    bad = cohort.copy()
    bad.loc[bad.index[0], list(SEQUENCES)] = str(tmp_path/'nowhere')
    bad.loc[bad.index[1], 'T1w'] = None
    store = prepare(bad, tmp_path/'store', size=SIZE, progress=False)
    assert len(store)==len(bad)
    assert store.table[list(SEQUENCES)].sum(axis=1).tolist()==[0,3]+[4]*8
    errors = store.report[store.report.level=='error']
    assert set(errors.patient)=={bad.patient.iloc[0]} and 'patient skipped' in errors.what.iloc[-1]
    with pytest.raises(MGMTError, match='has no prepared T1w'): store.read(bad.patient.iloc[1])
    with pytest.raises(MGMTError, match='more than once'): prepare(pd.concat([bad,bad]), tmp_path/'twice', size=SIZE)


def test_sequences_of_two_bodies_are_not_stacked(cohort, tmp_path):
    "A sequence whose brain lies elsewhere is refused and reported, not resampled into nothing."
    far = tmp_path/'far'
    make_phantom(far, n=10, test=0, slices=12, size=48, progress=False, shift=0)
    import pydicom
    row = kaggle_cohort(far).iloc[0]
    for f in os.scandir(row.T2w):
        ds = pydicom.dcmread(f.path)
        ds.ImagePositionPatient = [float(v)+300 for v in ds.ImagePositionPatient]
        ds.save_as(f.path)
    store = prepare(pd.DataFrame([row]), tmp_path/'store', size=SIZE, progress=False)
    assert store.table[list(SEQUENCES)].values.tolist()==[[True,True,True,False]]
    assert 'another frame of reference' in store.report[store.report.level=='error'].what.iloc[0]


def _scans(folder, cohort):
    "A copy of a cohort's scans, and its table."
    res = cohort.copy()
    for s in SEQUENCES:
        res[s] = [str(shutil.copytree(p, folder/r/s)) for r,p in zip(cohort.patient, cohort[s])]
    return res


def _state(path): return {f.name: (f.stat().st_mtime_ns, f.stat().st_size) for f in path.iterdir()}


def test_labels_may_change_without_a_voxel_being_touched(cohort, tmp_path, capsys):
    dest = tmp_path/'store'
    prepare(cohort, dest, size=SIZE, n_workers=1, progress=False)
    before = _state(dest)
    turned = cohort.assign(label=1-cohort.label)
    store = prepare(turned, dest, size=SIZE, n_workers=1, progress=False)
    assert store.table.label.tolist()==turned.label.tolist()
    said = capsys.readouterr().out
    assert '10 patients as prepared before' in said and '10 labels changed: 00000 from ' in said
    assert {k for k,v in _state(dest).items() if v!=before[k]}=={'patients.json'}
    assert VolumeStore(dest).table.label.tolist()==turned.label.tolist()
    assert VolumeStore(dest, labels=cohort[['patient','label']]).table.label.tolist()==cohort.label.tolist()
    one = turned.assign(patient=[str(int(p)) for p in turned.patient], label=[pd.NA,*turned.label[1:]])
    assert VolumeStore(dest, labels=one).table.label.isna().sum()==1, 'ids match whatever their padding'


def test_labels_forgotten_the_first_time(cohort, tmp_path, capsys):
    dest = tmp_path/'store'
    assert prepare(cohort.assign(label=pd.NA), dest, size=SIZE, n_workers=1, progress=False).table.label.isna().all()
    assert prepare(cohort, dest, size=SIZE, n_workers=1, progress=False).table.label.tolist()==cohort.label.tolist()
    assert prepare(cohort.assign(label=pd.NA), dest, size=SIZE, n_workers=1,
        progress=False).table.label.tolist()==cohort.label.tolist()
    assert 'no labels were given: the 10 of before are kept' in capsys.readouterr().out


def test_a_replaced_scan_is_prepared_again_alone(cohort, tmp_path, capsys):
    "And ends in the pixels of a new store of the scans as they are now."
    mine,dest = _scans(tmp_path/'scans', cohort.iloc[:3]),tmp_path/'store'
    old = prepare(mine, dest, size=SIZE, n_workers=1, progress=False)
    rows = {s: np.load(dest/f'{s}.npy') for s in SEQUENCES}
    shutil.rmtree(mine.T2w[1]); shutil.copytree(cohort.T2w.iloc[5], mine.T2w[1])
    new = prepare(mine, dest, size=SIZE, n_workers=1, progress=False)
    said = '2 patients as prepared before, 1 prepared again, since their scans were replaced (00001)'
    assert said in capsys.readouterr().out
    fresh = prepare(mine, tmp_path/'fresh', size=SIZE, n_workers=1, progress=False)
    assert files(dest)==files(fresh.path)
    for s in SEQUENCES:
        now = np.load(dest/f'{s}.npy')
        assert all((now[i]==rows[s][i]).all() for i in (0,2))
    assert not (np.load(dest/'T2w.npy')[1]==rows['T2w'][1]).all()
    assert not len(new.verify()) and len(old)==3


def test_a_copied_or_touched_folder_is_not_prepared_again(cohort, tmp_path, capsys):
    mine,dest = _scans(tmp_path/'scans', cohort.iloc[:2]),tmp_path/'store'
    prepare(mine, dest, size=SIZE, n_workers=1, progress=False)
    arrays = {s: _state(dest)[f'{s}.npy'] for s in SEQUENCES}
    moved = _scans(tmp_path/'elsewhere', mine)
    for f in (tmp_path/'elsewhere').rglob('*.dcm'): os.utime(f, (1,1))
    prepare(moved, dest, size=SIZE, n_workers=1, progress=False)
    assert '2 patients as prepared before' in capsys.readouterr().out
    assert {s: _state(dest)[f'{s}.npy'] for s in SEQUENCES}==arrays
    same_size = next((tmp_path/'elsewhere').rglob('*.dcm'))
    b = bytearray(same_size.read_bytes()); b[-3] ^= 1; same_size.write_bytes(b); os.utime(same_size, (2,2))
    prepare(moved, dest, size=SIZE, n_workers=1, progress=False)
    assert '1 prepared again' in capsys.readouterr().out, 'one bit of one slice, at the same size'


def test_exchanged_files_of_one_size_and_time_are_seen(tmp_path):
    at = np.stack(np.meshgrid(*(np.linspace(-1.2, 1.2, n) for n in (64,64,24)), indexing='ij'))
    for seed,name in enumerate('ab'):
        inside = 500+np.random.default_rng(seed).normal(0, 20, at.shape[1:])
        x = np.where((at**2).sum(0)<1, inside, 0).astype(np.int16)
        nib.Nifti1Image(x, np.diag([3,3,6,1.])).to_filename(tmp_path/f'{name}.nii')
        os.utime(tmp_path/f'{name}.nii', (1e9,1e9)) # as an archive leaves them
    rows = [dict(patient=p, label=1, source='x', T1w=str(tmp_path/f'{p}.nii')) for p in 'ab']
    how = dict(sequences='T1w', size=(8,16,16), n_workers=1, progress=False)
    before = prepare(pd.DataFrame(rows), tmp_path/'store', **how)
    hashes = {p: before.meta[p]['volumes']['T1w']['hash'] for p in 'ab'}
    turned = pd.DataFrame([dict(r, T1w=o['T1w']) for r,o in zip(rows, rows[::-1])])
    after = prepare(turned, tmp_path/'store', **how)
    assert [after.meta[p]['volumes']['T1w']['hash'] for p in 'ab']==[hashes[p] for p in 'ba']


@pytest.mark.parametrize('labels', [[.5,0,1], [2,0,1], ['Methylated','Unmethylated',None]])
def test_a_label_that_is_none_is_refused_before_any_work(cohort, tmp_path, labels):
    some = cohort.iloc[:3].assign(label=labels)
    with pytest.raises(MGMTError, match='label of patient 00000'):
        prepare(some, tmp_path/'store', size=SIZE, n_workers=1, progress=False)
    assert not (tmp_path/'store').exists() or not any((tmp_path/'store').iterdir())


def test_a_view_that_keeps_labels_keeps_the_other_patients(cohort, tmp_path):
    store = prepare(cohort, tmp_path/'store', 'T2w', size=SIZE, n_workers=1, progress=False)
    some = store.table.patient[:3]
    store.only(some).join(pd.DataFrame(dict(patient=some, label=[1,1,0], age=[50,60,70])), keep=True)
    back = VolumeStore(tmp_path/'store')
    assert back.table.patient.tolist()==store.table.patient.tolist()
    assert back.table.label[:3].tolist()==[1,1,0] and back.table.label[3:].tolist()==store.table.label[3:].tolist()
    back.join(pd.DataFrame(dict(patient=some, age=[np.nan,60,70])))
    assert back.table.age.notna()[:3].tolist()==[False,True,True], 'what was taken back is gone'


def test_new_patients_are_added_and_absent_ones_kept_aside(cohort, whole, tmp_path, capsys):
    dest = tmp_path/'store'
    prepare(cohort.iloc[2:6], dest, size=SIZE, n_workers=1, progress=False)
    first = np.load(dest/'FLAIR.npy')
    store = prepare(cohort.iloc[4:], dest, size=SIZE, n_workers=2, progress=False)
    assert '2 patients as prepared before, 4 new, 2 set aside' in capsys.readouterr().out
    assert store.table.patient.tolist()==cohort.patient.iloc[4:].tolist()
    assert (np.load(dest/'FLAIR.npy')[:4]==first).all()
    for p in store.table.patient: assert (store.read(p)==whole.read(p)).all()
    with pytest.raises(MGMTError, match='no patient'): store.read(cohort.patient.iloc[2])
    back = prepare(cohort, dest, size=SIZE, n_workers=1, progress=False)
    assert '8 patients as prepared before, 2 new' in capsys.readouterr().out
    for p in cohort.patient: assert (back.read(p)==whole.read(p)).all()


def test_pixels_whose_scans_are_gone_are_kept_and_said(cohort, whole, tmp_path, capsys):
    mine,dest = _scans(tmp_path/'scans', cohort.iloc[:3]),tmp_path/'store'
    prepare(mine, dest, size=SIZE, n_workers=1, progress=False)
    shutil.rmtree(mine.FLAIR[0])
    mine.loc[1,'T1w'] = None
    store = prepare(mine, dest, size=SIZE, n_workers=1, progress=False)
    assert '3 patients as prepared before, 2 volumes kept whose scans are gone' in capsys.readouterr().out
    kept = store.report[store.report.what.str.contains('scans are gone')]
    assert kept[['patient','sequence']].values.tolist()==[['00000','FLAIR'],['00001','T1w']]
    for p in mine.patient: assert (store.read(p)==whole.read(p)).all()


def test_a_kill_while_a_store_is_brought_up_to_date(cohort, tmp_path):
    "At each write: the next run ends in the same pixels and labels."
    mine,start = _scans(tmp_path/'scans', cohort.iloc[:3]),tmp_path/'start'
    prepare(mine, start, size=SIZE, n_workers=1, progress=False)
    shutil.rmtree(mine.T2w[1]); shutil.copytree(cohort.T2w.iloc[5], mine.T2w[1])
    mine['label'] = 1-mine.label
    run = 'import os, sys, signal, pandas as pd; from mgmt_fast.prepare import prepare\n' \
        'at,n,rep = int(sys.argv[3]),[0],os.replace\n' \
        'def count(a, b):\n    n[0] += 1\n    if n[0]==at: os.kill(os.getpid(), signal.SIGKILL)\n    rep(a, b)\n' \
        'os.replace = count\n' \
        'prepare(pd.read_pickle(sys.argv[1]), sys.argv[2], size=(16,48,48), n_workers=1, progress=False)'
    pd.DataFrame(mine).to_pickle(tmp_path/'cohort.pkl')
    fresh = files(prepare(mine, tmp_path/'fresh', size=SIZE, n_workers=1, progress=False).path)
    for at in range(1, 5):
        dest = tmp_path/f'k{at}'
        shutil.copytree(start, dest)
        killed = subprocess.run([sys.executable,'-c',run,tmp_path/'cohort.pkl',dest,str(at)],
            stdout=subprocess.DEVNULL).returncode
        assert killed==(-signal.SIGKILL if at<=3 else 0)
        prepare(mine, dest, size=SIZE, n_workers=1, progress=False)
        assert {k:v for k,v in files(dest).items() if not k.startswith(".")}==fresh


def test_a_label_table_that_names_sessions_or_only_ages_keeps_the_labels(cohort, tmp_path, capsys):
    "The store joins tables by the same rule as `find_cohort`: by session, else by patient; no label column, no change."
    cohort = cohort.iloc[:4]
    cohort = cohort.assign(patient=[f'UPENN-GBM-{i:05d}' for i in range(len(cohort))], session='11')
    store = prepare(cohort, tmp_path/'s', ['T1wCE'], size=(4,8,8), n_workers=1, progress=False)
    table = pd.DataFrame(dict(ID=cohort.patient+'_11', MGMT=cohort.label))
    table.to_csv(tmp_path/'labels.csv', index=False)
    assert store.join(tmp_path/'labels.csv').table.label.tolist()==cohort.label.tolist()
    other = pd.DataFrame(dict(patient=cohort.patient+'_21', label=1-cohort.label))
    both = pd.concat([other, other.assign(patient=cohort.patient+'_11', label=cohort.label)])
    assert store.join(both).table.label.tolist()==cohort.label.tolist()
    capsys.readouterr()
    aged = store.join(cohort[['patient']].assign(age=60)).table
    assert aged.label.tolist()==cohort.label.tolist() and (aged.age==60).all() and capsys.readouterr().out==''
