"""The leakage audit: what it finds, how fast, beside the thesis' own measure, in one run.
usage: python benchmarks/leakage.py [--what speed,growth,recall] [--train 585] [--test 262] [--sequences 4] [--recall 24] [--workers 2] [--keep FOLDER]
speed   two made-up stores at 64x256x256, all stages through `leakage_audit`, and seconds a pair beside the thesis' cross-correlation and mutual information
growth  all pairs of made-up fingerprints at four sizes, and from them 100,000 x 100,000
recall  phantoms whose anatomies differ, copies under each change and all together
The made-up stores hold one array file each, which all sequences share: 4 MiB a patient on disk."""
import argparse, json, os, platform, resource, shutil, tempfile, time
from pathlib import Path

import numpy as np, pandas as pd, torch
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import SEQUENCES, get_recipe, rng_for
from mgmt_fast.leakage import compare_fingerprints, leakage_audit, planted_recall, plot_recall, published_similarity
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, triangle_weights

size = 64,256,256


def machine():
    cpu = next((o.split(':')[1].strip() for o in open('/proc/cpuinfo') if o.startswith('model name')), platform.processor()) if os.path.exists('/proc/cpuinfo') else platform.processor()
    return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}; {time.strftime('%Y-%m-%d')}"


def field(rng, n, weights):
    x = rng.standard_normal((n,n,n), dtype=np.float32)
    return np.einsum('ai,ijk->ajk', weights[0][n], weights[1][n]@(x@weights[2][n].T), optimize=True)


def made_up_store(dest, patients, sequences):
    "Ellipsoids with a structure of their own beside a common one, in the store's format"
    if (dest/'store.json').exists(): return VolumeStore(dest)
    shutil.rmtree(dest, ignore_errors=True); dest.mkdir(parents=True)
    weights = [{n: triangle_weights(n, m).astype(np.float32) for n in (9,24)} for m in size]
    common,grid = rng_for(0, 'common'),np.ogrid[-1:1:64j,-1:1:256j,-1:1:256j]
    shared,inside = 60*field(common, 9, weights),sum(o*o for o in grid)<.95
    x = np.lib.format.open_memmap(dest/f'{SEQUENCES[0]}.npy', mode='w+', dtype=np.uint8, shape=(len(patients),*size))
    for i,p in enumerate(patients):
        x[i] = np.clip(128+shared+45*field(rng_for(1, p), 24, weights), 1, 255).astype(np.uint8)*inside
    x.flush()
    for s in SEQUENCES[1:sequences]: os.link(dest/f'{SEQUENCES[0]}.npy', dest/f'{s}.npy')
    recipe = get_recipe('default', size=size)
    affine = [[0,0,-.55,70],[0,-.68,0,87],[2.2,0,0,-70],[0,0,0,1]]
    entry = lambda p: dict(label=None, source='made up', affine=affine, volumes={s: dict(hash=f'{p} {s}') for s in SEQUENCES[:sequences]})
    (dest/'store.json').write_text(json.dumps(dict(sequences=SEQUENCES[:sequences], version='bench', patients={p: entry(p) for p in patients}, report=[], recipe=dict(name=recipe.name, choices={'size':size}))))
    return VolumeStore(dest)


def peak(): return [resource.getrusage(o).ru_maxrss/2**20 for o in (resource.RUSAGE_SELF,resource.RUSAGE_CHILDREN)]


def speed(a, home):
    train,test = (made_up_store(home/k, [f'{k}{i:04d}' for i in range(n)], a.sequences) for k,n in (('train',a.train),('test',a.test)))
    for o in (train,test): shutil.rmtree(o.path/'fingerprints', ignore_errors=True)
    volumes,pairs = (a.train+a.test)*a.sequences,a.train*a.test*a.sequences
    print(f'\n{a.train} x {a.test} patients x {a.sequences} sequences at {"x".join(map(str,size))}: {volumes} volumes, {pairs} pairs')
    s = time.perf_counter(); leakage_audit(train, test, SEQUENCES[:a.sequences], n_workers=a.workers, progress=False, planted=0, candidates=1); first = time.perf_counter()-s
    print(f'  fingerprints {first:.0f} s with the little that follows them: {volumes/first:.1f} volumes a second')
    s = time.perf_counter(); df = leakage_audit(train, test, SEQUENCES[:a.sequences], n_workers=a.workers, progress=False); second = time.perf_counter()-s
    print(f'  from fingerprints to the answer {second:.0f} s: all pairs, {len(df)} confirmed and as many of the null, {16*a.sequences} planted copies made and sought')
    print(f'  verdicts {df.verdict.value_counts().to_dict()}; memory at most {" and ".join(f"{o:.2f}" for o in peak())} GB in this process and in a worker')
    print('  '+df.attrs['summary'].splitlines()[-1])
    x,y = train.read(train.table.patient[0], SEQUENCES[0])[0],test.read(test.table.patient[0], SEQUENCES[0])[0]
    s = time.perf_counter(); published_similarity(x, y); theirs = time.perf_counter()-s
    ours = (first+second)/pairs
    print(f"  a pair: ours {ours*1e6:.0f} us, all stages; the thesis' measure {theirs:.2f} s, {theirs/ours:.0f} times as long: {theirs*pairs/86400:.0f} days for all")


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
    print(f'  grows with the number of patients to the power {power:.2f}; 100,000 x 100,000 would take {times[-1]*(1e5/sizes[-1])**2/3600:.1f} h a sequence for the products, {2e5/a.rate/3600:.1f} h for fingerprints at {a.rate:g} volumes a second;')
    print(f'  on disk {2e5*(48*56*48+2*k)/1e9:.0f} GB a sequence; in memory two sets of fingerprints ({2e5*2*k/1e9:.1f} GB) and blocks of 2048 x 2048')


def recall(a, home):
    make_phantom(home/'phantom', n=a.recall, test=0, slices=48, size=96, sequences=('FLAIR',), n_workers=a.workers, progress=False)
    s = time.perf_counter()
    table = planted_recall(kaggle_cohort(home/'phantom'), 'FLAIR', n_workers=a.workers, progress=False)
    print(f"\n{a.recall} phantoms, decided as among 150,000 pairs: same from {table.attrs['threshold']:.3f}; {table.attrs['null_pairs']} pairs of the null reach {table.attrs['null_highest']:.3f}; {time.perf_counter()-s:.0f} s")
    print(table.round(3).to_string(index=False))
    for k,o in table.groupby('change', sort=False): print(f'  {k}: {o.found.sum()} of {o.copies.sum()}, {o.found.sum()/o.copies.sum():.1%}')
    plot_recall(table).figure.savefig(home/'recall.png', dpi=120)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--what', default='speed,growth,recall'); ap.add_argument('--keep')
    ap.add_argument('--rate', type=float, default=20, help='volumes a second, for the estimate of growth')
    for k,v in dict(train=585, test=262, sequences=4, recall=24, workers=2).items(): ap.add_argument(f'--{k}', type=int, default=v)
    a = ap.parse_args()
    print(machine())
    home = Path(a.keep or tempfile.mkdtemp(prefix='mgmt_leakage_'))
    try:
        for o in a.what.split(','): dict(speed=speed, growth=growth, recall=recall)[o](a, home)
    finally:
        if not a.keep: shutil.rmtree(home)


if __name__=='__main__': main()
