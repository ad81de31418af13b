"""What training costs on one card, ours beside its peers in one process, and what it leaves of the card idle.

usage: gpu.py steps|profile|compiled|augment|train|thesis|race [FOLDER] [--out gpu.csv] [--size 8x64x256x256 ...]
              [--archs a,b]

steps     one step (forward, loss, backward), eagerly and as one CUDA graph: ours, timm_3d and MONAI; ours also as
          `training` captures it, a graph for each pass and the loss between them. B1 and B3 stand there twice: by
          default their kernels are split into one in the plane and one along the depth; `ours, one pass` computes
          both together, `ours, full` is the very network of the peers.
profile   where such a step of ours spends its time, kernel by kernel, with torch's own operators alone ('ours, plain'),
          with ours, and with split kernels in one pass: the ten longest, and all.
compiled  a step of what `torch.compile` makes of B1; only on a card.
augment   a batch's augmentation, until it is done, and until the host is free again: 'published', 'default', and
          'default' in 3D; the median of forty draws.
train     an epoch of B1 from a store of 585 patients (468 train, 117 validate), eight phantoms again and again, with
          all that `mgmt_train` saves of it.
thesis    seconds an epoch of the thesis' four networks by the recipes 'default' and 'published', and what its
          experiment would take: ten epochs, four sequences.
race      seconds to the same validation AUC, see train.py; ours against MONAI, both on the card.

bf16 autocast, batch norm in training mode, medians of ten steps. Memory is what the card has reserved, from before the
graph was captured. Rows are printed and written to `--out` when they are measured; what is there for this card, torch
and code is not measured again, unless it failed. The exit code is 1 if a row failed. Without a card the parts run on
the CPU with small sizes, in float32 and without graphs: figures of that kind say nothing about cards. Peers that are
not installed are left out with a line that says so."""
import argparse, gc, hashlib, importlib.util, itertools, json, re, statistics, sys, tempfile, time, warnings
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np, pandas as pd, torch, torch.nn.functional as F
from machine import machine
from step import build

CUDA = torch.cuda.is_available()
DEVICE = 'cuda' if CUDA else 'cpu'
SIZES = [(8,32,128,128),(8,64,256,256)] if CUDA else [(2,32,64,64)]
ARCHS = 'efficientnet_b1','efficientnet_b3','densenet121','resnet18'
KEY = ['part','card','arch','who','mode','size','torch','code']


def code_digest():
    "Of the library's source: rows of another state of it are not ours"
    h = hashlib.blake2b(digest_size=4)
    for file in sorted((Path(__file__).parent.parent/'mgmt_fast').glob('*.py')): h.update(file.read_bytes())
    return h.hexdigest()


class Rows:
    "What was measured, in a file"
    def __init__(self, path, part):
        self.path,self.part,self.card = Path(path),part,torch.cuda.get_device_name() if CUDA else 'CPU'
        self.table = pd.read_csv(self.path) if self.path.exists() else pd.DataFrame()
        self.table = self.table.reindex(columns=list(dict.fromkeys([*KEY,*self.table.columns,'failed'])))
        self.failures = 0
        self.here = dict(part=self.part, card=self.card, torch=torch.__version__, code=code_digest())

    def ours(self, **row):
        "The rows that this card, torch and code gave, without those that failed"
        same = self.table.failed.isna()
        for k,v in {**self.here, **row}.items(): same &= self.table[k].astype(str)==v
        return self.table[same]

    def has(self, **row): return len(self.ours(**row))>0

    def add(self, row, **found):
        new = pd.DataFrame([{**self.here, **row, **found}])
        again = (self.table[[*self.here,*row]].astype(str)==new.iloc[0][[*self.here,*row]].astype(str)).all(axis=1)
        self.table = pd.concat([self.table[~again], new], ignore_index=True)
        self.table.dropna(axis=1, how='all').to_csv(self.path, index=False)
        said = ' '.join(f'{k} {v:.4g}' if isinstance(v, float) else f'{k} {v}' for k,v in found.items())
        print(f"{row['arch']:16} {row['who']:14} {row['mode']:16} {row['size']:14} {said}", flush=True)

    def fail(self, row, e):
        self.failures += 1
        self.add(row, failed=f'{type(e).__name__} {str(e)[:100]}')


def whos(arch):
    "Who is measured on an architecture"
    for who in ('ours',*(('ours, one pass','ours, full') if splits(arch) else ()),'timm_3d','monai'):
        if who.startswith('ours') or importlib.util.find_spec(who): yield who


def splits(arch):
    "Has it depthwise convolutions, whose kernels are split?"
    return arch.startswith('efficientnet')


def within(who):
    "The context in which a network is made and runs"
    from mgmt_fast.operators import one_pass, plain_operators
    return {'ours, one pass':one_pass, 'ours, plain':plain_operators}.get(who, nullcontext)()


def wait():
    if CUDA: torch.cuda.synchronize()


def reserved(): return torch.cuda.max_memory_reserved()/2**30 if CUDA else float('nan')


def clear():
    "Leave nothing of what was measured before"
    gc.collect()
    if CUDA: torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()


class Step:
    "One step of a network, in a mode: 'eager', 'graph', or one of `torch.compile`'s"
    def __init__(self, who, arch, size, mode):
        torch.manual_seed(0)
        model,x = build(who.removesuffix(', one pass'), arch, size)
        self.model,self.x,self.y = model.to(DEVICE).train(),x.to(DEVICE),torch.ones(size[0], 1, device=DEVICE)
        self.cached = mode!='graph'
        self.net = self.model if mode in ('eager','graph','training') else torch.compile(self.model, mode=mode)
        self.run = self.fresh
        if mode=='graph': self._capture()
        if mode=='training':
            from mgmt_fast.graphs import GraphMemory, StepGraph
            with self.autocast(): self.net = StepGraph(self.model, self.x, GraphMemory())

    def autocast(self): return torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA, cache_enabled=self.cached)

    def step(self):
        with self.autocast(): out = self.net(self.x)
        F.binary_cross_entropy_with_logits(out.float(), self.y).backward()

    def fresh(self):
        for p in self.model.parameters(): p.grad = None
        self.step()

    def _capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3): self.fresh()
        torch.cuda.current_stream().wait_stream(side)
        for p in self.model.parameters(): p.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph): self.step()
        self.run = graph.replay


def timed(f):
    "Milliseconds until all of it is done, and until the host is free again"
    wait()
    start = time.perf_counter()
    f()
    host = time.perf_counter()-start
    wait()
    return 1000*(time.perf_counter()-start),1000*host


def measure(who, arch, size, mode, reps=10):
    "Milliseconds and the rest of one row"
    clear()
    torch._dynamo.reset()
    start = time.perf_counter()
    step = Step(who, arch, size, mode)
    times = [timed(step.run)[0] for _ in range(reps+3)][3:]
    ms = statistics.median(times)
    first = time.perf_counter()-start-sum(times)/1000
    return dict(ms=ms, volumes_per_s=1000*size[0]/ms, reserved_GiB=reserved(), first_s=first)


def table(rows, plan):
    "Measure what is not there yet; what fails is a row too, and is tried again next time"
    for who,arch,size,mode in plan:
        row = dict(arch=arch, who=who, mode=mode, size='x'.join(map(str, size)))
        if rows.has(**row): continue
        try:
            with within(who): rows.add(row, **measure(who, arch, size, mode))
        except Exception as e:
            rows.fail(row, e)


def steps(rows, o):
    def modes(who):
        if not CUDA: return ('eager',)
        return ('eager','graph','training') if who.startswith('ours') else ('eager','graph')
    table(rows, [(w,a,s,m) for s in o.sizes for a in o.archs for w in whos(a) for m in modes(w)])
    compare(rows)


def profile(rows, o):
    for who,arch,size in itertools.product(('ours, plain','ours','ours, one pass'), o.archs, o.sizes):
        if who=='ours, one pass' and not splits(arch): continue
        row = dict(arch=arch, who=who, size='x'.join(map(str, size)))
        if rows.has(**row, mode='all kernels'): continue
        try:
            with within(who): each = kernel_times(who, arch, size)
        except Exception as e:
            rows.fail(dict(mode='all kernels', **row), e)
            continue
        total = sum(each.values())
        for name,ms in sorted(each.items(), key=lambda o: -o[1])[:10]:
            rows.add(dict(mode=name, **row), ms=ms, share=ms/total)
        rows.add(dict(mode='all kernels', **row), ms=total, share=1.)


def kernel_times(who, arch, size, reps=5):
    "Milliseconds a step by kernel, or by torch's operator on a CPU, the longest names cut"
    from torch.profiler import ProfilerActivity, profile
    clear()
    run = Step(who.removesuffix(', plain'), arch, size, 'graph' if CUDA else 'eager').run
    for _ in range(3): run()
    wait()
    with profile(activities=[ProfilerActivity.CUDA if CUDA else ProfilerActivity.CPU]) as p:
        for _ in range(reps): run()
        wait()
    each = Counter()
    for e in p.key_averages():
        name = re.sub('<.*|^void ', '', e.key)[-40:]
        each[name] += (e.self_device_time_total if CUDA else e.self_cpu_time_total)/1000/reps
    return each


def compiled(rows, o):
    if not CUDA: return print('compiled: only on a card')
    plan = [(w,'efficientnet_b1',s,m) for s in o.sizes for w,m in
        (('timm_3d','reduce-overhead'),('ours','graph'),('timm_3d','default'),('ours','default'))]
    table(rows, plan)
    for size,g in rows.ours().groupby('size', sort=False):
        by = g.set_index(['who','mode']).ms
        theirs = [by[o] for o in by.index if o[0]=='timm_3d']
        if theirs and ('ours','graph') in by.index:
            ratio = min(theirs)/by['ours','graph']
            print(f"efficientnet_b1 {size} ours as a graph {ratio:.2f} x timm_3d's best compiled mode")


def compare(rows):
    "Ours against the faster of the peers in eager mode"
    t = rows.ours()
    for (arch,size),g in t.groupby(['arch','size'], sort=False):
        peers = g[~g.who.str.startswith('ours')&(g['mode']=='eager')]
        if not len(peers): continue
        for r in g[g.who.str.startswith('ours')].itertuples():
            print(f"{arch:16} {r.size:14} {r.who:14} {r.mode:8} {peers.ms.min()/r.ms:5.2f} x the faster eager peer "
                f"({peers.loc[peers.ms.idxmin()].who}); reserved {r.reserved_GiB:.1f} GiB, theirs "
                f"{peers.reserved_GiB.min():.1f}")


def augment(rows, o):
    from mgmt_fast.augment import mgmt_augs
    from mgmt_fast.core import get_recipe
    torch.manual_seed(0)
    size = o.sizes[-1][0],1,*o.sizes[-1][1:]
    x = torch.rand(size, device=DEVICE)*(torch.rand(size, device=DEVICE)>.5)
    for name,choices in (('published',{}),('default',{}),('default, 3D',dict(in_plane=False))):
        row = dict(arch='augment', who='ours', mode=name, size='x'.join(map(str, o.sizes[-1])))
        if rows.has(**row): continue
        augs, = mgmt_augs(get_recipe(name.split(',')[0], **choices), seed=0)
        each = [timed(lambda: augs.encodes(x)) for _ in range(52)][12:]
        ms,host_ms = map(statistics.median, zip(*each))
        rows.add(row, ms=ms, host_ms=host_ms)


def repeated_store(folder, size, sequences, n, kinds=8):
    "A store of n patients, a few phantoms again and again: their pictures do not matter here, their bytes do"
    from mgmt_fast.cohort import kaggle_cohort
    from mgmt_fast.phantom import make_phantom
    from mgmt_fast.prepare import VolumeStore, prepare
    few,many = folder/f'few{kinds}',folder/f"store-{n}-{'x'.join(map(str, size))}-{'-'.join(sequences)}"
    if (many/'store.json').exists(): return VolumeStore(many)
    make_phantom(folder/f'phantom{kinds}', n=kinds, test=0., slices=24, size=80, sequences=sequences, progress=False)
    store = prepare(kaggle_cohort(folder/f'phantom{kinds}'), few, sequences, size=size, progress=False)
    many.mkdir(exist_ok=True)
    for file in few.glob('*.npy'):
        once = np.load(file, mmap_mode='r')
        out = np.lib.format.open_memmap(many/file.name, 'w+', np.uint8, (n,*size))
        for i in range(n): out[i] = once[i%kinds]
    names = [f'P{i:05}' for i in range(n)]
    for name in ('store.json','patients.json'):
        d = json.loads((few/name).read_text())
        each = list(d['patients'].values())
        d['patients'] = {p: {**each[i%kinds], **({'row':i} if name=='store.json' else {'label':i%2})}
            for i,p in enumerate(names)}
        (many/name).write_text(json.dumps(d))
    return VolumeStore(many)


def learner(store, arch, folder, epochs=10, recipe='default'):
    "As `mgmt_train` makes it, on this card"
    from mgmt_fast.core import get_recipe
    from mgmt_fast.learner import mgmt_learner, recipe_dls
    asked = dict(arch=arch, epochs=epochs, pretrained=False, patience=None) # of which none changes the time of an epoch
    recipe = get_recipe(recipe, size=store.size, **asked)
    return mgmt_learner(recipe_dls(store, recipe=recipe), recipe=recipe, path=folder)


def watch():
    "A callback that notes the seconds of each epoch; the first three compile and capture"
    from fastai.callback.core import Callback
    class Epochs(Callback):
        order = 90
        def before_fit(self): self.seconds,self.training = [],[]
        def before_epoch(self): wait(); self.t = time.perf_counter()
        def after_train(self): wait(); self.training.append(time.perf_counter()-self.t)
        def after_epoch(self): wait(); self.seconds.append(time.perf_counter()-self.t)
    return Epochs()


def epochs_of(store, arch, n=5, recipe='default'):
    "Seconds of an epoch, and of its training part"
    with tempfile.TemporaryDirectory() as d:
        learn,times = learner(store, arch, d, n, recipe),watch()
        learn.add_cb(times)
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe(resume=True)
        found = statistics.median(times.seconds[3:]),statistics.median(times.training[3:]),sum(times.seconds[:3])
        return *found,len(learn.dls.train.dataset)


def busy(store, arch):
    "Share of an epoch's training in which a kernel ran, by the profiler"
    from torch.profiler import ProfilerActivity, profile
    from fastai.callback.core import Callback
    class Profile(Callback):
        order,run_valid = 80,False
        def before_train(self):
            if self.epoch==3: wait(); self.p = profile(activities=[ProfilerActivity.CUDA]); self.p.__enter__()
        def after_train(self):
            if self.epoch==3: wait(); self.p.__exit__(None, None, None)
    with tempfile.TemporaryDirectory() as d:
        learn,p = learner(store, arch, d, 4),Profile()
        learn.add_cb(p)
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    return share(p.p.events())


def share(events):
    "Of the time between the first kernel and the end of the last one"
    spans = sorted((e.time_range.start,e.time_range.end) for e in events
        if e.device_type==torch.autograd.DeviceType.CUDA)
    total,end = 0.,spans[0][0]
    for a,b in spans: total,end = total+max(0., b-max(a, end)),max(end, b)
    return total/(end-spans[0][0])


def train(rows, o):
    size,n = ((64,256,256),585) if CUDA else ((32,32,32),24)
    store = repeated_store(o.folder, size, ('T1wCE',), n)
    row = dict(arch='efficientnet_b1' if CUDA else 'resnet10', who='ours', mode='epoch', size='x'.join(map(str, size)))
    if rows.has(**row): return
    epoch,training,first,patients = epochs_of(store, row['arch'])
    found = dict(epoch_s=epoch, training_s=training, volumes_per_s=patients/training, first_three_s=first,
        reserved_GiB=reserved())
    if CUDA: found['busy'] = busy(store, 'efficientnet_b1')
    rows.add(row, **found)


def thesis(rows, o):
    """Each network's epoch on one sequence is measured and stands for all four; its first three epochs, with what they
    compile and capture, count once for each training."""
    size,n = ((64,256,256),585) if CUDA else ((32,32,32),24)
    store = repeated_store(o.folder, size, ('T1wCE',), n)
    archs = ('efficientnet_b1','efficientnet_b3','xception','densenet121') if CUDA else ('resnet10',)
    for recipe in ('default','published'):
        at = dict(who='ours', mode=f'epoch, {recipe}', size='x'.join(map(str, size)))
        for arch in archs:
            if rows.has(arch=arch, **at): continue
            epoch,training,first,_ = epochs_of(store, arch, recipe=recipe)
            rows.add(dict(arch=arch, **at), epoch_s=epoch, training_s=training, first_three_s=first,
                ten_epochs_s=first+7*epoch)
        total = 4*rows.ours(**at).groupby('arch').ten_epochs_s.last().sum()
        if CUDA: print(f"projected, {recipe}: {total/60:.1f} minutes for 16 models of ten epochs, {5*total/3600:.2f} "
            "hours with five folds: four times the first three and seven more epochs of each network")


def race(rows, o):
    if not importlib.util.find_spec('monai'): return print('race: needs MONAI, which is the other runner')
    import train as racing
    settings = argparse.Namespace(patients=160 if CUDA else 60, size='32x64x64', limit=90 if CUDA else 20,
        who='ours,bf16,monai')
    for seed in range(3 if CUDA else 1):
        row = dict(arch='resnet18', who='ours', mode=f'seed {seed}', size=settings.size)
        if rows.has(**row): continue
        curves = racing.race(o.folder/f'seed{seed}', settings, seed)
        rows.add(row, **{f'{k}_times_faster': float(racing.ratio(curves[k], curves['monai'])) for k in ('ours','bf16')})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=['steps','profile','compiled','augment','train','thesis','race'])
    p.add_argument('folder', nargs='?', type=Path)
    p.add_argument('--out', default='gpu.csv')
    p.add_argument('--size', nargs='*')
    p.add_argument('--archs', default=','.join(ARCHS) if CUDA else 'resnet18')
    o = p.parse_args()
    warnings.simplefilter('ignore')
    o.archs = o.archs.split(',')
    if unknown := set(o.archs)-set(ARCHS): p.error(f"no architecture of these benchmarks: {', '.join(unknown)}")
    try: o.sizes = [tuple(map(int, s.split('x'))) for s in o.size or []] or SIZES
    except ValueError: o.sizes = [()]
    if any(len(s)!=4 for s in o.sizes): p.error('a size is patients and voxels, as in 8x64x256x256')
    print(machine(), flush=True)
    for name in ('timm_3d','monai'):
        if not importlib.util.find_spec(name): print(f'{name} is not installed: left out')
    with tempfile.TemporaryDirectory() as d:
        o.folder = o.folder or Path(d)
        o.folder.mkdir(parents=True, exist_ok=True)
        rows = Rows(o.out, o.part)
        globals()[o.part](rows, o)
    return int(rows.failures>0)


if __name__ == '__main__': sys.exit(main())
