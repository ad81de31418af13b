"""Change bytes of series and of files that this library wrote, read them, and count what comes of it.

`python benchmarks/fuzz.py --series 20000 --files 2000` changes 20,000 series and 2,000 files of each kind, and writes
`benchmarks/fuzz.csv`: for each kind how many were read, how many refused with a sentence (`MGMTError`), how many ended
otherwise, and the most that one cost. What a changed file says may be true of another file, so "read" means read to
the end without a fault. The changes of files are drawn by hypothesis."""
import argparse
import copy
import gzip
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings, strategies

from mgmt_fast.bundle import Bundle
from mgmt_fast.callbacks import Checkpoint
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import MGMTError, get_recipe, read_recipe, save_recipe
from mgmt_fast.learner import load_model, mgmt_learner, recipe_dls, save_model
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.records import CohortRecord, held_out_file, signed
from mgmt_fast.quality import audit_series
from mgmt_fast.series import read_volume

OLD = Path(__file__).resolve().parent.parent/'tests'/'v01'
STRANGE = [None, True, False, 0, -1, 1, 2, 10_000, 2**31, 2**63, -.5, 1e308, float('nan'), float('inf'), '', 'x',
    '../x', '/etc/passwd', 'a'*3000, [], {}, [None], [[[]]], {'a':1}, [10_000]*3, 'model', 'default']


def places(v, path=()):
    "Every place in what JSON holds"
    yield path
    items = v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ()
    for k,o in items: yield from places(o, (*path,k))


def changed_json(text, rng):
    "A text with one value replaced, removed, doubled or moved; or with bytes changed"
    if rng.random()<.2: return changed_bytes(text.encode(), rng)
    v = json.loads(text)
    path = rng.choice(list(places(v))[1:] or [()])
    if not path: return json.dumps(rng.choice(STRANGE)).encode()
    at = v
    for k in path[:-1]: at = at[k]
    k,how = path[-1],rng.randrange(6)
    if how<3: at[k] = copy.deepcopy(rng.choice(STRANGE))
    elif how==3: del at[k]
    elif how==4 and isinstance(at, dict): at[rng.choice(['x','pretrained','path','patients','kind'])] = at[k]
    else: at[k] = [at[k]]
    return json.dumps(v).encode()


def changed_bytes(raw, rng, within=None):
    "Bytes with a few replaced, cut out, doubled, or cut short"
    raw,n = bytearray(raw),min(len(raw), within or len(raw))
    for _ in range(rng.randint(1, 4)):
        i,how = rng.randrange(max(1, n)),rng.randrange(5)
        if how<2: raw[i:i+1] = bytes([rng.randrange(256)])
        elif how==2: raw[i:i+rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
        elif how==3: del raw[i:i+rng.randint(1, 40)]
        else: raw[i:i] = raw[i:i+rng.randint(1, 40)]
    return bytes(raw[:rng.randrange(len(raw)+1)] if rng.random()<.1 else raw)


def lines_changed(text, rng):
    "A journal with a line changed, and signed again where it was"
    lines = text.splitlines()
    i = rng.randrange(len(lines))
    lines[i] = changed_json(lines[i], rng).decode('latin-1')
    return ''.join(o+'\n' for o in lines).encode('latin-1', 'replace')


def signed_again(text, rng):
    "As a stranger would change it who knows how to sign"
    new = changed_json(text, rng)
    try: d = json.loads(new)
    except ValueError: return new
    if not isinstance(d, dict): return new
    d.pop('signature', None)
    return json.dumps(signed(d)).encode()


def in_header(raw, rng): return changed_bytes(raw, rng, rng.choice([16, 600, len(raw)]))
def text_change(change): return lambda raw, rng: change(raw.decode(), rng)


def use_store(path):
    s = VolumeStore(path)
    s.table,s.report
    for p in list(s.meta)[:3]: s.read(p)


def use_model(path):
    m = load_model(path/'model')
    key, = m.needs()
    size = m.size
    if np.prod(size)<1e6: m.logit({key: {s: np.zeros(size, np.uint8) for s in m.sequences}}, {})


def use_bundle(path):
    b = Bundle(path)
    repr(b)
    b.networks(); b.needs(); b.seen()


def use_checkpoint(learn):
    ckpt = Checkpoint(key=None)
    ckpt.learn = learn
    if ckpt.check(learn.path): ckpt.restore()


def slices(folder, rng):
    "Change one or two slices of a series, mostly in their headers"
    for p in rng.sample(sorted(folder.iterdir()), rng.randint(1, 2)):
        raw = p.read_bytes()
        p.write_bytes(changed_bytes(raw, rng, rng.choice([400, 1500, len(raw)])))


def packed(raw, rng):
    "A NIfTI whose header was changed before it was packed, or whose packed bytes were"
    if rng.random()<.3: return changed_bytes(raw, rng)
    return gzip.compress(changed_bytes(gzip.decompress(raw), rng, 352), 1)


def with_randoms(f, n, start):
    "Call `f` with `n` random sources of hypothesis, which also draws the extremes"
    often = settings(max_examples=n, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck))
    seed(start)(often(given(strategies.randoms())(f)))()


class Fuzz:
    def __init__(self, work, start):
        self.work,self.rng,self.counts,self.worst,self.said = work,random.Random(start),Counter(),{},Counter()
        self.start = start
        self.originals()

    def originals(self):
        w = self.work
        tiny = dict(slices=6, size=24, sequences='T1wCE', n_workers=0, progress=False)
        make_phantom(w/'scans', n=16, seed=1, test=0., **tiny)
        small = get_recipe('default', size=(8,16,16), arch='timm/test_resnet', anisotropic=2, epochs=1, bs=4)
        self.store = prepare(kaggle_cohort(w/'scans'), w/'store', 'T1wCE', recipe=small, n_workers=1, progress=False)
        CohortRecord(self.store).enter('result', by='x')
        self.learn = mgmt_learner(recipe_dls(self.store, small), recipe=small, path=w/'run')
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, cbs=Checkpoint())
        save_model(self.learn, w/'run'/'model')
        self.learn.opt or self.learn.create_opt()
        save_recipe(small, w/'recipe.yaml')
        for o in ('run','bundle','store'): shutil.copytree(OLD/o, w/f'old-{o}')
        shutil.copy(OLD/'run'/'model.safetensors', w/'old-bundle'/'model-0.safetensors')
        self.series = w/'scans'/'train'/self.store.table.patient[0]/'T1wCE'
        v = read_volume(self.series)
        nib.save(nib.Nifti1Image(v.numpy().T, v.affine[:,[2,1,0,3]]), w/'a.nii.gz')

    def kinds(self):
        "Kind to the file that is changed, how, and who reads it"
        w,text = self.work,text_change(changed_json)
        old,new = w/'old-run',w/'run'
        bundle,store = w/'old-bundle',w/'store'
        return {
            'model.json': (new/'model.json', text, lambda: use_model(new)),
            'model.json 0.1': (old/'model.json', text, lambda: use_model(old)),
            'model.safetensors': (new/'model.safetensors', in_header, lambda: use_model(new)),
            'seen.safetensors': (new/'model.seen.safetensors', in_header, lambda: use_model(new)),
            'store.json': (store/'store.json', text, lambda: use_store(store)),
            'store.json 0.1': (w/'old-store'/'store.json', text, lambda: use_store(w/'old-store')),
            'patients.json': (store/'patients.json', text, lambda: use_store(store)),
            'T1wCE.npy': (store/'T1wCE.npy', lambda raw,rng: changed_bytes(raw, rng, 128), lambda: use_store(store)),
            'bundle.json': (bundle/'bundle.json', text_change(signed_again), lambda: use_bundle(bundle)),
            'ledger.jsonl': (bundle/'ledger.jsonl', text_change(lines_changed), lambda: use_bundle(bundle)),
            'held_out.json': (held_out_file(self.store), text_change(signed_again),
                lambda: CohortRecord(self.store).found()),
            'recipe.yaml': (w/'recipe.yaml', changed_bytes, lambda: read_recipe(w/'recipe.yaml')),
            'checkpoint': (new/'checkpoint.safetensors', in_header, lambda: use_checkpoint(self.learn))}

    def tried(self, kind, read):
        "Read, and count what came of it"
        before = sum(os.times()[:4])
        try:
            read()
            end = 'read'
        except MGMTError: end = 'refused'
        except Exception as e:
            end = 'otherwise'
            self.said[kind, type(e).__name__, traceback.extract_tb(e.__traceback__)[-1].name] += 1
        took = sum(os.times()[:4])-before
        self.counts[kind,end] += 1
        self.worst[kind] = max(self.worst.get(kind, 0), took)

    def files(self, n):
        "`n` changes of each kind"
        kinds = self.kinds()
        for path,_,read in kinds.values(): read() # as they were written, all can be read
        for kind in kinds: self.changes_of(kind, *kinds[kind], n)

    def changes_of(self, kind, path, change, read, n):
        good = path.read_bytes()
        def one(rng):
            path.write_bytes(change(good, rng))
            self.tried(kind, read)
        try: with_randoms(one, n, self.start)
        finally: path.write_bytes(good)

    def scans(self, n):
        good = (self.work/'a.nii.gz').read_bytes()
        for i in range(n):
            if i%3==0:
                path = self.work/'b.nii.gz'
                path.write_bytes(packed(good, self.rng))
            else:
                path = self.work/'T1wCE'
                shutil.rmtree(path, ignore_errors=True)
                shutil.copytree(self.series, path)
                slices(path, self.rng)
            self.tried('NIfTI' if i%3==0 else 'DICOM series', lambda: (audit_series if i%5==0 else read_volume)(path))

    def table(self):
        rows = []
        for k,worst in self.worst.items():
            rows.append((k, *(self.counts[k,o] for o in ('read','refused','otherwise')), round(worst, 2)))
        t = pd.DataFrame(rows, columns=['kind','read','refused','otherwise','most_seconds'])
        return t.assign(peak_GB=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20, 2))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--series', type=int, default=20_000)
    p.add_argument('--files', type=int, default=2000, help='of each kind')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.csv'))
    a = p.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix='fuzz'))
    os.environ['MGMT_FAST_HOME'],os.environ['MGMT_FAST_LOG'] = str(work/'home'),str(work/'faults.log')
    fuzz = Fuzz(work, a.seed)
    fuzz.scans(a.series)
    fuzz.files(a.files)
    fuzz.table().to_csv(a.out, index=False)
    print(fuzz.table().to_string(index=False))
    for k,n in fuzz.said.most_common(): print(n, *k, file=sys.stderr)
    shutil.rmtree(work)


if __name__=='__main__': main()
