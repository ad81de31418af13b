"""Kill commands at random moments, let writes fail, and start two writers at once; count what went wrong.

`nice python benchmarks/soak.py --minutes 60` writes `benchmarks/soak.csv`: rounds by command and mishap, each finished
by an undisturbed run; runs that were killed or stopped; patients lost, files that differ from an undisturbed run,
processes and files left over.
`--writes` lets the first write of every command fail, then the second, and so on to the last; of the slowest two, the
first write from each place in the code. It writes `benchmarks/soak_writes.csv`.
`mgmt_demo` and `mgmt_thesis` are made of these commands; `mgmt_weights` needs the internet, `mgmt_kaggle` builds
wheels, and neither keeps anything."""
import argparse
import builtins
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
import traceback
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch

from mgmt_fast import cli
from mgmt_fast.core import Volume
from mgmt_fast.dsc_phantom import dsc_patients, render_dsc, write_dsc
from mgmt_fast.grids import isotropic
from mgmt_fast.phantom import draw_patients, render_patient
from mgmt_fast.processes import exit_code

SMALL = dict(slices=8, size=32)
KEPT = {'.npy','.safetensors','.csv','.html','.dcm','.yaml','.gz','.jpg','.zip'} # compared by their bytes
TIMED = {'history.csv','sweep.csv'} # hold seconds
NEVER = 2**31 # no command has so many writes
NO_MORE = 100 # the exit code of a command that has fewer writes than the one that was to fail
COLUMNS = ['command','mishap','rounds','interrupted','lost','differ','orphans','litter','refused_wrongly']


def phantom(work, dest): return cli.mgmt_phantom(dest, n=6, seed=3, **SMALL)
def audit(work, dest): return cli.mgmt_audit(work/'scans', dest, n_workers=2)
def prepare(work, dest):
    return cli.mgmt_prepare(work/'scans', dest, sequences='T1wCE', size='8x16x16', n_workers=2)
def train(work, dest):
    return cli.mgmt_train(work/'store', dest, arch='timm/test_resnet', epochs=2, bs=8, recipe=str(work/'recipe.yaml'))
def predict(work, dest):
    return cli.mgmt_predict(work/'run', work/'scans', dest/'predictions.csv', n_workers=2)
def sweep(work, dest):
    how = dict(archs='timm/test_resnet', folds='0,1', epochs=1, bs=8, recipe=str(work/'recipe.yaml'))
    return cli.mgmt_sweep(work/'store', dest, **how)
def leakage(work, dest): return cli.mgmt_leakage(work/'few', work/'few', dest, planted=1, n_workers=0)
def evaluate(work, dest):
    how = dict(archs='timm/test_resnet', folds=2, inner=2, epochs=1, bs=8, recipe=str(work/'recipe.yaml'))
    return cli.mgmt_evaluate(work/'store', dest, **how, bundle=dest/'bundle')
def external(work, dest):
    "A bundle and a list of held-out cohorts of its own, since both count the tests"
    os.environ['MGMT_FAST_HOME'] = str(dest/'home')
    return cli.mgmt_external(dest/'bundle', work/'others', dest/'result')
def predictions(work, dest): return cli.mgmt_evaluate(dest=dest, predictions=work/'table.csv', bundle=dest/'bundle')
def preregister(work, dest):
    return cli.mgmt_preregister(dest/'plan.json', work/'bundle', 'phantoms of seed 2', 'AUC above .6')
def standardize(work, dest): return cli.mgmt_standardize(work/'heads', dest, work/'atlas.nii.gz', n_workers=2)
def perfusion(work, dest): return cli.mgmt_perfusion(work/'dsc', dest)
def report(work, dest): return cli.mgmt_report(work/'bundle', work/'few-scans/train/00000', dest)
def pack(work, dest): return cli.mgmt_pack(work/'bundle', dest/'bundle.zip')
def unpack(work, dest): return cli.mgmt_unpack(work/'bundle.zip', dest/'bundle')
def export(work, dest): return cli.mgmt_export(work/'bundle.zip', dest/'onnx')


COMMANDS = dict(phantom=phantom, audit=audit, prepare=prepare, train=train, predict=predict, sweep=sweep,
    leakage=leakage, evaluate=evaluate, external=external, predictions=predictions, preregister=preregister,
    standardize=standardize, perfusion=perfusion, report=report, pack=pack, unpack=unpack,
    export=export)
SLOW = ('leakage','evaluate') # each place that writes is enough


class FailingWrites:
    "Fails the k-th of all openings for writing, renamings, new folders and waits for the disk"
    def __init__(self, k, patch=setattr):
        self.k,self.n,self.places = k,0,{}
        calls = [(builtins,'open'),(io,'open'),(safetensors.torch,'serialize_file')]
        calls += [(os,o) for o in ('replace','fsync','posix_fallocate','mkdir')]
        for module,name in calls: patch(module, name, self.counted(getattr(module, name), name))

    def counted(self, f, name):
        def _f(*args, **kwargs):
            mode = args[1] if len(args)>1 else kwargs.get('mode', 'r')
            if name!='open' or isinstance(mode, str) and set('wa+x')&set(mode):
                self.n += 1
                self.places.setdefault(place(name), self.n)
                if self.n==self.k: raise OSError(28, 'No space left on device')
            return f(*args, **kwargs)
        return _f


def place(name):
    "Which lines of the library lead to a write"
    calls = [o for o in traceback.extract_stack() if '/mgmt_fast/' in o.filename]
    return name,*((o.filename,o.lineno) for o in calls)


def first_writes(f, work, dest):
    "Of a command's writes, the number of the first from each place"
    exit_code(started(f, work, dest, work/'log', fail_at=NEVER), 900)
    shutil.rmtree(dest)
    return json.loads((work/'first_writes.json').read_text())


def given(f, work, dest):
    "What a command works on lies there before it starts"
    if f==external and not (dest/'bundle').exists(): shutil.copytree(work/'bundle', dest/'bundle')


def started(f, work, dest, log, limit=None, fail_at=None):
    "A command in a forked process, in a group of its own; no file grows beyond `limit` bytes, one write fails"
    given(f, work, dest)
    pid = os.fork()
    if pid: return pid
    code = 9
    try:
        os.setpgid(0, 0)
        out = os.open(log if limit is None else os.devnull, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
        for fd in (1,2): os.dup2(out, fd)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        writes = None if fail_at is None else FailingWrites(fail_at)
        code = f(work, dest)
        if writes and writes.n<fail_at: code = NO_MORE
        if fail_at==NEVER: (work/'first_writes.json').write_text(json.dumps(sorted(writes.places.values())))
    finally: os._exit(code)


def running(group):
    "Processes of a group of which a thread is alive: one that was killed holds its lock until the last has ended"
    res = set()
    for p in Path('/proc').glob('[0-9]*/task/*/stat'):
        with contextlib.suppress(OSError,ValueError):
            state,_,pgrp = p.read_text().rpartition(')')[2].split()[:3]
            if int(pgrp)==group and state not in 'ZX': res.add(int(p.parts[2]))
    return res


def orphans(group):
    "How many processes outlive their parent by two seconds; they are ended"
    end = time.monotonic()+2
    while (left:=running(group)) and time.monotonic()<end: time.sleep(.02)
    for o in left:
        with contextlib.suppress(ProcessLookupError): os.kill(o, signal.SIGKILL)
    return len(left)


def files(dest):
    "Digest of each file whose bytes are to be the same"
    res = {}
    for p in sorted(dest.rglob('*')):
        if p.suffix not in KEPT or p.name in TIMED or not p.is_file(): continue
        if 'checkpoint' in p.name or '.mgmt-' in str(p): continue
        res[str(p.relative_to(dest))] = hashlib.blake2b(p.read_bytes()).hexdigest()
    return res


def patients(dest):
    "Patients that a folder knows"
    if (dest/'store.json').exists(): return set(json.loads((dest/'store.json').read_text())['patients'])
    tables = [p for p in dest.rglob('*.csv') if p.name in ('predictions.csv','audit.csv','phantom.csv')]
    return {o for p in tables for o in pd.read_csv(p, dtype=str).patient}


def litter(dest): return [p.name for p in dest.rglob('*') if '.mgmt-' in p.name or p.name.startswith('.tmp')]


def other_patients(work, dest):
    "Phantoms whose numbers no patient of the training set has"
    cli.mgmt_phantom(work/'others', n=12, seed=2, test=0., **SMALL)
    for p in (work/'others'/'train').iterdir(): p.rename(p.with_name(f'9{p.name[1:]}'))
    for p in (work/'others').glob('*.csv'):
        table = pd.read_csv(p, dtype=str)
        table.iloc[:,0] = '9'+table.iloc[:,0].str[1:]
        table.to_csv(p, index=False)
    return 0


def heads(work):
    "One brain that lies in the atlas' space already, and one of noise, which is refused; a DSC series"
    brain = render_patient(draw_patients(1, seed=3).iloc[0], 3, 'T1w', slices=40, size=64, fov=220)['T1w'][0]
    brain = isotropic(brain, 3.)
    brain.save(work/'atlas.nii.gz')
    noise = np.random.default_rng(0).integers(1, 900, brain.shape, dtype=np.int16)
    noise = Volume(torch.from_numpy(noise), brain.affine)
    for name,v in dict(a=brain, b=noise).items():
        (work/'heads'/name).mkdir(parents=True)
        v.save(work/'heads'/name/'T1w.nii.gz')
    sim = render_dsc(dsc_patients(4, seed=1).iloc[1], 1, slices=8, size=40, frames=40)
    write_dsc(sim.series, work/'dsc', enhanced=False)
    return 0


def made(work):
    "What the commands work on"
    log = work/'log'
    steps = [lambda w,d: heads(w), lambda w,d: cli.mgmt_phantom(w/'scans', n=44, seed=1, test=.1, **SMALL),
        other_patients,
        lambda w,d: cli.mgmt_phantom(w/'few-scans', n=6, seed=2, test=0., **SMALL),
        lambda w,d: cli.mgmt_prepare(w/'few-scans', w/'few', sequences='T1wCE', size='8x16x16'),
        lambda w,d: cli.mgmt_prepare(w/'scans', w/'store', sequences='T1wCE', size='8x16x16'),
        lambda w,d: train(w, w/'run'),
        lambda w,d: evaluate(w, w/'evaluation')]
    (work/'recipe.yaml').write_text('recipe: default\nanisotropic: 2\nsize: [8, 16, 16]\n')
    (work/'table.csv').write_text('patient,label,prob\n'+''.join(f'{i},{i%2},{(i*7%20)/20}\n' for i in range(40)))
    for f in steps: assert exit_code(started(f, work, None, log), 600)==0, log.read_text()[-2000:]
    shutil.copytree(work/'evaluation'/'bundle', work/'bundle')
    assert exit_code(started(lambda w,d: pack(w, w), work, None, log), 600)==0


class Soak:
    def __init__(self, work, seed):
        self.work,self.random,self.counts = work,random.Random(seed),Counter()
        self.right,self.seconds = {},{}
        for k,f in COMMANDS.items():
            start = time.monotonic()
            code = exit_code(started(f, work, work/'right'/k, work/'log'), 900)
            assert code in (0,1), (k, code, (work/'log').read_text()[-2000:])
            self.seconds[k] = time.monotonic()-start
            self.right[k] = files(work/'right'/k),patients(work/'right'/k)

    def count(self, command, mishap, **what):
        for k,v in what.items(): self.counts[command,mishap,k] += int(v)

    def finish(self, k, mishap, dest):
        "Run the command once more, undisturbed, and compare"
        code = exit_code(started(COMMANDS[k], self.work, dest, self.work/'log'), 900)
        found,who = files(dest),patients(dest)
        differ = [o for o,h in self.right[k][0].items() if found.get(o)!=h and not o.startswith('sweep')]
        left = litter(dest)
        if differ or left or code not in (0,1):
            print(k, mishap, code, differ[:3], left[:3], (self.work/'log').read_text()[-300:], flush=True)
        self.count(k, mishap, rounds=1, lost=len(self.right[k][1]-who), differ=len(differ), litter=len(left),
            refused_wrongly=code not in (0,1))

    def kill(self, k, dest):
        "Up to five times in a row, the next run going on with what the one before left"
        for _ in range(self.random.randint(1, 5)):
            pid = started(COMMANDS[k], self.work, dest, self.work/'log')
            if exit_code(pid, self.random.random()*self.seconds[k]) is None:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.count(k, 'kill', interrupted=1)
            self.count(k, 'kill', orphans=orphans(pid))
        self.finish(k, 'kill', dest)

    def failing(self, k, dest, at):
        "The `at`-th write fails; is there one?"
        code = exit_code(started(COMMANDS[k], self.work, dest, self.work/'log', fail_at=at), 900)
        if code==NO_MORE: return False
        self.count(k, 'failing write', interrupted=code==2, refused_wrongly=code not in (0,1,2,3))
        if code not in (0,1,2,3): print(k, at, code, (self.work/'log').read_text()[-600:])
        self.finish(k, 'failing write', dest)
        return True

    def full(self, k, dest):
        "No file may become larger than a few bytes or kilobytes, as on a disk that fills"
        limit = int(2**self.random.uniform(6, 17)) # a semaphore is a file of 32 bytes
        code = exit_code(started(COMMANDS[k], self.work, dest, self.work/'log', limit), 900)
        self.count(k, 'full', interrupted=code==2, refused_wrongly=code not in (0,1,2,3))
        self.finish(k, 'full', dest)

    def small_disk(self, k, dest):
        "A disk of a few kilobytes more than is needed, or less; it needs the right to mount"
        need = sum(p.stat().st_size for p in (self.work/'right'/k).rglob('*') if p.is_file())
        size = max(2**14, int(need*self.random.uniform(.05, 1.2)))
        dest.mkdir(parents=True)
        mounted = subprocess.run(['mount','-t','tmpfs','-o',f'size={size}','none',dest], capture_output=True)
        if mounted.returncode: return
        try: code = exit_code(started(COMMANDS[k], self.work, dest/'in', self.work/'log'), 900)
        finally: subprocess.run(['umount','-l',dest])
        self.count(k, 'small disk', rounds=1, interrupted=code==2, refused_wrongly=code not in (0,1,2,3))

    def two(self, k, dest):
        "Two writers in one folder: one does the work, the other is told who does, or comes later and finds it done"
        pids = [started(COMMANDS[k], self.work, dest, self.work/'log') for _ in range(2)]
        codes = [exit_code(o, 900) for o in pids]
        self.count(k, 'two writers', interrupted=2 in codes, refused_wrongly=not {0,1}&set(codes))
        self.finish(k, 'two writers', dest)

    def table(self):
        keys = sorted({o[:2] for o in self.counts})
        rows = [(*o, *(self.counts[*o,c] for c in COLUMNS[2:])) for o in keys]
        t = pd.DataFrame(rows, columns=COLUMNS)
        t.loc[len(t)] = ['all','all',*t[COLUMNS[2:]].sum()]
        return t


def random_mishaps(soak, end, out):
    "Until the clock says `end`"
    while time.monotonic()<end:
        k, = soak.random.choices([*COMMANDS], [1/max(2, soak.seconds[o]) for o in COMMANDS]) # quick ones more often
        mishap = soak.random.choices([soak.kill, soak.full, soak.two, soak.small_disk], [10,2,1,1])[0]
        if mishap==soak.two and k in ('predict','pack'): continue # one file, written whole by either
        if mishap==soak.small_disk and k=='external': continue # its bundle would not fit
        dest = soak.work/'now'/k
        mishap(k, dest)
        shutil.rmtree(dest, ignore_errors=True)
        soak.table().to_csv(out, index=False)


def every_write(soak, end, out):
    "Each write, or each place that writes, of each command fails once, or until the clock says `end`"
    for k,f in COMMANDS.items():
        dest = soak.work/'now'/k
        for at in first_writes(f, soak.work, dest) if k in SLOW else count(1):
            if time.monotonic()>end or not soak.failing(k, dest, at): break
            shutil.rmtree(dest, ignore_errors=True)
        soak.table().to_csv(out, index=False)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--minutes', type=float, default=60)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--writes', action='store_true')
    a = p.parse_args()
    os.environ['MGMT_FAST_HOME'] = tempfile.mkdtemp(prefix='soak-home')
    work = Path(tempfile.mkdtemp(prefix='soak'))
    made(work)
    soak,here = Soak(work, a.seed),Path(__file__)
    run,out = (every_write,'soak_writes.csv') if a.writes else (random_mishaps,'soak.csv')
    run(soak, time.monotonic()+60*a.minutes, here.with_name(out))
    print(soak.table().to_string(index=False))
    for o in (work, Path(os.environ['MGMT_FAST_HOME'])): shutil.rmtree(o, ignore_errors=True)


if __name__=='__main__': main()
