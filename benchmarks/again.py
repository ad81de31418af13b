"""Seconds that a store takes when it is prepared again with other labels, and what its keys cost the first time.
usage: python benchmarks/again.py [--patients 585] [--dicom 60] [--slices 150]
Makes its own scans in a temporary folder: NIfTI files for the first row, folders of DICOM slices for the second (fewer
patients, whose time is also scaled to as many)."""
import argparse, os, shutil, tempfile, time, warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

warnings.simplefilter('ignore')
import nibabel as nib, numpy as np, pandas as pd, torch
from machine import machine
from mgmt_fast.core import SEQUENCES
from mgmt_fast.loader import mgmt_dls
from mgmt_fast.learner import plan_key
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare, prepare_patient, source_content, source_state


def table(paths):
    "A cohort of `{patient: {sequence: path}}`, half of it methylated"
    rows = [dict(patient=p, label=i%2, source='made', **{s: str(o) for s,o in of.items()})
        for i,(p,of) in enumerate(paths.items())]
    return pd.DataFrame(rows).astype({'patient':'string', 'label':'Int64'})


def nifti_cohort(folder, n):
    "Small brains of whole numbers, another for each patient and sequence"
    z,y,x = np.mgrid[-1:1:12j,-1:1:32j,-1:1:32j]
    inside,rng,paths = z**2+y**2+x**2<.8,np.random.default_rng(0),{}
    for i in range(n):
        for s in SEQUENCES:
            f = folder/f'{i:05d}'/f'{s}.nii'; f.parent.mkdir(exist_ok=True)
            v = (300+40*rng.standard_normal(inside.shape)).clip(1).round()*inside
            nib.save(nib.Nifti1Image(v.astype(np.int16), np.diag([5,5,10,1.])), f)
            paths.setdefault(f'{i:05d}', {})[s] = f
    return table(paths)


def dicom_cohort(folder, n, slices):
    "One phantom's series for all patients, by hard links: what is timed reads names, sizes and times only"
    make_phantom(folder/'one', n=2, test=0, slices=slices, size=64, progress=False)
    one,paths = folder/'one/train/00000',{}
    for i in range(n):
        for s in SEQUENCES:
            paths.setdefault(f'{i:05d}', {})[s] = shutil.copytree(one/s, folder/f'{i:05d}'/s, copy_function=os.link)
    return table(paths)


def seconds(f, *args, **kwargs):
    start = time.perf_counter()
    with redirect_stdout(StringIO()): res = f(*args, **kwargs)
    return time.perf_counter()-start,res


def main(patients, dicom, slices):
    print(machine())
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for kind,make,n in (('NIfTI files', lambda d: nifti_cohort(d, patients), patients),
            (f'DICOM folders of {slices}', lambda d: dicom_cohort(d, dicom, slices), dicom)):
            root = Path(tmp)/kind.split()[0]; root.mkdir()
            cohort = make(root)
            first,store = seconds(prepare, cohort, root/'store', size=(8,16,16), progress=False)
            again,_ = seconds(prepare, cohort.assign(label=1-cohort.label), root/'store', size=(8,16,16),
                progress=False)
            for s in SEQUENCES:
                for p in cohort[s][:50]:
                    for f in ([p] if os.path.isfile(p) else [e.path for e in os.scandir(p)]): os.utime(f)
            touched,_ = seconds(prepare, cohort, root/'store', size=(8,16,16), progress=False)
            some = [p for s in SEQUENCES for p in cohort[s][:10]]
            keys = sum(seconds(lambda p: (source_state(p), source_content(p)), p)[0] for p in some)
            work = sum(seconds(prepare_patient, r, SEQUENCES, store.recipe)[0] for _,r in cohort[:10].iterrows())
            rows.append({'scans':f'{n} x 4 {kind}', 'prepared s':first, 'again, other labels s':again,
                'the same for 585 s':again*585/n, '50 patients touched s':touched,
                'keys, share of preparing %':100*keys/work})
        key,_ = seconds(plan_key, mgmt_dls(VolumeStore(Path(tmp)/'NIfTI/store'), bs=8))
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    print(f'key of a training of {patients} patients: {1000*key:.0f} ms')


if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--patients', type=int, default=585)
    p.add_argument('--dicom', type=int, default=60)
    p.add_argument('--slices', type=int, default=150)
    torch.set_num_threads(1)
    main(**vars(p.parse_args()))
