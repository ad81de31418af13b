"""Kill commands at random moments, let writes fail, and start two writers at once; count what went wrong.

`nice python benchmarks/soak.py --minutes 60` writes `benchmarks/soak.csv`: rounds by command and mishap; of these the
patients lost, the files that differ from an undisturbed run, the processes left over, and the files left over."""
import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd

from mgmt_fast import cli
from mgmt_fast.processes import exit_code

SMALL = dict(slices=8, size=32)
KEPT = {'.npy','.safetensors','.csv','.html','.dcm','.yaml'} # compared by their bytes
TIMED = {'history.csv','sweep.csv'} # hold seconds
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
def leakage(work, dest): return cli.mgmt_leakage(work/'store', work/'other', dest, planted=2, n_workers=0)


COMMANDS = dict(phantom=phantom, audit=audit, prepare=prepare, train=train, predict=predict, sweep=sweep,
    leakage=leakage)


def started(f, work, dest, log, limit=None):
    "A command in a forked process, in a group of its own, which no file may make larger than `limit` bytes"
    pid = os.fork()
    if pid: return pid
    code = 9
    try:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
        for fd in (1,2): os.dup2(out, fd)
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        code = f(work, dest)
    finally: os._exit(code)


def running(group):
    "Processes of a group that are alive"
    res = []
    for p in Path('/proc').iterdir():
        with contextlib.suppress(OSError,ValueError):
            state,_,pgrp = (p/'stat').read_text().rpartition(')')[2].split()[:3]
            if p.name.isdigit() and int(pgrp)==group and state not in 'ZX': res.append(int(p.name))
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


def litter(dest): return sum('.mgmt-' in p.name or p.name.startswith('.tmp') for p in dest.rglob('*'))


def made(work):
    "What the commands work on"
    log = work/'log'
    steps = [lambda w,d: cli.mgmt_phantom(w/'scans', n=20, seed=1, test=.2, **SMALL),
        lambda w,d: cli.mgmt_phantom(w/'others', n=8, seed=2, test=0., **SMALL),
        lambda w,d: cli.mgmt_prepare(w/'scans', w/'store', sequences='T1wCE', size='8x16x16'),
        lambda w,d: cli.mgmt_prepare(w/'others', w/'other', sequences='T1wCE', size='8x16x16'),
        lambda w,d: train(w, w/'run')]
    (work/'recipe.yaml').write_text('recipe: default\nanisotropic: 2\nsize: [8, 16, 16]\n')
    for f in steps: assert exit_code(started(f, work, None, log), 600)==0, log.read_text()[-2000:]


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
        if differ or code not in (0,1): print(k, mishap, code, differ[:3], (self.work/'log').read_text()[-300:])
        self.count(k, mishap, rounds=1, lost=len(self.right[k][1]-who), differ=len(differ), litter=litter(dest),
            refused_wrongly=code not in (0,1))

    def kill(self, k, dest):
        pid = started(COMMANDS[k], self.work, dest, self.work/'log')
        at = self.random.random()*self.seconds[k]
        if exit_code(pid, at) is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self.count(k, 'kill', interrupted=1)
        self.count(k, 'kill', orphans=orphans(pid))
        self.finish(k, 'kill', dest)

    def full(self, k, dest):
        "No file may become larger than a few bytes or kilobytes, as on a disk that fills"
        limit = int(2**self.random.uniform(3, 17))
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


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--minutes', type=float, default=60)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a = p.parse_args()
    os.environ['MGMT_FAST_HOME'] = tempfile.mkdtemp(prefix='soak-home')
    work = Path(tempfile.mkdtemp(prefix='soak'))
    made(work)
    soak,end = Soak(work, a.seed),time.monotonic()+60*a.minutes
    while time.monotonic()<end:
        k, = soak.random.choices([*COMMANDS], [1/max(.5, soak.seconds[o]) for o in COMMANDS]) # quick ones more often
        mishap = soak.random.choices([soak.kill, soak.full, soak.two, soak.small_disk], [10,2,1,1])[0]
        if mishap==soak.two and k=='predict': continue # one file, written whole by either
        dest = work/'now'/k
        mishap(k, dest)
        shutil.rmtree(dest, ignore_errors=True)
        soak.table().to_csv(a.out, index=False)
    print(soak.table().to_string(index=False))
    for o in (work, Path(os.environ['MGMT_FAST_HOME'])): shutil.rmtree(o, ignore_errors=True)


if __name__=='__main__': main()
