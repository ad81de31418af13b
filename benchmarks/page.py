"""How long the page of one patient takes: a bundle of one ResNet18 at 64x256x256, and four series of DICOM slices at
the competition's size, each on a grid of its own.

usage: python benchmarks/page.py [FOLDER] [--reps 3] [--threads 2] [--workers 2] [--profile]
Makes scans and bundle in FOLDER, or in a temporary one. The network is not trained, and labels are those that it gives,
so that the page has a map and a figure. Prints the seconds of `patient_report`, of the processor and of its parts."""
import argparse, contextlib, cProfile, io, pstats, resource, tempfile, time, warnings
from pathlib import Path

warnings.simplefilter('ignore')
import torch
from machine import machine
from mgmt_fast import patient_page
from mgmt_fast.bundle import Bundle, freeze_bundle
from mgmt_fast.cohort import find_cohort, kaggle_cohort
from mgmt_fast.core import get_recipe
from mgmt_fast.learner import as_model, mgmt_learner, predict, recipe_dls, save_model
from mgmt_fast.patient_page import patient_report
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import prepare

PARTS = ('as_model','find_cohort','audit_cohort','read_sequence','prepare_for','predict_prepared','explain',
    'patient_sections','write_page','patient_paper')


def make_bundle(root):
    "A bundle of one network, and the patients whose answers it knows"
    if (root/'bundle/bundle.json').exists(): return Bundle(root/'bundle')
    make_phantom(root/'small', n=24, test=0, slices=24, size=64, progress=False)
    store = prepare(kaggle_cohort(root/'small'), root/'store', progress=False)
    dls = recipe_dls(store, get_recipe('default', arch='resnet18', bs=2), fold=0, n_folds=2, augs=[])
    learn = mgmt_learner(dls, path=root/'log', model_kwargs=dict(pretrained=False))
    p = predict(learn, store, progress=False)
    store.join(p.assign(label=(p.prob>p.prob.median()).astype(int))[['patient','label']])
    save_model(learn, root/'model')
    known = p.merge(store.table[['patient','label']])
    return freeze_bundle(root/'model', known, store, root/'bundle')


@contextlib.contextmanager
def watched(parts):
    "Adds the seconds of some functions of the page's module up, while it lasts"
    was,found = {k: getattr(patient_page, k) for k in parts},dict.fromkeys(parts, 0.)
    def timed(k):
        def f(*args, **kwargs):
            start = time.perf_counter()
            try: return was[k](*args, **kwargs)
            finally: found[k] += time.perf_counter()-start
        return f
    for k in parts: setattr(patient_page, k, timed(k))
    try: yield found
    finally:
        for k,f in was.items(): setattr(patient_page, k, f)


def processor_seconds():
    "Of this process and of those that it started and that have ended"
    found = [resource.getrusage(o) for o in (resource.RUSAGE_SELF,resource.RUSAGE_CHILDREN)]
    return sum(o.ru_utime+o.ru_stime for o in found)


def page(bundle, scans, dest, workers):
    "A page as `mgmt_report` writes it: seconds, of the processor, and of each part"
    start,cpu = time.perf_counter(),processor_seconds()
    with watched(PARTS) as parts:
        model = patient_page.as_model(bundle)
        res = patient_report(model, patient_page.find_cohort(scans, labels=False), dest, n_workers=workers)
    return res,time.perf_counter()-start,processor_seconds()-cpu,parts


@contextlib.contextmanager
def maybe_profiled(wanted):
    "A list that holds cProfile's table, where it is wanted"
    said,profile = [],cProfile.Profile()
    if wanted: profile.enable()
    yield said
    if not wanted: return
    profile.disable()
    f = io.StringIO()
    pstats.Stats(profile, stream=f).sort_stats('cumulative').print_stats(60)
    said.append(f.getvalue())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?')
    p.add_argument('--reps', type=int, default=3)
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--workers', type=int, default=2)
    p.add_argument('--profile', action='store_true')
    o = p.parse_args()
    root = Path(o.folder or tempfile.mkdtemp())
    torch.set_num_threads(o.threads)
    with contextlib.redirect_stdout(io.StringIO()):
        make_bundle(root)
        make_phantom(root/'scans', n=2, test=0, slices=155, size=240, fov=240, tilt=8, progress=False)
    print(machine(), flush=True)
    for i in range(o.reps):
        with contextlib.redirect_stdout(io.StringIO()), maybe_profiled(o.profile and i==o.reps-1) as told:
            res,seconds,cpu,parts = page(root/'bundle', root/'scans/train/00000', root/'page', o.workers)
        size = sum(f.stat().st_size for f in (root/'page').iterdir())
        print(f"{seconds:.1f} s, {cpu:.1f} s of the processor; {size/1e6:.2f} MB; probability {res.prob:.6f}, "
            f"{'a' if res.map is not None else 'no'} map", flush=True)
    print(', '.join(f'{k} {v:.2f}' for k,v in parts.items()))
    print(''.join(told))


if __name__=='__main__': main()
