"Several processes are one process: in their steps, in what they log, and in a sweep."
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from commands import run_command
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import get_recipe
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare
from mgmt_fast.sweep import sweep, sweep_table
from distributed_run import train

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).parent/'distributed_run.py'


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    """26 patients: beside fold 1 there are 21 to train on, so that with batches of 4 or 8 the last has an odd number,
    or one."""
    d = tmp_path_factory.mktemp('distributed')
    make_phantom(d/'scans', n=26, test=0, auc=.95, seed=2, slices=8, size=32, sequences=('FLAIR','T1wCE'),
        progress=False)
    return prepare(kaggle_cohort(d/'scans'), d/'store', 'FLAIR,T1wCE', size=(8,16,16), n_workers=1, progress=False)


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def launch(*cmd, n=2):
    "Processes as a launcher starts them, and what they said."
    env = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=free_port(),
        ACCELERATE_USE_CPU='true', OMP_NUM_THREADS=1)
    jobs = [subprocess.Popen([str(o) for o in cmd],
        env={**os.environ, **{k:str(v) for k,v in env.items()}, 'RANK':str(r), 'LOCAL_RANK':str(r)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(n)]
    outs = [j.communicate()[0] for j in jobs]
    assert all(j.returncode==0 for j in jobs), '\n'.join(outs)
    return outs


def result(dest, rank=0): return json.loads((dest/f'rank{rank}.json').read_text())


CASES = {'no batch norm, last of 5': dict(bs=8), 'accumulated, last of 1': dict(bs=4, acc=2),
    'batch norm in step, last of 1': dict(bs=4, norm=1)}


@pytest.fixture(scope='module')
def two(store, tmp_path_factory):
    "What two processes made of each case; and of one that was stopped after its first epoch, then given to two others."
    d = tmp_path_factory.mktemp('two')
    jobs = {**CASES, 'straight': dict(bs=4), 'stopped': dict(bs=4, stop=1)}
    jobs |= {f'{k}, captured': dict(v, captured=True) for k,v in CASES.items()}
    launch(sys.executable, SCRIPT, store.path, json.dumps({str(d/k): v for k,v in jobs.items()}))
    assert not (d/'stopped/rank0.json').exists()
    launch(sys.executable, SCRIPT, store.path, json.dumps({str(d/'stopped'): dict(bs=4)}))
    return d


@pytest.mark.parametrize('case', CASES)
def test_two_processes_are_one(two, store, tmp_path, case):
    """Parameters after three epochs, the log, the AUC and the best epoch; both processes agree to the bit, and
    gradients travel once per step."""
    train(store.path, tmp_path, **CASES[case])
    a,b,c = result(tmp_path),result(two/case),result(two/case, 1)
    p,q = np.array(a['params']),np.array(b['params'])
    assert np.linalg.norm(p-q)<1e-5*np.linalg.norm(p)
    assert b['params']==c['params'] and b['values']==c['values']
    np.testing.assert_allclose(a['values'], b['values'], rtol=1e-4)
    steps = 3*-(-21//(CASES[case]['bs']*CASES[case].get('acc',1)))
    assert a['best']==b['best'] and a['steps']==b['steps']==b['traffic']==steps


@pytest.mark.parametrize('case', CASES)
def test_each_process_captures_its_own_passes(two, case):
    "The same parameters and log to the bit, with a stand-in for graphs; batch norms ask each other, and stay eager"
    for rank in (0,1):
        a,b = result(two/case, rank),result(two/f'{case}, captured', rank)
        assert (a['params'],a['values'],a['traffic'])==(b['params'],b['values'],b['traffic'])
        assert bool(b['captured'])==('norm in step' not in case)


def test_two_processes_resume(two):
    "To the bit"
    assert result(two/'straight')['params']==result(two/'stopped')['params']


NOTE_RANK = "import os; 'RANK' in os.environ and open('rank'+os.environ['RANK'], 'w').close()"
# so slow that rounding does not grow
SLOWLY = '--sequences','T1wCE','--arch','resnet18','--epochs','2','--bs','7','--lr','1e-5'


@pytest.fixture(scope='module')
def alone(store, tmp_path_factory):
    "What one process writes"
    d = tmp_path_factory.mktemp('alone')
    assert run_command('mgmt_train', store.path, d/'run', *SLOWLY).returncode==0
    return d/'run'


@pytest.mark.parametrize('launcher', [pytest.param('torchrun --nproc_per_node 2 --master_port', id='torchrun'),
    pytest.param('accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no '
    '--dynamo_backend no --main_process_port', id='accelerate', marks=pytest.mark.slow)])
def test_the_command_on_two_processes(store, alone, tmp_path, launcher):
    """One of the two speaks and writes, and what it writes is what one process alone would, batch norm included."""
    name,*args = launcher.split()
    cmd = BIN/name,*args,free_port(),BIN/'mgmt_train',store.path,tmp_path/'run',*SLOWLY
    (tmp_path/'sitecustomize.py').write_text(NOTE_RANK)
    r = subprocess.run([str(o) for o in cmd], capture_output=True, text=True, cwd=tmp_path, timeout=600,
        env={**os.environ, 'PYTHONPATH':os.pathsep.join([str(tmp_path), os.environ.get('PYTHONPATH', '')])})
    assert r.returncode==0 and r.stdout.count('not an estimate')==1, r.stdout+r.stderr
    assert {o.name for o in tmp_path.glob('rank*')}=={'rank0','rank1'}
    assert {'model.safetensors','model.json','history.csv'}<={f.name for f in (tmp_path/'run').iterdir()}
    a,b = (pd.read_csv(d/'history.csv')[['train_loss','valid_loss']]
        for d in (alone,tmp_path/'run')) # two predictions that are nearly equal may change places in the AUC
    np.testing.assert_allclose(a, b, rtol=1e-3)


RUNS = ['--archs', 'timm/test_resnet,timm/test_efficientnet', '--sequences', 'T1wCE,FLAIR+T1wCE', '--folds', '0,1',
    '--n_folds', '3', '--epochs', '1']


def test_a_sweep_that_was_killed_runs_what_is_missing(store, tmp_path):
    "Two architectures, two inputs, two folds; killed after the third run."
    args = store.path,tmp_path/'sweep',*RUNS
    p = subprocess.Popen([BIN/'mgmt_sweep', *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((tmp_path/'sweep').glob('*/run.json')))<3:
        assert p.poll() is None
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    before = {f:f.stat().st_mtime_ns for f in (tmp_path/'sweep').glob('*/run.json')}
    assert 3<=len(before)<8
    out = run_command('mgmt_sweep', *args)
    assert out.returncode==0 and '8 of 8 runs' in out.stdout, out.stdout+out.stderr
    assert all(f.stat().st_mtime_ns==t for f,t in before.items())
    t = pd.read_csv(tmp_path/'sweep/sweep.csv')
    assert len(t)==8 and t.auc.notna().all() and not t.duplicated(['arch','sequences','fold']).any()
    valid = pd.concat([pd.read_csv(f, dtype={'patient':str})
        for f in (tmp_path/'sweep').glob('*test_resnet-T1wCE-*/valid.csv')])
    assert valid.patient.is_unique


def test_a_dask_cluster_gives_the_bits_of_one_process(store, tmp_path):
    distributed = pytest.importorskip('distributed')
    runs,recipe = sweep_table(['resnet10'], ['T1wCE'], (0,1)),get_recipe('default', epochs=1)
    here = sweep(runs, store.path, tmp_path/'here', recipe, n_folds=3, progress=False)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True,
        dashboard_address=None) as cluster, distributed.Client(cluster):
        there = sweep(runs, store.path, tmp_path/'there', recipe, n_folds=3, n_jobs=-1, backend='dask', progress=False)
    assert there.auc.tolist()==here.auc.tolist()
    assert there.valid_loss.tolist()==pytest.approx(here.valid_loss.tolist(), rel=1e-5)
