"""Seconds from DICOM to numbers, beside what users would pick instead, in one run.
usage: python benchmarks/read.py [--reps 7] [--threads 2] [--patients 32] [--slices 60] [--size 256] [--keep FOLDER]
Makes its own series (32 patients x 4 sequences x 60 slices x 256 x 256 are 1 GB) in a temporary folder, or in FOLDER to
use them again.
Peers that are not installed are left out and named. Times are medians over rounds in which every contender takes its
turn, from a warm file cache; ratios are of those medians."""
import argparse, importlib.util, json, logging, re, resource, shutil, subprocess, sys, tempfile, time, warnings
from pathlib import Path

warnings.simplefilter('ignore')
logging.disable(logging.WARNING)
import numpy as np, pandas as pd, pydicom, torch
from pydicom.dataset import Dataset, FileMetaDataset
from machine import machine
from rounds import rounds
from mgmt_fast.core import SEQUENCES
from mgmt_fast.prepare import VolumeStore, prepare, prepare_patient
from mgmt_fast.quality import audit_series
from mgmt_fast.series import read_volume


def write_series(dest, slices, size, patient, sequence):
    "An egg with texture and noise in the competition's layout, air exactly 0, one uncompressed file per slice"
    dest.mkdir(parents=True)
    rng = np.random.default_rng([int(patient), SEQUENCES.index(sequence)])
    z,y,x = np.linspace(-1,1,slices),*np.ogrid[-1:1:size*1j,-1:1:size*1j]
    for i in range(slices):
        r = (x/.7)**2+(y/.8)**2+(z[i]/.8)**2
        im = np.where(r<1, 400+200*np.cos(9*x+7*y+5*z[i])+rng.integers(0, 40, (size,size)), 0).astype(np.uint16)
        ds,study = Dataset(),f'1.2.{int(patient)+1}'
        series = f'{study}.{SEQUENCES.index(sequence)+1}'
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = '1.2.840.10008.1.2.1'
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = '1.2.840.10008.5.1.4.1.1.4'
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f'{series}.{i+1}'
        ds.PatientID,ds.SeriesInstanceUID,ds.StudyInstanceUID = patient,series,study
        ds.FrameOfReferenceUID,ds.Modality,ds.InstanceNumber = '1.2','MR',i+1
        ds.ImagePositionPatient,ds.ImageOrientationPatient = [-120,-120,-100+i*200/slices],[1,0,0,0,1,0]
        ds.PixelSpacing,ds.SliceThickness = [240/size]*2,1
        ds.Rows = ds.Columns = size
        ds.BitsAllocated = ds.BitsStored = 16
        ds.HighBit,ds.PixelRepresentation,ds.SamplesPerPixel,ds.PhotometricInterpretation = 15,0,1,'MONOCHROME2'
        ds.PixelData = im.tobytes()
        ds.save_as(dest/f'Image-{i+1}.dcm', enforce_file_format=True)


def pydicom_all(d):
    ds = sorted((pydicom.dcmread(f) for f in Path(d).iterdir()), key=lambda o: float(o.ImagePositionPatient[2]))
    return np.stack([o.pixel_array for o in ds])


def simpleitk_all(d):
    import SimpleITK as sitk
    r = sitk.ImageSeriesReader(); r.SetFileNames(r.GetGDCMSeriesFileNames(str(d)))
    return sitk.GetArrayFromImage(r.Execute())


def monai_all(d):
    from monai.transforms import LoadImage
    return LoadImage(reader='PydicomReader', image_only=True)(str(d))


def monai_full(d):
    from monai.transforms import Compose, CropForeground, EnsureChannelFirst, LoadImage, Resize, ScaleIntensity
    return Compose([LoadImage(reader='PydicomReader', image_only=True), EnsureChannelFirst(), CropForeground(),
        Resize((256,256,64)), ScaleIntensity()])(str(d))


def torchio_full(d):
    import torchio as tio
    im = tio.ScalarImage(d); im.load()
    return tio.Compose([tio.ToCanonical(), tio.Resize((256,256,64)), tio.RescaleIntensity((0,1))])(im)


def compare(title, work, ours, reps):
    print(f'\n{title}')
    times = rounds(work, reps)
    mine = np.median(times[ours])
    for k,t in times.items():
        print(f'  {k:46s} median {np.median(t):7.3f} s   min {min(t):7.3f}   max {max(t):7.3f}'
            + (f'   {np.median(t)/mine:5.1f} x ours' if k!=ours else ''))


def timed_prepare(root, dest, workers):
    "In a process of its own: seconds, and the most memory that it or one of its workers had, in MB"
    table = pd.DataFrame([dict(patient=p.name, label=pd.NA, source='bench', **{s: str(p/s) for s in SEQUENCES})
        for p in sorted(Path(root).iterdir())])
    start = time.perf_counter()
    store = prepare(table, dest, n_workers=workers, progress=False)
    s = time.perf_counter()-start
    assert not len(store.report[store.report.level=='error'])
    own = int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[
        1]) # ru_maxrss would tell of the parent before exec
    print(json.dumps(dict(s=s, mb=[own/1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss/1024])))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(reps=7, threads=2, patients=32, slices=60, size=256).items():
        ap.add_argument(f'--{k}', type=int, default=v)
    ap.add_argument('--keep'); ap.add_argument('--prepare', nargs=3, help=argparse.SUPPRESS)
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    if a.prepare: return timed_prepare(*a.prepare[:2], int(a.prepare[2]))
    print(machine())
    gone = [o for o in ('SimpleITK','monai','torchio') if importlib.util.find_spec(o) is None]
    if gone: print('not installed, left out:', ', '.join(gone))
    home = Path(a.keep or tempfile.mkdtemp(prefix='mgmt_read_'))
    try: run(a, home, gone)
    finally:
        if not a.keep: shutil.rmtree(home)


def run(a, home, gone):
    d,cohort = home/'one'/'0'/'T1w', home/f'cohort_{a.patients}_{a.slices}_{a.size}'
    if not d.exists(): write_series(d, 200, 512, '0', 'T1w')
    def peers(**work):
        return {k.replace('_',' '): (lambda f=f: f(d)) for k,(need,f) in work.items() if need not in gone}
    compare('one series, 200 slices of 512x512, uncompressed, to all its voxels in order', {
        'mgmt_fast read_volume': lambda: read_volume(d),
        'reading the bytes: the floor': lambda: sum(len(o.read_bytes()) for o in d.iterdir()),
        'pydicom': lambda: pydicom_all(d),
        **peers(SimpleITK_series_reader=('SimpleITK',simpleitk_all), MONAI_LoadImage=('monai',monai_all))},
        'mgmt_fast read_volume', a.reps)
    row = dict(patient='0', T1w=str(d))
    compare('the same to 64x256x256', {
        'mgmt_fast prepare_patient': lambda: prepare_patient(row, 'T1w'),
        **peers(MONAI_load_crop_resize_scale=('monai',monai_full),
        TorchIO_load_canonical_resize_rescale=('torchio',torchio_full))}, 'mgmt_fast prepare_patient',
        max(2, a.reps//2))
    compare('one series audited', {'mgmt_fast audit_series': lambda: audit_series(d)}, 'mgmt_fast audit_series',
        max(2, a.reps//2))

    if a.patients<2: return
    for p in range(a.patients):
        for s in SEQUENCES:
            if not (cohort/f'{p:05d}'/s).exists(): write_series(cohort/f'{p:05d}'/s, a.slices, a.size, f'{p:05d}', s)
    print(f'\na cohort of {a.patients} patients x 4 sequences x {a.slices} slices of {a.size}x{a.size}, prepared to '
        f'64x256x256')
    n,seconds = 4*a.patients,{}
    for workers in (1,2):
        dest = home/f'store_{workers}'
        shutil.rmtree(dest, ignore_errors=True)
        r = json.loads(subprocess.run([sys.executable, __file__, '--threads', str(a.threads), '--prepare', cohort, dest,
            str(workers)], check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        seconds[workers] = r['s']
        print(f"  {workers} process{'es'*(workers>1):2s}  {r['s']:6.1f} s, {n/r['s']:5.1f} series a second, at most "
            f"{max(r['mb']):4.0f} MB a process; 585 x 4 series would take {585*4/n*r['s']/60:.1f} minutes")
    print(f'  2 processes are {seconds[1]/seconds[2]:.2f} times as fast as 1')
    store = VolumeStore(home/'store_2')
    turn = iter(list(store.meta)*1000)
    compare('a volume out of the store, as float32, 1x64x256x256',
        {'mgmt_fast VolumeStore.read, float': lambda: torch.from_numpy(store.read(next(turn), 'T1w')).float().div_(
        255)}, 'mgmt_fast VolumeStore.read, float', max(20, a.reps))


if __name__=='__main__': main()
