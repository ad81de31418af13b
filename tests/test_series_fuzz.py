"""Mutated headers: `read_volume` gives a `Volume` or a `SeriesError`, nothing else, and never hangs.

usage: test_series_fuzz.py [FILES] [SEED]   runs it at length and prints the counts"""
import collections, gzip, json, os, resource, signal, subprocess, sys, tempfile, time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy.spatial.transform import Rotation
from series_writer import *


class Hang(BaseException): "Not an Exception, so that no handler in between can take it for bad input"


def originals():
    """Files to mutate, by kind: three slices of each coding, and enhanced files that hold a volume alone; with where
    their pixels begin"""
    rng = np.random.default_rng(0)
    affine = affine_of(Rotation.random(random_state=0).as_matrix(), (4,1,1))
    x = rng.integers(0, 4000, (3,32,32)).astype(np.int16)
    more = dict(PatientName='SECRET^NAME', EchoTime=90, RepetitionTime=4000, RescaleSlope=1, RescaleIntercept=0,
        ImageType=['ORIGINAL','PRIMARY'], ContrastBolusAgent='')
    res = {}
    for coding in CODINGS:
        res[coding] = [as_bytes(ds, coding) for ds in datasets(x, affine, **more)]
        res[f'enhanced {coding}'] = [as_bytes(enhanced(x, affine), coding)]
    raw = nib.Nifti1Image(x, affine).to_bytes()
    return {**res, 'nifti': [raw], 'nifti.gz': [raw]}


def mutate(raw, rng):
    "`raw` with a few wounds, most of them in the header"
    raw = bytearray(raw)
    for _ in range(rng.choice([1,1,1,2,3,8])):
        if len(raw)<200: break
        end = min(len(raw), 2600)
        at = int(rng.integers(0 if rng.random()<.1 else 132, end if rng.random()<.9 else len(raw)))
        n = int(rng.choice([1,1,2,4,8,40]))
        kind = rng.integers(8)
        if   kind==0: raw[at:at+n] = rng.bytes(n)
        elif kind==1: raw[at:at+1] = bytes([raw[min(at,len(raw)-1)]^(1<<int(rng.integers(8)))])
        elif kind==2: del raw[at:at+n]
        elif kind==3: raw[at:at] = rng.bytes(n)
        elif kind==4:
            raw[at:at+4] = rng.choice([b'\xff\xff\xff\xff', b'\0\0\0\0', b'\xff\xff\xff\x7f', b'SQ\0\0', b'UN\0\0',
                b'\xfe\xff\0\xe0', b'\xfe\xff\xdd\xe0'])
        elif kind==5: raw = raw[:at]
        elif kind==6:
            raw[at:at+n] = rng.choice([b'-1', b'nan', b'inf', b'1e999', b'99999999', b'\\', b'0', b' ']).ljust(n)[:n]
        else:
            to = int(rng.integers(132, end))
            raw[at:at+n] = raw[to:to+n]
    return bytes(raw)


def fuzz(files, seed):
    "Counts by outcome; whatever is neither a Volume nor a SeriesError is kept with the bytes that caused it"
    from mgmt_fast.core import Volume
    from mgmt_fast.dicom import SeriesError
    from mgmt_fast.quality import audit_series
    from mgmt_fast.series import read_volume
    resource.setrlimit(resource.RLIMIT_AS, (8<<30,8<<30)) # a header must not make the reader ask for the moon
    def _hang(*_): raise Hang
    signal.signal(signal.SIGALRM, _hang)
    rng,kinds,counts,slowest = np.random.default_rng(seed),list(originals().items()),collections.Counter(),0
    with tempfile.TemporaryDirectory() as td:
        for i in range(files):
            kind,raws = kinds[i%len(kinds)]
            hit = int(rng.integers(len(raws)))
            bad = mutate(raws[hit], rng)
            for p in Path(td).iterdir(): p.unlink()
            for n,raw in enumerate(raws):
                raw = bad if n==hit else raw
                (Path(td)/f"{n}.{dict(nifti='nii').get(kind, 'nii.gz' if kind=='nifti.gz' else 'dcm')}").write_bytes(
                    gzip.compress(raw, 1) if kind=='nifti.gz' else raw)
            signal.alarm(20)
            start = time.perf_counter()
            try:
                if i%7==0: assert audit_series(td).error in (None,'SeriesError')
                out = type(read_volume(td)).__name__
            except SeriesError as e: out = 'SeriesError' if 'SECRET' not in str(e) else 'a name in an error'
            except (Exception,Hang) as e: out = f'{kind}: {type(e).__name__} {e}'
            signal.alarm(0)
            slowest = max(slowest, time.perf_counter()-start)
            counts[out] += 1
            if out not in ('Volume','SeriesError') and counts[out]==1:
                (Path(tempfile.gettempdir())/f'fuzz-{seed}-{i}.dcm').write_bytes(bad)
    return dict(counts=counts, slowest_s=round(slowest,2))


def run(files, seed):
    "In a process of its own, so that a crash of a decoder is a result too"
    r = subprocess.run([sys.executable, __file__, '--worker', str(files), str(seed)], capture_output=True, text=True)
    assert r.returncode==0, f'seed {seed}: exit code {r.returncode}\n{r.stderr[-2000:]}'
    assert 'SECRET' not in r.stdout+r.stderr
    return json.loads(r.stdout)


def test_mutated_headers():
    res = run(20000 if os.environ.get('MGMT_FAST_SLOW') else 400, 0)
    assert set(res['counts'])=={'Volume','SeriesError'}, res


class Slowly:
    "Asks `file_frames` for nothing more, and so for pydicom's walk"
    tags = ()
    def __call__(self, ds): pass


def test_the_short_walk_says_what_pydicom_says(tmp_path):
    from mgmt_fast.dicom import SeriesError, _plain_frame, file_frames
    rng,path,plain,same = np.random.default_rng(1),tmp_path/'x.dcm',0,0
    for kind,raws in originals().items():
        if kind.startswith('nifti'): continue
        for i in range(150):
            path.write_bytes(mutate(raws[0], rng) if i else raws[0])
            if (found:=_plain_frame(path)) is None: continue
            plain += 1
            try: same += [found]==file_frames(path, Slowly())
            except SeriesError: pass # a header that pydicom cannot read to its end
    assert plain>100 and same==plain, (plain,same)


if __name__=='__main__':
    if sys.argv[1:2]==['--worker']: print(json.dumps(fuzz(int(sys.argv[2]), int(sys.argv[3]))))
    else: print(run(*(int(o) for o in (sys.argv[1:]+['20000','0'][len(sys.argv)-1:]))))
