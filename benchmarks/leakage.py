"""The leakage audit: what it finds, how fast, beside the thesis' own measure, in one run.
usage: python benchmarks/leakage.py [--what fingerprints,audit,growth,recall] [--train 585] [--test 262] [--sequences 4]
       [--recall 24] [--workers 2] [--keep FOLDER]
fingerprints  of two made-up stores at 64x256x256
audit   the other stages on them, through `leakage_audit`, and seconds per pair beside the thesis' cross-correlation and
        mutual information
growth  all pairs of made-up fingerprints at four sizes, and from them 100,000 x 100,000
recall  phantoms whose anatomies differ, copies under each change and all together
The made-up stores hold one array file each, of phantoms whose anatomies differ, which all sequences share: 4 MiB a
patient on disk."""
import argparse, json, os, resource, shutil, tempfile, time
from pathlib import Path

import joblib, numpy as np
from machine import machine
from rounds import seconds
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import SEQUENCES
from mgmt_fast.fingerprints import ScanSet, common_brain, compare_fingerprints, kept_fingerprints, small_copies
from mgmt_fast.leakage import leakage_audit, planted_recall, plot_recall, published_similarity
from mgmt_fast.phantom import draw_patients, make_phantom, render_patient
from mgmt_fast.prepare import VolumeStore, common_box, foreground, resample, to_bytes

size = 64,256,256


def render(p, path, i):
    "Write the FLAIR of a patient of the phantom into row `i` of a store; affine (4,4)"
    vol = render_patient(p, sequences=('FLAIR',), slices=48, size=96)['FLAIR'][0].float()
    affine,_ = common_box(dict(FLAIR=vol), dict(FLAIR=foreground(vol)), size)
    out = resample(vol, affine, size)
    x = np.load(path, mmap_mode='r+')
    x[i] = to_bytes(out, (out>0).numpy(), (.5,99.5))[0]
    return affine.tolist()


def made_up_store(dest, patients, sequences, workers):
    """Phantoms whose anatomies differ, in the store's format: all sequences of a patient are the same volume, so that
    the disk holds it once"""
    if (dest/'store.json').exists(): return VolumeStore(dest)
    shutil.rmtree(dest, ignore_errors=True); dest.mkdir(parents=True)
    first = dest/f'{SEQUENCES[0]}.npy'
    np.lib.format.open_memmap(first, mode='w+', dtype=np.uint8, shape=(len(patients),*size)).flush()
    affines = joblib.Parallel(workers)(joblib.delayed(render)(p, first, i)
        for i,(_,p) in enumerate(patients.iterrows()))
    for s in SEQUENCES[1:sequences]: os.link(first, dest/f'{s}.npy')
    entry = lambda p,affine: dict(label=None, source='made up', affine=affine,
        volumes={s: dict(hash=f'{p} {s}') for s in SEQUENCES[:sequences]})
    (dest/'store.json').write_text(json.dumps(dict(
        sequences=SEQUENCES[:sequences], version='bench',
        patients={p: entry(p,o) for p,o in zip(patients.patient,affines)}, report=[],
        recipe=dict(name='default', choices={'size':size}))))
    return VolumeStore(dest)


def memory(a):
    own = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    workers = joblib.Parallel(a.workers)(joblib.delayed(own)() for _ in range(4*a.workers)) if a.workers>1 else []
    return f'memory at most {own():.2f} GB here'+(f' and {max(workers):.2f} GB in each of {a.workers} workers'
        if workers else '')


def stores(a, home):
    patients = draw_patients(a.train+a.test, test=a.test/(a.train+a.test), seed=1)
    return [made_up_store(home/k, o.reset_index(drop=True), a.sequences, a.workers)
        for k,o in patients.groupby('split', sort=False)]


def fingerprints(a, home):
    train,test = stores(a, home)
    for o in (train,test): shutil.rmtree(o.path/'fingerprints', ignore_errors=True)
    work = dict(n_workers=a.workers, progress=False)
    folders = {o: o.path/'fingerprints' for o in (train,test)}
    s,volumes = time.perf_counter(),(a.train+a.test)*a.sequences
    for seq in SEQUENCES[:a.sequences]:
        copies = {o: small_copies(ScanSet(o, 'store'), seq, folders[o], **work) for o in (train,test)}
        brain = common_brain(copies[train])
        for o in (train,test): kept_fingerprints(copies[o], brain, folders[o], **work)
    took = time.perf_counter()-s
    (home/'fingerprints.json').write_text(json.dumps(took))
    print(f'\n{volumes} volumes at {"x".join(map(str,size))}: fingerprints in {took:.0f} s, {volumes/took:.1f} volumes '
        f'a second; {memory(a)}', flush=True)


def audit(a, home):
    train,test = stores(a, home)
    pairs,first = a.train*a.test*a.sequences,json.loads((home/'fingerprints.json').read_text())
    s = time.perf_counter()
    df = leakage_audit(train, test, SEQUENCES[:a.sequences], n_workers=a.workers, progress=False)
    second = time.perf_counter()-s
    print(f'\n{a.train} x {a.test} patients x {a.sequences} sequences, {pairs} pairs: from fingerprints to the answer '
        f'{second:.0f} s')
    print(f"  {len(df)} pairs confirmed, {sum(o['null_pairs'] for o in df.attrs['thresholds'])} of the null, "
        f"{sum(o['planted'] for o in df.attrs['recall'])} planted copies made and sought; verdicts "
        f"{df.verdict.value_counts().to_dict()}; {memory(a)}")
    print('  '+df.attrs['summary'].splitlines()[-1])
    x,y = train.read(train.table.patient[0], SEQUENCES[0])[0],test.read(test.table.patient[0], SEQUENCES[0])[0]
    theirs = seconds(lambda: published_similarity(x, y))
    ours = (first+second)/pairs
    print(f"  a pair: ours {ours*1e6:.0f} us, all stages; the thesis' measure {theirs:.2f} s, {theirs/ours:.0f} times "
        f"as long: {theirs*pairs/86400:.0f} days for all", flush=True)


def growth(a, home):
    k,rng,sizes,times = 1600,np.random.default_rng(0),(1024,2048,4096,8192),[]
    mirror,mean = rng.permutation(k),np.zeros(k, np.float32)
    x = rng.standard_normal((sizes[-1],k), dtype=np.float32).astype(np.float16)
    print('\nall pairs of fingerprints of 1600 numbers, in blocks')
    for n in sizes:
        s = time.perf_counter()
        for _ in compare_fingerprints(x[:n], x[:n], mean, mirror): pass
        times.append(time.perf_counter()-s)
        print(f'  {n:6d} x {n:6d}  {times[-1]:7.2f} s, {times[-1]/n/n*1e9:.0f} ns a pair')
    power = np.polyfit(np.log(sizes), np.log(times), 1)[0]
    print(f'  grows with the number of patients to the power {power:.2f}; 100,000 x 100,000 would take '
        f'{times[-1]*(1e5/sizes[-1])**2/3600:.1f} h per sequence for the products, {2e5/a.rate/3600:.1f} h for '
        f'fingerprints at {a.rate:g} volumes per second;')
    print(f'  on disk {2e5*(48*56*48+2*k)/1e9:.0f} GB a sequence; in memory two sets of fingerprints '
        f'({2e5*2*k/1e9:.1f} GB) and blocks of 2048 x 2048')


def recall(a, home):
    if not (home/'phantom').exists():
        make_phantom(home/'phantom', n=a.recall, test=0, slices=48, size=96, sequences=('FLAIR',), n_workers=a.workers,
            progress=False)
    s = time.perf_counter()
    table = planted_recall(kaggle_cohort(home/'phantom'), 'FLAIR', n_workers=a.workers, progress=False)
    print(f"\n{a.recall} phantoms, decided as among 150,000 pairs: same from {table.attrs['threshold']:.3f}; "
        f"{table.attrs['null_pairs']} pairs of the null reach {table.attrs['null_highest']:.3f}; "
        f"{time.perf_counter()-s:.0f} s")
    print(table.round(3).to_string(index=False))
    for k,o in table.groupby('change', sort=False):
        print(f'  {k}: {o.found.sum()} of {o.copies.sum()}, {o.found.sum()/o.copies.sum():.1%}')
    plot_recall(table).figure.savefig(home/'recall.png', dpi=120)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--what', default='fingerprints,audit,growth,recall'); ap.add_argument('--keep')
    ap.add_argument('--rate', type=float, default=20, help='volumes per second, for the estimate of growth')
    for k,v in dict(train=585, test=262, sequences=4, recall=24, workers=2).items():
        ap.add_argument(f'--{k}', type=int, default=v)
    a = ap.parse_args()
    print(machine())
    home = Path(a.keep or tempfile.mkdtemp(prefix='mgmt_leakage_'))
    try:
        for o in a.what.split(','):
            dict(fingerprints=fingerprints, audit=audit, growth=growth, recall=recall)[o](a, home)
    finally:
        if not a.keep: shutil.rmtree(home)


if __name__=='__main__': main()
