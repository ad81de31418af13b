"What strangers send, and what disks do: refused with a sentence, within a budget, and nothing is lost."
import gzip
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, MRImageStorage

from mgmt_fast import cli
from mgmt_fast.audit import audit
from mgmt_fast.cohort import kaggle_cohort
from mgmt_fast.core import Budget, MGMTError
from mgmt_fast.pages import write_picture
from mgmt_fast.phantom import make_phantom
from mgmt_fast.prepare import VolumeStore, prepare
from mgmt_fast.quality import audit_series
from mgmt_fast.series import list_series, read_volume

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT/'benchmarks'))
from fuzz import Fuzz
from soak import FailingWrites


def cost(f, *args):
    "Seconds of processor time, and what it said"
    before = sum(os.times()[:4])
    try: said = f(*args)
    except MGMTError as e: said = str(e)
    return sum(os.times()[:4])-before,said


def nifti_header(shape, offset=352):
    h = nib.Nifti1Header()
    h.set_data_dtype(np.int16); h.set_data_shape(shape); h.set_sform(np.eye(4), 1)
    h['magic'],h['vox_offset'] = b'n+1\0',offset
    return h.binaryblock+bytes(4)


def packed(path, raw):
    path.write_bytes(gzip.compress(raw, 1))
    return path


def dicom(path, body, syntax=ExplicitVRLittleEndian):
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID,meta.MediaStorageSOPInstanceUID = MRImageStorage,'1.2.3'
    meta.TransferSyntaxUID = syntax
    ds = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    ds.SOPClassUID,ds.SOPInstanceUID,ds.Modality,ds.Rows,ds.Columns = MRImageStorage,'1.2.3','MR',16,16
    for k,v in body.items(): setattr(ds, k, v)
    ds.save_as(path, enforce_file_format=True)
    return path


BOMBS = {
    'a volume of 1500^3':    (lambda p: packed(p/'a.nii.gz', nifti_header((1500,)*3)), '3,375,000,000 voxels, and'),
    'a kilobyte for 400^3':  (lambda p: packed(p/'a.nii.gz', nifti_header((400,)*3)), 'the voxels cannot be read'),
    'extensions of 2 GB':    (lambda p: packed(p/'a.nii.gz', nifti_header((50,)*3, 2e9)), 'begin only after'),
    '32,767 time points':    (lambda p: packed(p/'a.nii.gz', nifti_header((4,4,4,32767))+bytes(4194176)), 'choose one'),
    'plain and cut short':   (lambda p: (p/'a.nii').write_bytes(nifti_header((300,)*3)), 'the voxels cannot be read'),
}


@pytest.mark.parametrize('case', BOMBS)
def test_what_a_nifti_header_claims_is_not_believed(tmp_path, case):
    make,says = BOMBS[case]
    make(tmp_path)
    path, = tmp_path.iterdir()
    seconds,said = cost(read_volume, path)
    assert says in said and seconds<3, (said, seconds)


def test_a_budget_can_be_raised(tmp_path):
    x = np.arange(64**3, dtype=np.int16).reshape(64,64,64)
    nib.save(nib.Nifti1Image(x, np.eye(4)), tmp_path/'a.nii.gz')
    with pytest.raises(MGMTError, match=r'262,144 voxels, and 1,000 are allowed.*Budget\(voxels='):
        read_volume(tmp_path/'a.nii.gz', budget=Budget(voxels=1000))
    with pytest.raises(MGMTError, match='bytes once unpacked'):
        read_volume(tmp_path/'a.nii.gz', budget=Budget(inflated=1000))
    assert read_volume(tmp_path/'a.nii.gz', budget=Budget(voxels=64**3)).shape==(64,64,64)


def test_a_budget_is_typed(scans, tmp_path):
    "Where too little is allowed every patient is left out, and the report names the number"
    how = dict(sequences='T1wCE', size='6x16x16', n_workers=1)
    assert cli.mgmt_prepare(scans, tmp_path/'store', **how, budget='voxels=100', strict=True)==3
    report = VolumeStore(tmp_path/'store').report
    assert report.what[report.sequence=='T1wCE'].str.contains('100 are allowed').sum()==6
    assert cli.mgmt_prepare(scans, tmp_path/'store', **how, budget='voxels=1e5', strict=True)==0


def test_a_deflated_file_that_unfolds_without_end(tmp_path):
    path = dicom(tmp_path/'a.dcm', {}, DeflatedExplicitVRLittleEndian)
    raw = path.read_bytes()
    at = raw.index(b'1.2.840.10008.1.2.1.99')+22
    z = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = b''.join(z.compress(bytes(2**24)) for _ in range(60))+z.flush()
    path.write_bytes(raw[:at]+body)
    seconds,said = cost(read_volume, path)
    assert 'unfold to more than' in said and seconds<10, (said, seconds)


@pytest.mark.parametrize('undefined', [False,True])
def test_a_list_of_empty_frames(tmp_path, undefined):
    frames = pydicom.Sequence([Dataset() for _ in range(60_000)])
    path = dicom(tmp_path/'a.dcm', dict(NumberOfFrames=60_000, PerFrameFunctionalGroupsSequence=frames))
    if undefined:
        raw = path.read_bytes()
        at = raw.index(b'\x00\x52\x30\x92SQ')+8
        path.write_bytes(raw[:at]+b'\xff\xff\xff\xff'+raw[at+4:]+b'\xfe\xff\xdd\xe0\0\0\0\0')
    seconds,said = cost(read_volume, path)
    assert '60,000 frames in one file' in said and seconds<10, (said, seconds)


@pytest.mark.parametrize('name', ['pipe','pipe.nii','pipe.dcm','IM0001'])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path/name)
    for f in (read_volume, list_series, audit_series):
        assert cost(f, tmp_path/name)[0]<5
        assert cost(f, tmp_path)[0]<5
    assert cost(lambda: audit(tmp_path, tmp_path.parent/'audit', n_workers=0, progress=False))[0]<5


@pytest.fixture(scope='module')
def fuzz(tmp_path_factory):
    home = tmp_path_factory.mktemp('home')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('MGMT_FAST_HOME', str(home/'data'))
        m.setenv('MGMT_FAST_LOG', str(home/'faults.log'))
        yield Fuzz(tmp_path_factory.mktemp('fuzz'), 7)


def test_changed_files_are_read_or_refused(fuzz):
    "2,000 of each kind are in `benchmarks/fuzz.csv`"
    fuzz.files(25)
    assert not fuzz.said, fuzz.said
    assert all(fuzz.counts[k,'refused'] for k in fuzz.kinds())
    assert max(fuzz.worst.values())<10


def test_changed_series_are_read_or_refused(fuzz):
    fuzz.scans(200)
    assert not fuzz.said, fuzz.said


def test_a_strangers_model_opens_nothing(fuzz):
    import json
    path = fuzz.work/'run'/'model.json'
    good = path.read_text()
    d = json.loads(good)
    d['config']['pretrained'] = '/etc/passwd'
    path.write_text(json.dumps(d))
    try:
        with pytest.raises(MGMTError, match="'pretrained' is unknown"): fuzz.kinds()['model.json'][2]()
    finally: path.write_text(good)


@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    root = tmp_path_factory.mktemp('scans')
    make_phantom(root, n=6, seed=1, test=0., slices=6, size=24, sequences='T1wCE', n_workers=0, progress=False)
    return root


def prepared(scans, dest): return prepare(kaggle_cohort(scans), dest, 'T1wCE', (6,16,16), n_workers=1, progress=False)


def test_every_write_of_a_preparation_may_fail(scans, tmp_path):
    right = {p.name: p.read_bytes() for p in prepared(scans, tmp_path/'right').path.iterdir()}
    k,failed = 1,0
    while True:
        dest = tmp_path/f'{k}'
        with pytest.MonkeyPatch.context() as m:
            writes = FailingWrites(k, m.setattr)
            try: prepared(scans, dest)
            except MGMTError as e: assert 'No space left on device' in str(e), e
        if writes.n<k: break
        failed,k = failed+1,k+1
        prepared(scans, dest)
        assert {p.name: p.read_bytes() for p in dest.iterdir()}==right, k
    assert failed>20


def test_half_a_picture_is_an_error(tmp_path):
    "Where a disk fills, the system takes a part of what is written, and says so to who asks"
    picture = np.random.default_rng(0).integers(0, 255, (64,64,3), dtype=np.uint8)
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            write_picture(tmp_path/'a.jpg', picture, 'JPEG')
        except MGMTError: code = 0
        finally: os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==0 and not [*tmp_path.iterdir()]
    write_picture(tmp_path/'a.jpg', picture, 'JPEG')
    assert Image.open(tmp_path/'a.jpg').size==(64,64)


def test_two_writers_of_one_store(scans, tmp_path):
    lines = f'''import time
from mgmt_fast.processes import working_in
with working_in({str(tmp_path/"store")!r}): print("held", flush=True); time.sleep(60)'''
    other = subprocess.Popen([sys.executable,'-c',lines], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline()
        says = f'is being written by process {other.pid}'
        with pytest.raises(MGMTError, match=says): prepared(scans, tmp_path/'store')
    finally: other.kill(); other.wait()
    assert len(prepared(scans, tmp_path/'store'))==6
    assert not [p for p in (tmp_path/'store').rglob('*') if p.name.startswith('.')]


@pytest.mark.parametrize('sign,code', [(signal.SIGTERM,143),(signal.SIGINT,130)])
def test_a_signal_ends_a_command_with_what_is_kept(tmp_path, sign, code):
    how = [BIN/'mgmt_phantom', tmp_path/'p', '--n', '400', '--slices', '16', '--size', '64']
    run = subprocess.Popen(how, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic()+120
    while not (tmp_path/'p'/'train').is_dir() and time.monotonic()<end: time.sleep(.1)
    time.sleep(1)
    run.send_signal(sign)
    out,err = run.communicate(timeout=120)
    assert run.returncode==code and 'what was complete is kept' in err and 'Traceback' not in err, err
    assert '%' not in out, 'no progress bar in a file'
    assert not [p for p in (tmp_path/'p').rglob('.mgmt-lock')]


def test_a_worker_that_dies_costs_one_patient(scans, tmp_path, monkeypatch):
    "As where memory runs out; the patient is named, and passed over the next time"
    from mgmt_fast import prepare as room
    real = room.read_sequence
    def deadly(row, *args):
        if str(row['patient'])==who: os._exit(1)
        return real(row, *args)
    cohort = kaggle_cohort(scans)
    who = cohort.patient[2]
    monkeypatch.setattr(room, 'read_sequence', deadly)
    store = prepare(cohort, tmp_path/'store', 'T1wCE', (6,16,16), n_workers=2, progress=False)
    errors = store.report[store.report.level=='error']
    assert errors.patient.tolist()==[who] and 'died' in errors.what.item()
    again = prepare(cohort, tmp_path/'store', 'T1wCE', (6,16,16), n_workers=2, progress=False)
    assert again.table.T1wCE.sum()==5 and VolumeStore(tmp_path/'store').report.equals(again.report)


@pytest.mark.parametrize('cell', ['=1+1','@SUM(A1)','+cmd','-2+3',"'=x"])
def test_no_cell_is_executed(tmp_path, cell):
    from mgmt_fast.pages import plain_cells, write_csv
    write_csv(tmp_path/'t.csv', pd.DataFrame({'patient':[cell,'Doe'], 'n':[-1,2]}))
    assert '\n'+cell not in (tmp_path/'t.csv').read_text()
    assert plain_cells(pd.read_csv(tmp_path/'t.csv', dtype={'patient':str})).patient.tolist()==[cell,'Doe']


def test_a_recipe_file_names_no_other_file(tmp_path):
    from mgmt_fast.core import read_recipe
    for text in (f'recipe: {tmp_path}/r.yaml\n', 'recipe: [default]\n', 'a: &a [x,x]\nrecipe: *a\n', '['*50_000):
        (tmp_path/'r.yaml').write_text(text)
        with pytest.raises(MGMTError): read_recipe(tmp_path/'r.yaml')


def test_text_in_the_image_is_found(tmp_path):
    z,y,x = np.ogrid[-1:1:8j,-1:1:48j,-1:1:48j]
    head = (((z**2+y**2+x**2)<.7)*(400+100*np.cos(5*y)*np.cos(7*x+3*z))).astype(np.int16)
    text = head.copy()
    text[:,2:6,2:20:3] = 900
    for name,a in dict(head=head, text=text).items():
        nib.save(nib.Nifti1Image(a.T, np.diag([4.,4,20,1])), tmp_path/f'{name}.nii')
    assert 'burned into' in audit_series(tmp_path/'text.nii').findings
    assert 'burned into' not in audit_series(tmp_path/'head.nii').findings
    kind = dict(SamplesPerPixel=1, PhotometricInterpretation='MONOCHROME2', PixelRepresentation=0)
    pixels = dict(kind, BitsAllocated=16, BitsStored=16, HighBit=15, PixelData=bytes(512))
    (tmp_path/'said').mkdir()
    dicom(tmp_path/'said'/'0.dcm', dict(pixels, BurnedInAnnotation='YES'))
    assert 'its header says that text' in audit_series(tmp_path/'said').findings
