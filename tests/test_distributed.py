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

from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import get_recipe
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare
from mgmt_fast.sweep import sweep, sweep_table

BIN = Path(sys.executable).parent
SCRIPT = Path(__file__).parent/'distributed_run.py'


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    "26 patients: 21 train, 5 validate, so that with batches of 4 or 8 the last has an odd number, or one."
    d = tmp_path_factory.mktemp('distributed')
    make_phantom(d/'scans', n=26, test=0, auc=.95, seed=2, slices=8, size=32, sequences=('FLAIR','T1wCE'), progress=False)
    return prepare(kaggle_cohort(d/'scans'), d/'store', 'FLAIR,T1wCE', size=(8,16,16), n_workers=1, progress=False)


@pytest.fixture(scope='module')
def one_sequence(store, tmp_path_factory): return prepare(kaggle_cohort(store.path.parent/'scans'), tmp_path_factory.mktemp('one')/'store', 'T1wCE', size=(8,16,16), n_workers=1, progress=False)


def launch(n, args, script=SCRIPT):
    "Processes as a launcher starts them; their exit codes and what they said."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    env = {**os.environ, 'OMP_NUM_THREADS':'1'}
    many = dict(WORLD_SIZE=n, LOCAL_WORLD_SIZE=n, MASTER_ADDR='127.0.0.1', MASTER_PORT=port, ACCELERATE_USE_CPU='true')
    envs = [{**env, **{k:str(v) for k,v in {**many, 'RANK':r, 'LOCAL_RANK':r}.items()}} for r in range(n)] if n>1 else [env]
    jobs = [subprocess.Popen([*map(str, [*script, *args] if isinstance(script,list) else [sys.executable, script, *args])], env=e, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for e in envs]
    outs = [j.communicate()[0] for j in jobs]
    assert all(j.returncode==0 for j in jobs), '\n'.join(outs)
    return outs


def result(dest, rank=0): return json.loads((dest/f'rank{rank}.json').read_text())


@pytest.mark.parametrize('bs,acc,norm', [(8,1,0), (4,2,0), (4,1,1)], ids=['no batch norm, last of 5', 'accumulated, last of 1', 'batch norm in step, last of 1'])
def test_two_processes_are_one(one_sequence, tmp_path, bs, acc, norm):
    "Parameters after three epochs, the log, the AUC and the best epoch; both processes agree to the bit, and gradients travel once a step."
    if norm: bs = 7
    for n in (1,2): (tmp_path/str(n)).mkdir(); launch(n, [one_sequence.path, tmp_path/str(n), bs, acc, norm, -1])
    a,b,c = result(tmp_path/'1'),result(tmp_path/'2'),result(tmp_path/'2', 1)
    p,q = np.array(a['params']),np.array(b['params'])
    assert np.linalg.norm(p-q)<1e-5*np.linalg.norm(p)
    assert b['params']==c['params'] and b['values']==c['values']
    np.testing.assert_allclose(a['values'], b['values'], rtol=1e-4)
    assert a['best']==b['best'] and a['steps']==b['steps']==b['traffic']==3*-(-21//(bs*acc))


def test_two_processes_resume(one_sequence, tmp_path):
    for d in ('straight','stopped'): (tmp_path/d).mkdir()
    launch(2, [one_sequence.path, tmp_path/'straight', 4, 1, 0, -1])
    launch(2, [one_sequence.path, tmp_path/'stopped', 4, 1, 0, 1])
    assert not (tmp_path/'stopped/rank0.json').exists()
    launch(2, [one_sequence.path, tmp_path/'stopped', 4, 1, 0, -1])
    assert result(tmp_path/'straight')['params']==result(tmp_path/'stopped')['params']


def test_the_command_on_two_processes(one_sequence, tmp_path):
    "As `accelerate launch` starts it: one of the two speaks and writes."
    outs = launch(2, [one_sequence.path, tmp_path/'run', '--arch', 'resnet10', '--epochs', 1, '--bs', 7], [BIN/'mgmt_train'])
    assert sum('not an estimate' in o for o in outs)==1
    assert {'model.safetensors','model.json','history.csv'}<={f.name for f in (tmp_path/'run').iterdir()}


RUNS = ['--archs', 'resnet10,resnet18', '--sequences', 'T1wCE,FLAIR+T1wCE', '--folds', '0,1', '--n_folds', '3', '--epochs', '1']


def mgmt_sweep(*args): return [sys.executable, '-c', 'from mgmt_fast.cli import mgmt_sweep; import sys; sys.exit(mgmt_sweep())', *map(str, args)]


def test_a_sweep_that_was_killed_runs_what_is_missing(store, tmp_path):
    "Two architectures, two inputs, two folds; killed after the third run."
    cmd = mgmt_sweep(store.path, tmp_path/'sweep', *RUNS)
    p = subprocess.Popen(cmd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(list((tmp_path/'sweep').glob('*/run.json')))<3:
        assert p.poll() is None
        time.sleep(.05)
    p.send_signal(signal.SIGKILL); p.wait()
    before = {f:f.stat().st_mtime_ns for f in (tmp_path/'sweep').glob('*/run.json')}
    assert 3<=len(before)<8
    out = subprocess.run(cmd, capture_output=True, text=True)
    assert out.returncode==0 and '8 of 8 runs' in out.stdout, out.stdout+out.stderr
    assert all(f.stat().st_mtime_ns==t for f,t in before.items())
    t = pd.read_csv(tmp_path/'sweep/sweep.csv')
    assert len(t)==8 and t.auc.notna().all() and not t.duplicated(['arch','sequences','fold']).any()
    valid = pd.concat([pd.read_csv(f, dtype={'patient':str}) for f in (tmp_path/'sweep').glob('resnet10-T1wCE-*/valid.csv')])
    assert valid.patient.is_unique


def test_a_dask_cluster_gives_the_bits_of_one_process(store, tmp_path):
    distributed = pytest.importorskip('distributed')
    runs,recipe = sweep_table(['resnet10'], ['T1wCE'], (0,1)),get_recipe('default', epochs=1)
    here = sweep(runs, store.path, tmp_path/'here', recipe, n_folds=3, progress=False)
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster, distributed.Client(cluster):
        there = sweep(runs, store.path, tmp_path/'there', recipe, n_folds=3, n_jobs=-1, backend='dask', progress=False)
    assert there.auc.tolist()==here.auc.tolist() and there.valid_loss.tolist()==pytest.approx(here.valid_loss.tolist(), rel=1e-5)
